"""The objective contract: what a training method is to the rest of the house.

A method is one module `cutline/objectives/NAME.py` with two names in it: `Config` (a subclass of `ObjectiveConfig`)
and `Objective` (a subclass of the class below). A recipe names it under `objectives:`; nothing else has to change.

Shapes: B pictures of this process, D joint embedding width, T tokens, M texts of a picture set (M = B, or more when
several captions belong to one picture).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cutline.config import Config


class ObjectiveConfig(Config):
    """Options every objective has."""

    weight: float = Field(1.0, ge=0)


Area = tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]]  # the range of a crop's share


class View(Config):
    """One kind of picture an objective asks the stream for.

    size: pixels, None for the tower's own; count: how many of them per picture; scale: range of the area that a
    random crop keeps. The view named "image" is the recipe's own augmentation and always exists.
    """

    size: int | None = None
    count: int = Field(1, ge=1)
    scale: Area = (0.4, 1.0)


class Map(Config):
    """A label map an objective asks the stream for, as the view "image" shows it; it comes in `Batch.columns` by its column.

    kind: "segment", ids (B, size, size) int32 with −1 for no class; "depth", (B, size, size) float32 with 0 for no reading;
    "normals", (B, 3, size, size) float32, all 0 for none. classes: ids that there may be; relative: depth without a
    unit, 0 … 1; by: the key of the recipe that asks, for messages.
    """

    column: str
    kind: Literal["segment", "depth", "normals"]
    size: int = Field(ge=1)
    classes: int = 0
    relative: bool = False
    by: str = ""


@dataclass
class Texts:
    """Tokenised texts of one text source: tokens (M, T) and owners (M,), the row in the batch each belongs to.

    paired: every row has one text and they are in order (M = B, owners = 0…B−1), on every process. weight: of this
    source in a loss that is summed over sources (rule `sum`).
    """

    tokens: Tensor
    owners: Tensor
    paired: bool = True
    weight: float = 1.0


@dataclass
class Batch:
    """One step's samples on this process.

    views: name → (B, 3, H, W), or (B·count, 3, H, W) with the views of a picture adjacent. texts: source → `Texts`;
    the source is "text" for the rules `sample` and `all`, and one per column for `sum`. columns: whatever else an
    objective asked for by name, collated. keys: the samples' keys, for messages.
    """

    views: dict[str, Tensor]
    texts: dict[str, Texts]
    columns: dict[str, Any] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)

    def to(self, device: torch.device) -> "Batch":
        def move(t: Any) -> Any:
            return t.to(device, non_blocking=True) if isinstance(t, Tensor) else t

        return Batch(
            {k: move(v) for k, v in self.views.items()},
            {k: Texts(move(v.tokens), move(v.owners), v.paired, v.weight) for k, v in self.texts.items()},
            {k: move(v) for k, v in self.columns.items()},
            self.keys,
        )


Tower = Callable[[Tensor], dict[str, Tensor]]


class Features:
    """Embeddings of one batch, each computed once, when the first objective asks for it.

    image(view) and text(source) are L2-normalised and joint, (B, D) and (M, D); image(view, second=True) is that of the second
    class token, for towers that have one. For a model with a decoder (CoCa),
    image_tokens(view) and text_tokens(source) are what it reads, (B, N, W) and (M, T, W), from the same pass.
    dense() is the map that the image tower pools, of the view "image"; with `encoder`, the tower as an `Encoder`, it is
    from the same pass as the embedding.
    """

    # Objectives compare samples only through this class: whoever computes features otherwise replaces `run` alone.

    def __init__(self, model: Any, batch: Batch, encoder: Any = None) -> None:
        self.model, self.batch, self.encoder = model, batch, encoder
        self.rows: int | None = None  # that an objective passes through towers of its own at a time; None: all
        self.gives_tokens = bool(getattr(model, "gives_tokens", False))
        self._cache: dict[tuple[str, str], Tensor] = {}

    def run(self, tower: Tower, inputs: Tensor) -> dict[str, Tensor]:
        """A pass of a tower: every tensor it gives has a row for each of `inputs`."""
        return tower(inputs)

    def image(self, view: str = "image", second: bool = False) -> Tensor:
        if ("image", view) not in self._cache:
            tower = self._look_densely if self.encoder is not None and view == "image" else self._look
            found = self.run(tower, self.batch.views[view])
            self._cache |= {(what, view): value for what, value in found.items()}
        return self._cache["image second" if second else "image", view]

    def dense(self) -> Tensor:
        """(B, C, h, w), see `Encoder.last`. A CoCa, whose tokens are pooled otherwise, makes it in a pass of its own."""
        if self.encoder is None:
            from cutline.towers import load_encoder  # here: the stream needs this file, and no towers

            self.encoder = load_encoder(self.model)
        if ("dense", "image") not in self._cache and not self.gives_tokens and ("image", "image") not in self._cache:
            self.image()
        if ("dense", "image") not in self._cache:
            found = self.run(lambda x: {"dense": self.encoder.last(x)}, self.batch.views["image"])
            self._cache["dense", "image"] = found["dense"]
        return self._cache["dense", "image"]

    def seen(self) -> Tensor | None:
        """`image()`, if an objective has asked for it."""
        return self._cache.get(("image", "image"))

    def image_tokens(self, view: str = "image") -> Tensor:
        self.image(view)
        return self._cache["image tokens", view]

    def text(self, source: str = "text") -> Tensor:
        if ("text", source) not in self._cache:
            # One pass of the text tower for all sources: small batches waste it, and DataCompDR trains that way.
            texts = self.batch.texts
            width = max(t.tokens.shape[1] for t in texts.values())
            tokens = [nn.functional.pad(t.tokens, (0, width - t.tokens.shape[1])) for t in texts.values()]
            found = self.run(self._read, torch.cat(tokens))
            for what, value in found.items():
                parts = zip(texts, torch.split(value, [len(t) for t in tokens]), strict=True)
                self._cache |= {(what, s): part for s, part in parts}
        return self._cache["text", source]

    def text_tokens(self, source: str = "text") -> Tensor:
        self.text(source)
        return self._cache["text tokens", source][:, : self.batch.texts[source].tokens.shape[1]]

    def _look(self, pictures: Tensor) -> dict[str, Tensor]:
        if self.gives_tokens:
            image, tokens = self.model.image_and_tokens(pictures)
            return {"image": image, "image tokens": tokens}
        if getattr(self.model, "class_tokens", 1) > 1:
            first, second = self.model.encode_classes(pictures, normalize=True).unbind(1)
            return {"image": first, "image second": second}
        return {"image": self.model.encode_image(pictures, normalize=True)}

    def _look_densely(self, pictures: Tensor) -> dict[str, Tensor]:
        if self.gives_tokens:
            return self._look(pictures)
        if getattr(self.model, "class_tokens", 1) > 1:
            both, dense = self.encoder.classes_and_last(pictures)
            first, second = nn.functional.normalize(both, dim=-1).unbind(1)
            return {"image": first, "image second": second, "dense": dense}
        pooled, dense = self.encoder.pooled_and_last(pictures)
        return {"image": nn.functional.normalize(pooled, dim=-1), "dense": dense}

    def _read(self, tokens: Tensor) -> dict[str, Tensor]:
        if self.gives_tokens:
            text, each = self.model.text_and_tokens(tokens)
            return {"text": text, "text tokens": each}
        return {"text": self.model.encode_text(tokens, normalize=True)}

    def logit_scale(self) -> Tensor:
        """exp of the learned log scale, a scalar."""
        scale: Tensor = self.model.logit_scale.exp()
        return scale


class Objective(nn.Module):
    """Base of every objective: build heads in `__init__`, return named loss terms from `forward`.

    `forward` returns its loss terms, unweighted: the sum of them is this objective's loss, and the loop multiplies it
    by `config.weight` and averages over processes. What is only to be logged goes into `self.logged`. What the user
    should be told goes into `self.warning`, which is shown when it is no longer "". What a step's numbers show to have
    collapsed goes into `self.collapse`, which is shown when it has not been "" for `collapse.PATIENCE` steps on end.
    """

    needs_text: bool = True  # whether the stream is to give texts
    own_passes: bool = False  # whether it passes the tower itself; its loss is then a mean over single pictures
    reads_pooled: bool = True  # whether it passes the tower for the pooled embedding, from which patches may be dropped
    reads_map: bool = False  # whether it asks for `Features.dense`, which is then made with the embedding

    def __init__(self, config: ObjectiveConfig, model: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.logged: dict[str, Tensor] = {}
        self.warning = self.collapse = ""

    def views(self) -> dict[str, View]:
        """Views needed beside "image"."""
        return {}

    def columns(self) -> list[str]:
        """Table columns needed beside the picture and the texts."""
        return []

    def made_by(self, column: str) -> str:
        """How to come by one of `columns`, told where the data lack it: the command that makes it."""
        return ""

    def maps(self) -> list[Map]:
        """Label maps needed: columns that follow the picture's crop and flip."""
        return []

    def forward(self, batch: Batch, features: Features) -> dict[str, Tensor]:
        raise NotImplementedError(type(self).__name__)

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after every optimiser step (for teachers that follow the student)."""

    def after_skip(self) -> None:
        """Called instead where the loss or its gradient was not finite and no step was taken."""
