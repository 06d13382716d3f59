"""`cutline reinforce`: what teachers make of a row, stored once for all trainings (DataCompDR).

MobileCLIP (arXiv 2311.17049, section 3) and "Reinforce Data, Multiply Impact" (arXiv 2303.08983): for each picture a
few strong augmentations are drawn (random resized crop, RandAugment) and kept as plain numbers; teachers embed each of
these views and each caption; a student is later trained on the same views with the teachers' embeddings at hand, at the
cost of reading them instead of running the teachers (1.3 h against 21.1 h an epoch of 12.8 M, 8 A100). The columns, and
how the stream replays them, are described in `cutline.train.stream.replay`.

Every teacher sees a view at its own size, with its own mean and deviation; its embedding is L2-normalised and the
teachers' are concatenated (2 × 768 = 1536 for the two ViT-L/14 of the paper).

Vectors are stored as float16. The components of a vector of length 1 are at most 1, where float16 has 11 significant bits
and bfloat16 has 8, and NumPy, Arrow and Lance know it; below 2⁻¹⁴ it loses bits, with an error under 3·10⁻⁸. (Stored
bfloat16 vectors therefore stay exact when they are imported, but for components below 2⁻¹⁷.)

Storage of a row with K augmentations, T texts and D wide vectors: (K + T) · 2 D bytes and some ten bytes an
augmentation: 31 kB for 10 augmentations of the paper's teachers and 3 kB a text, as much as a small JPEG. About five
augmentations and two captions give nearly all of MobileCLIP's gain; its released sets have 10 and 30, and 5.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from cutline import towers
from cutline.captions.work import Failed, Made, Row, Worker, picture_of
from cutline.config import Config
from cutline.errors import ConfigError
from cutline.pairs import BadPicture, Pairs, Provenance
from cutline.towers.pictures import weights_hash
from cutline.towers.store import preprocess_of
from cutline.train.device import device_of
from cutline.train.stream.order import draws, key
from cutline.train.stream.pictures import RowPicture, replay_view
from cutline.train.stream.replay import Teacher, to_stored
from cutline.train.stream.text import captions_of
from cutline.train.stream.transforms import Augment, Augmentation, Picture

FORWARD = 256  # views or texts of one forward pass
OPERATION = pa.struct([("name", pa.string()), ("amount", pa.float64())])  # float64: replayed to the bit
CROP = [(side, pa.int32()) for side in ("top", "left", "height", "width")]
AUGMENTATIONS = pa.list_(pa.struct([*CROP, ("flip", pa.bool_()), ("operations", pa.list_(OPERATION))]))

Vectors = NDArray[np.float16]


def vectors(width: int) -> pa.DataType:
    """The type of a list of embeddings."""
    return pa.list_(pa.list_(pa.float16(), width))


class ReinforceConfig(Config):
    """What is stored.

    teachers: names for `towers.load` (open_clip's "ARCHITECTURE:TAG", a run, a model folder); texts: caption columns to
    embed; augmentations: of each picture; augment: what they are drawn from; seed: of the drawing, with each row's key;
    precision: "auto" is bf16 autocast on a GPU that has it and fp32 elsewhere.
    """

    teachers: list[str] = Field(min_length=1)
    texts: list[str] = Field(default_factory=lambda: ["alt"])
    augmentations: int = Field(10, ge=1)
    augment: Augment = Augment(scale=(0.08, 1.0), operations=2, magnitude=9)
    seed: int = Field(0, ge=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"


@dataclass(frozen=True)
class ReinforceWork:
    """See above; make it with `reinforce_work`."""

    config: ReinforceConfig
    teachers: tuple[Teacher, ...]
    name: str

    @property
    def reads(self) -> list[str]:
        return ["image", *self.config.texts]

    @property
    def writes(self) -> dict[str, "pa.DataType | str"]:
        kind = vectors(sum(t.width for t in self.teachers))
        embedded = [f"{self.name}_image", *(f"{self.name}_text_{c}" for c in self.config.texts)]
        return {f"{self.name}_augment": AUGMENTATIONS, **dict.fromkeys(embedded, kind)}

    def provenance(self) -> Provenance:
        settings = self.config.model_dump(mode="json", exclude={"teachers", "device"})
        settings["teachers"] = [t.model_dump() for t in self.teachers]
        names = ", ".join(t.name for t in self.teachers)
        return Provenance(how="reinforce", model=names, inputs=self.reads, settings=settings)

    def load(self) -> "Reinforcer":
        return Reinforcer(self)


def reinforce_work(pairs: Pairs, config: ReinforceConfig, name: str = "dr") -> ReinforceWork:
    """The work of `cutline reinforce PAIRS --as NAME`.

    Loads each teacher once, to know its width, logit scale and hash. Raises `ConfigError` for a teacher without a text
    tower or with pictures that are not square, and `DataError` for a column that is not there.
    """
    pairs.check_columns(config.texts)
    return ReinforceWork(config, tuple(_describe(t) for t in config.teachers), name)


def _describe(name: str) -> Teacher:
    model = towers.load(name)
    size = preprocess_of(model)["size"]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1:
        raise ConfigError(f"the teacher {name!r} takes pictures of {size} pixels; stored augmentations are square.")
    if not model.model_cfg:
        raise ConfigError(f"the teacher {name!r} has no text tower: choose a CLIP (open_clip's, or a run).")
    width, scale = int(model.model_cfg["embed_dim"]), float(model.logit_scale.detach().exp())
    return Teacher(name=name, hash=weights_hash(model), width=width, logit_scale=scale, size=sides.pop())


def _load(teacher: Teacher, device: torch.device) -> towers.Model:
    model = towers.load(teacher.name, device)
    if weights_hash(model) != teacher.hash:
        raise ConfigError(
            f"the teacher {teacher.name!r} has other weights than when this work began: embeddings of two models would "
            "be mixed in one column. Name a model whose weights stay (not scratch:, nor a run that is still training)."
        )
    return model


@dataclass
class _Prepared:
    """A batch without its bad pictures. rows: each one's augmentations, or why it has none; views: size → uint8 pixels,
    (N, 3, size, size), N over all augmentations; tokens: of all texts, for each teacher; counts: texts of each column
    of each row that is good."""

    rows: list[list[Augmentation] | Failed]
    views: dict[int, Tensor]
    tokens: list[Tensor]
    counts: list[list[int]]


class Reinforcer(Worker):
    """Rows → their augmentations, and the teachers' embeddings of the views and texts."""

    def __init__(self, work: ReinforceWork) -> None:
        self.work, config = work, work.config
        self.device = device_of(config.device)
        self.models = [_load(t, self.device) for t in work.teachers]
        self.tokenizers = [towers.Tokenizer(m) for m in self.models]
        has_bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.half = config.precision == "bf16" or (config.precision == "auto" and has_bf16)
        self.pool = ThreadPoolExecutor(os.cpu_count())  # decoding and resizing release the interpreter lock

    def prepare(self, rows: list[Row]) -> _Prepared:
        made = list(self.pool.map(self._views, rows))
        good = [m for m in made if not isinstance(m, Failed)]
        views = {size: [v for _, of_size in good for v in of_size[size]] for size in self._sizes()}
        stacked = {size: torch.from_numpy(np.stack(v)) for size, v in views.items() if v}
        counts, texts = list[list[int]](), list[str]()
        for row, m in zip(rows, made, strict=True):
            if isinstance(m, Failed):
                continue
            each = [captions_of(c, row[c]) or [""] for c in self.work.config.texts]
            counts.append([len(t) for t in each])
            texts += [t for column in each for t in column]
        tokens = [t.trimmed(t(texts)) for t in self.tokenizers] if texts else []
        return _Prepared([m if isinstance(m, Failed) else m[0] for m in made], stacked, tokens, counts)

    def _sizes(self) -> list[int]:
        return sorted({t.size for t in self.work.teachers})

    def _views(self, row: Row) -> tuple[list[Augmentation], dict[int, list[Picture]]] | Failed:
        """The augmentations of a row, drawn from (seed, key), and its views at each teacher's size."""
        config = self.work.config
        if row["image"] is None:
            return picture_of(row)  # type: ignore[return-value]  # which says why
        try:
            picture = RowPicture(row["image"])
            draw = draws(config.seed, 0, key(str(row["key"])), "reinforce")
            drawn = [config.augment.draw(*picture.size, draw) for _ in range(config.augmentations)]
            return drawn, {s: [replay_view(picture, config.augment, how, s) for how in drawn] for s in self._sizes()}
        except BadPicture as e:
            return Failed(f"picture: {e.reason}")

    @torch.inference_mode()
    def make(self, prepared: _Prepared) -> Made:
        pixels = [prepared.views[t.size] for t in self.work.teachers] if prepared.views else []
        image = self._embed([partial(_encode_pixels, m) for m in self.models], pixels)
        text = self._embed([m.encode_text for m in self.models], prepared.tokens)
        return list(self._rows(prepared, image, text))

    def _rows(self, prepared: _Prepared, image: Vectors, text: Vectors) -> Iterator[Mapping[str, Any] | Failed]:
        """A value for each row: its part of the vectors of all views (N, D) and of all texts (M, D)."""
        name, counts, at, said = self.work.name, iter(prepared.counts), 0, 0
        for row in prepared.rows:
            if isinstance(row, Failed):
                yield row
                continue
            ends = np.cumsum([said, *next(counts)]).tolist()
            embedded = {f"{name}_image": image[at : at + len(row)]}
            for column, (start, end) in zip(self.work.config.texts, pairwise(ends), strict=True):
                embedded[f"{name}_text_{column}"] = text[start:end]
            at, said = at + len(row), ends[-1]
            if all(np.isfinite(v).all() for v in embedded.values()):
                yield {f"{name}_augment": [to_stored(how) for how in row], **embedded}
            else:
                yield Failed("a teacher's embedding is not finite")

    def _embed(self, encoders: Sequence[Callable[[Tensor], Tensor]], inputs: Sequence[Tensor]) -> Vectors:
        """(N, D): each encoder's embedding of its input, L2-normalised, one beside the other."""
        parts = []
        for encode, whole in zip(encoders, inputs, strict=False):  # no inputs: nothing to embed
            found = []
            for some in torch.split(whole, FORWARD):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                    found.append(encode(some.to(self.device)))
            parts.append(F.normalize(torch.cat(found).float(), dim=-1))
        return torch.cat(parts, 1).half().cpu().numpy() if parts else np.empty((0, 0), np.float16)


def _encode_pixels(model: towers.Model, pixels: Tensor) -> Tensor:
    """(N, 3, S, S) uint8 → (N, D)."""
    preprocess = preprocess_of(model)
    mean, std = (torch.tensor(preprocess[k], device=pixels.device).view(3, 1, 1) for k in ("mean", "std"))
    return model.encode_image((pixels.float() / 255 - mean) / std)
