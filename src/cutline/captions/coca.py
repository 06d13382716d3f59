"""Captions by a CoCa: `cutline caption write PAIRS --with CAPTIONER`, for one of ours or any of open_clip's.

DataCompDR's own were written so (MobileCLIP, 2311.17049): `coca_ViT-L-14:mscoco_finetuned_laion2b_s13b_b90k`, five
captions a picture, top_p 0.9, cut at the first full stop. The cut is an option here: a caption may have two sentences.
"""

import json
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PrivateAttr

from cutline import towers
from cutline.captions.decode import CocaDecoder, Decoding
from cutline.captions.work import Failed, Made, Row, Worker, picture_of
from cutline.config import Config
from cutline.errors import ConfigError, DataError
from cutline.pairs import Provenance
from cutline.towers.pictures import test_transform, weights_hash
from cutline.towers.store import model_folder
from cutline.train.device import device_of

VOCABULARY = "vocabulary.json"  # in the folder of a captioner of ours: the token ids it was trained to write


class CocaWriter(Config):
    """A `Work` that writes a column of captions.

    model: a captioner's folder, "ARCHITECTURE:TAG" of open_clip, "hf-hub:…". num: captions for each row; with more than
    one the column holds lists, in which equal ones stand once. temperature: 0 is greedy; None is 0 for one caption and 1
    for several. first_sentence: cut at the first full stop. seed: of all that is drawn. The rest is `decode.Decoding`.
    """

    model: str = Field(min_length=1)
    column: str = Field(min_length=1)
    num: int = Field(1, ge=1)
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float = Field(0.9, gt=0, le=1)
    min_tokens: int = Field(3, ge=0)
    max_tokens: int = Field(64, ge=1)
    no_repeat_ngram: int = Field(4, ge=0)
    repetition_penalty: float = Field(1.0, ge=1)
    first_sentence: bool = False
    seed: int = 0
    device: str = "auto"
    _hash: str = PrivateAttr("")

    def __init__(self, model: str, column: str, **options: Any) -> None:
        super().__init__(**{"model": model, "column": column, **options})

    def model_post_init(self, context: Any) -> None:
        if self.num > 1 and not self.decoding().temperature:
            raise ConfigError(
                f"num={self.num} captions with temperature=0 are the same one again. Take one, or a temperature above 0."
            )

    @property
    def reads(self) -> list[str]:
        return ["image"]

    @property
    def writes(self) -> Mapping[str, str]:
        return {self.column: "list<string>" if self.num > 1 else "string"}

    def decoding(self) -> Decoding:
        values = {name: getattr(self, name) for name in Decoding.model_fields}
        return Decoding(
            **values | {"temperature": float(self.num > 1) if self.temperature is None else self.temperature}
        )

    def provenance(self) -> Provenance:
        """With the hash of the weights, for which the model is loaded once."""
        if not self._hash:
            self._hash = weights_hash(towers.load(self.model))
        how = self.decoding().model_dump()
        drawn = {"seed": self.seed} if how["temperature"] else {}
        name = Path(self.model).resolve().name if Path(self.model).is_dir() else self.model
        return Provenance(
            how="caption write", model=f"coca:{name} {self._hash}", sampling={"num": self.num, **how, **drawn},
            inputs=["image"], settings={"first_sentence": self.first_sentence},
        )  # fmt: skip

    def load(self) -> "CocaWorker":
        return CocaWorker(self)


class CocaWorker(Worker):
    """The model on its device. A picture that does not decode, and a caption without a word, are `Failed`."""

    def __init__(self, work: CocaWriter) -> None:
        self.work, self.tokens = work, 0
        self.device = device_of(work.device)
        model = towers.load(work.model, self.device)
        self.decoder = CocaDecoder(model, work.decoding(), read_vocabulary(work.model))
        self.transform, self.tokenizer = test_transform(model), towers.Tokenizer(model).tokenizer

    def prepare(self, rows: list[Row]) -> tuple[list[Row], list[Failed | None], torch.Tensor | None]:
        """Rows, why some have no picture, and the pictures of the others, (B, 3, S, S)."""
        pictures = [picture_of(row) for row in rows]
        failed = [p if isinstance(p, Failed) else None for p in pictures]
        ready = [self.transform(p) for p in pictures if not isinstance(p, Failed)]
        return rows, failed, torch.stack(ready) if ready else None

    def make(self, prepared: tuple[list[Row], list[Failed | None], torch.Tensor | None]) -> Made:
        rows, failed, images = prepared
        keys = [str(row["key"]) for row, reason in zip(rows, failed, strict=True) if reason is None]
        written: list[list[list[int]]] = []
        if images is not None:
            with half(self.device):
                written = self.decoder(images.to(self.device), keys, self.work.num, self.work.seed)
        captions = iter(written)
        return [self._value(next(captions)) if reason is None else reason for reason in failed]

    def _value(self, captions: list[list[int]]) -> dict[str, str | list[str]] | Failed:
        self.tokens += sum(map(len, captions))
        texts = [plain(self.tokenizer.decode(ids)) for ids in captions]
        if self.work.first_sentence:
            texts = [text.split(".")[0].strip() for text in texts]
        texts = list(dict.fromkeys(text for text in texts if any(c.isalnum() for c in text)))
        if not texts:
            return Failed("empty caption")
        return {self.work.column: texts if self.work.num > 1 else texts[0]}


def half(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 autocast on a GPU that has it, and nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and torch.cuda.is_bf16_supported())


def read_vocabulary(model: str) -> list[int] | None:
    """The token ids that a captioner of ours was trained to write, None for other models. Raises `DataError`."""
    folder = model_folder(model)
    path = folder.parent / VOCABULARY if folder is not None and folder.name == "model" else None
    if path is None or not path.is_file():
        return None
    try:
        return [int(i) for i in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as e:
        raise DataError(f"{str(path)!r} is no list of token ids: {e}. Train the captioner again.") from e


_SPACES = [
    (re.compile(r"(?<=\d) (?=\d)"), ""),  # CLIP's tokeniser cuts numbers into digits
    (re.compile(r"(?<=\d) ([.,:/]) (?=\d)"), r"\1"),
    (re.compile(r"(?<=\w) ([-’]) (?=\w)"), r"\1"),
    (re.compile(r" ('(?:s|t|re|ve|m|ll|d))\b"), r"\1"),
    (re.compile(r" ([.,;:!?%)\]}…])"), r"\1"),
    (re.compile(r"([(\[{$#]) "), r"\1"),
]


def plain(text: str) -> str:
    """What CLIP's tokeniser gives back ("a boy ' s t - shirt ."), spaced as people write ("a boy's t-shirt.")."""
    text = " ".join(text.split())
    for pattern, by in _SPACES:
        text = pattern.sub(by, text)
    return text
