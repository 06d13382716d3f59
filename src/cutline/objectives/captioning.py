"""Captioning objective of CoCa (Yu et al., 2205.01917, equation 3): the next token, given the picture and those before.

    L = mean over tokens of −log P(y_t | y_<t, picture),    y_0 the start token, padding left out

P is the softmax of the decoder, which reads the tokens of the text tower and looks at the tokens of the picture. This is
open_clip's CoCaLoss with its `pad_id` of 0; beside `contrastive` in a recipe both towers run once a step. Every text
counts by its tokens, also where a picture has several (rule `all`). An empty text says nothing of the picture and is
left out, and so is, as in open_clip, the token with the id of the padding where it stands inside a text.

CLIP's vocabulary has 49,408 entries, and for a small decoder their logits are most of the work. `vocabulary` restricts
the softmax to the ids that occur; with all ids in it the loss is the same. A token outside it is left out and counted.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutline.errors import ConfigError, DataError
from cutline.objectives import base
from cutline.objectives.contrastive import widen
from cutline.objectives.gather import total, world

PADDING = 0


class Config(base.ObjectiveConfig):
    """vocabulary: a JSON file with a list of token ids; None for all."""

    vocabulary: str | None = None


class Objective(base.Objective):
    config: Config

    def __init__(self, config: Config, model: nn.Module) -> None:
        super().__init__(config, model)
        if not getattr(model, "gives_tokens", False):
            raise ConfigError(
                "objectives.captioning needs towers with a decoder, and these have none: take a CoCa, for example "
                "towers.model=coca-tiny-64 or coca_ViT-B-32."
            )
        size = int(model.text_decoder.text_projection.shape[1])  # type: ignore[union-attr,index]
        ids = torch.arange(size) if config.vocabulary is None else read_vocabulary(config.vocabulary, size)
        place = torch.full((size,), -1).scatter(0, ids, torch.arange(len(ids)))
        self.ids: Tensor | None
        self.place: Tensor
        self.register_buffer("ids", None if config.vocabulary is None else ids, persistent=False)
        self.register_buffer("place", place, persistent=False)  # id → its place among the logits, or −1

    def forward(self, batch: base.Batch, features: base.Features) -> dict[str, Tensor]:
        """One term per text source; the share of right next tokens and of tokens outside the vocabulary is logged."""
        picture, model = features.image_tokens(), features.model
        terms = {}
        for source, texts in batch.texts.items():
            seen = picture if texts.paired else picture[texts.owners]
            states = model.decode(seen, features.text_tokens(source)[:, :-1])
            loss, right, outside = self.loss(states, texts.tokens[:, 1:], model.text_decoder.text_projection)
            terms[source] = texts.weight * loss
            self.logged |= {f"accuracy/{source}": right, f"outside/{source}": outside}
        return terms

    def loss(self, states: Tensor, labels: Tensor, projection: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """states (M, T, W), labels (M, T), projection (W, ids) → the loss, and two shares of this process's tokens.

        The loss is the sum over this process divided by the number of tokens of all, times the number of processes: the
        mean over processes is the loss of the joined batch.
        """
        written = labels.ne(PADDING)
        written &= written.sum(1, keepdim=True) > 1  # the end token alone: an empty text
        places = self.place[labels[written]]
        known = places >= 0
        used = projection if self.ids is None else projection.index_select(1, self.ids)
        logits = widen(states[written][known] @ used)  # (tokens, ids)
        places = places[known]
        loss = F.cross_entropy(logits, places, reduction="sum")
        loss = loss * world()[1] / total(known.sum())
        right = (logits.detach().argmax(1) == places).float().mean().nan_to_num()
        return loss, right, 1 - known.float().mean().nan_to_num(1.0)


def read_vocabulary(path: str | Path, size: int) -> Tensor:
    """The token ids in a JSON file, ascending; raises `DataError` for anything but distinct ids below `size`."""
    try:
        ids: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"cannot read the vocabulary {str(path)!r}: {e}. It is a JSON list of token ids.") from e
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < size for i in ids):
        raise DataError(f"{str(path)!r} is no vocabulary: it must be a JSON list of token ids from 0 to {size - 1:,}.")
    return torch.tensor(sorted(set(ids)))
