"""Classification by the words of the captions (CatLIP, Mehta et al., 2404.15653, section 3): no contrast, no text tower.

    L = mean over pictures of Σ_c BCE(z_c, [class c is in the picture's texts]),    z = linear(picture)

CatLIP's classes are WordNet's synsets of the captions' nouns; ours are tokens of CLIP's tokeniser, given as words or as a
file of ids (for a captioner: those of the content words of its captions), since most English nouns are one token. The
texts are all that a picture has in the first of `texts` that has any, or else those of the step. The picture is the joint
embedding, times √D. Where a model gives tokens (CoCa), each is classified and the largest logit of a class counts (as in
multiple-instance learning), so that a small object is found where it stands.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cutline.errors import ConfigError
from cutline.objectives import base
from cutline.objectives.captioning import read_vocabulary
from cutline.objectives.contrastive import widen
from cutline.towers import Tokenizer


class Config(base.ObjectiveConfig):
    """classes: words, of which every token is a class, or a JSON file with the token ids that are; texts: columns of text
    (empty: the step's texts); positive: weight of a class that is there against one that is not (1 in the paper)."""

    classes: str | list[str]
    texts: list[str] = Field(default_factory=list)
    positive: float = Field(1.0, gt=0)


class Objective(base.Objective):
    config: Config

    def __init__(self, config: Config, model: Any) -> None:
        super().__init__(config, model)
        text = model.model_cfg["text_cfg"]
        self.needs_text = not config.texts
        self.tokenizer = Tokenizer(model)
        ids = self.ids(config.classes, int(text.get("vocab_size", 49408)))
        self.place: Tensor
        place = torch.full((int(text.get("vocab_size", 49408)),), len(ids)).scatter(0, ids, torch.arange(len(ids)))
        self.register_buffer("place", place, persistent=False)  # id → class, or one more for no class
        tokens = bool(getattr(model, "gives_tokens", False))
        width = int(text["width"] if tokens else model.model_cfg["embed_dim"])
        self.head = nn.Linear(width, len(ids))
        # An embedding has length 1: a linear layer means entries of about 1, and most classes are not there.
        self.scale = 1.0 if tokens else width**0.5
        if not tokens:
            nn.init.constant_(self.head.bias, -math.log(max(len(ids) - 1, 1)))

    def ids(self, classes: str | list[str], size: int) -> Tensor:
        """The token ids that are classes, ascending; `DataError` for a file without such, `ConfigError` for no words."""
        if isinstance(classes, str):
            return read_vocabulary(classes, size)
        found = set(self.tokenizer(["", *classes]).flatten().tolist()) - set(self.tokenizer([""]).flatten().tolist())
        if not found:
            raise ConfigError(f"objectives.catlip.classes has no word in it: {classes!r}.")
        return torch.tensor(sorted(found))

    def columns(self) -> list[str]:
        return self.config.texts

    def made_by(self, column: str) -> str:
        return f"A column of captions is made with: cutline caption write PAIRS --with CAPTIONER --as {column}"

    def forward(self, batch: base.Batch, features: base.Features) -> dict[str, Tensor]:
        """The loss; the shares of the classes predicted (above ½) that are there, and of those there predicted, are logged."""
        picture = features.image_tokens() if features.gives_tokens else features.image()[:, None]
        with torch.autocast(picture.device.type, enabled=False):
            logits = self.head(self.scale * widen(picture)).amax(1)  # (B, N, C) → (B, C)
            labels = self.labels(batch, len(logits))
            positive = torch.tensor(self.config.positive, device=logits.device, dtype=logits.dtype)
            loss = F.binary_cross_entropy_with_logits(
                logits, labels.to(logits.dtype), pos_weight=positive, reduction="sum"
            )
        said = logits.detach() > 0
        right = (said & labels).sum()
        self.logged = {
            "precision": right / said.sum().clamp(min=1), "recall": right / labels.sum().clamp(min=1)
        }  # fmt: skip
        return {"classes": loss / len(logits)}

    def labels(self, batch: base.Batch, pictures: int) -> Tensor:
        """(B, C) bool: which classes are in any text of each picture."""
        found = torch.zeros(pictures, self.head.out_features + 1, dtype=torch.bool, device=self.place.device)
        for tokens, owners in self._texts(batch):
            found[owners[:, None].expand_as(tokens), self.place[tokens]] = True
        return found[:, :-1]

    def _texts(self, batch: base.Batch) -> list[tuple[Tensor, Tensor]]:
        """Tokens (M, T) and the pictures (M,) they are of."""
        if not self.config.texts:
            return [(texts.tokens, texts.owners) for texts in batch.texts.values()]
        rows = zip(*(batch.columns[c] for c in self.config.texts), strict=True)
        given = (next((found for value in row if (found := _written(value))), []) for row in rows)
        texts = [(text, i) for i, found in enumerate(given) for text in found]
        owners = torch.tensor([i for _, i in texts], device=self.place.device, dtype=torch.long)
        return [(self.tokenizer([t for t, _ in texts]).to(self.place.device), owners)]


def _written(value: Any) -> list[str]:
    """The texts of a row in a column that say anything."""
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list) or not all(t is None or isinstance(t, str) for t in texts):
        raise ConfigError(f"objectives.catlip.texts names a column with {value!r} in it, which is no text.")
    return [t for t in texts if t and not t.isspace()]
