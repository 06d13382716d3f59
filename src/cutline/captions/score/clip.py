"""Scores of a caption against its picture, and against other texts of the row, by a CLIP.

With unit embeddings v of the picture, c of the caption, r of the references and a of the alt text:

clip        CLIPScore (Hessel et al., 2104.08718): 2.5 · max(v·c, 0)
refclip     RefCLIPScore (ibid.): the harmonic mean of CLIPScore and max(max_r c·r, 0)
cosine      v·c as it is, the score by which DataComp filters (2304.14108); of −1 … 1
alt_cosine  c·a: how near the caption is to the alt text, which says whether it tells something else

As in the paper and its code, captions and references are embedded behind "A photo depicts " for the first two; the
other two take the texts alone. A picture is embedded once for all its captions and scores, a text once in a batch.
Texts longer than the tower's context are cut, as the tower cuts them in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from cutline import towers
from cutline.captions.score.base import Asked, listed, provenance, text_model
from cutline.captions.work import Failed, Made, Row, Worker, picture_of
from cutline.pairs import Provenance

KINDS = dict.fromkeys(("clip", "refclip", "cosine", "alt_cosine"), pa.float32())
PROMPT = "A photo depicts "
WEIGHT = 2.5  # of the paper
TEXTS = 256  # embedded at a time


@dataclass(frozen=True)
class ClipScores:
    """The scores above as one `Work`. reference, alt: columns of text that refclip and alt_cosine compare with."""

    asked: Asked
    model: str
    revision: str = ""
    reference: str | None = None
    alt: str = "alt"
    prompt: str = PROMPT
    device: str = "auto"

    @property
    def pictured(self) -> bool:
        return bool({"clip", "refclip", "cosine"} & set(self.asked.names))

    @property
    def reads(self) -> list[str]:
        columns = ["image"] if self.pictured else []
        columns += [self.asked.column]
        columns += [self.reference] if self.reference and "refclip" in self.asked.names else []
        columns += [self.alt] if "alt_cosine" in self.asked.names else []
        return list(dict.fromkeys(columns))

    @property
    def writes(self) -> dict[str, pa.DataType]:
        return self.asked.writes(KINDS)

    def provenance(self) -> Provenance:
        settings = {"weights": self.revision, "prompt": self.prompt}
        return provenance(self.asked, self.reads, self.model, **settings)

    def load(self) -> Worker:
        return _ClipWorker(self)


class _Batch(NamedTuple):
    """A batch without repeated texts.

    places: of each row's captions (see `Asked.texts`); rows: of each caption its row; pictures: of the rows, None where
    nothing is to be scored; tokens: of the different texts. The rest are places among those texts: of each caption with
    the prompt and without, and of what each row has to compare with, by score.
    """

    places: list[list[int]]
    rows: list[int]
    pictures: list[Tensor | Failed | None]
    tokens: Tensor
    prompted: list[int]
    plain: list[int]
    others: dict[str, list[list[int]]]


class _ClipWorker(Worker):
    def __init__(self, work: ClipScores) -> None:
        from cutline.towers.pictures import test_transform
        from cutline.train.device import device_of

        self.work, self.asked, self.names = work, work.asked, set(work.asked.names)
        self.device = device_of(work.device)
        self.model = text_model(work.model, self.device).eval()
        self.transform, self.tokenizer = test_transform(self.model), towers.Tokenizer(self.model)

    def prepare(self, rows: list[Row]) -> _Batch:
        texts, places = self.asked.texts(rows)
        owners = [i for i, mine in enumerate(places) for p in mine if p >= 0]
        scored = set(owners) if self.work.pictured else set()
        unique: dict[str, int] = {}

        def embed(texts: list[str], prompt: str = "") -> list[int]:
            return [unique.setdefault(prompt + t, len(unique)) for t in texts]

        def compare(column: str, prompt: str = "") -> list[list[int]]:
            return [embed([t for t in listed(row[column]) if t and not t.isspace()], prompt) for row in rows]

        others: dict[str, list[list[int]]] = {}
        if "refclip" in self.names and self.work.reference:
            others["refclip"] = compare(self.work.reference, self.work.prompt)
        if "alt_cosine" in self.names:
            others["alt_cosine"] = compare(self.work.alt)
        prompted = embed(texts, self.work.prompt) if self.names & {"clip", "refclip"} else []
        plain = embed(texts) if self.names & {"cosine", "alt_cosine"} else []
        pictures = [self._picture(row) if i in scored else None for i, row in enumerate(rows)]
        return _Batch(places, owners, pictures, self.tokenizer(list(unique)), prompted, plain, others)

    def _picture(self, row: Row) -> Tensor | Failed:
        picture = picture_of(row)
        return picture if isinstance(picture, Failed) else self.transform(picture)

    @torch.no_grad()
    def make(self, prepared: _Batch) -> Made:
        batch, values = prepared, dict[str, list[Any]]()
        text = self._embed_texts(batch.tokens)  # (different texts, D)
        prompted, plain = text[batch.prompted], text[batch.plain]  # (captions, D)
        image = self._embed_pictures(batch.pictures, text.shape[1])[batch.rows]  # (captions, D)
        if batch.prompted:
            values["clip"] = (WEIGHT * (image * prompted).sum(1).clamp(min=0)).tolist()
        if "refclip" in batch.others:
            nearest = _nearest(prompted, text, batch, "refclip")
            both = zip(values.get("clip", []), nearest, strict=True)
            values["refclip"] = [None if r is None else harmonic_mean(c, max(r, 0.0)) for c, r in both]
        if "cosine" in self.names:
            values["cosine"] = (image * plain).sum(1).tolist()
        if "alt_cosine" in batch.others:
            values["alt_cosine"] = _nearest(plain, text, batch, "alt_cosine")
        made = self.asked.made({n: values.get(n, []) for n in self.names}, batch.places)
        return [p if isinstance(p, Failed) else m for p, m in zip(batch.pictures, made, strict=True)]

    def _embed_texts(self, tokens: Tensor) -> Tensor:
        embedded = [torch.zeros(0, 1)]
        for start in range(0, len(tokens), TEXTS):
            some = self.tokenizer.trimmed(tokens[start : start + TEXTS]).to(self.device)
            embedded.append(self.model.encode_text(some, normalize=True).float().cpu())
        return torch.cat(embedded[1:] or embedded)

    def _embed_pictures(self, pictures: Sequence[Tensor | Failed | None], width: int) -> Tensor:
        """(rows, D), zeros for a row without a picture."""
        out = torch.zeros(len(pictures), width)
        have = [i for i, p in enumerate(pictures) if isinstance(p, Tensor)]
        if have:
            stacked = torch.stack([p for p in pictures if isinstance(p, Tensor)]).to(self.device)
            out[have] = self.model.encode_image(stacked, normalize=True).float().cpu()
        return out


def _nearest(captions: Tensor, text: Tensor, batch: _Batch, score: str) -> list[float | None]:
    """For each caption the largest cosine to a text of its row in another column; None where there is none."""
    others = [batch.others[score][row] for row in batch.rows]
    return [float((text[o] @ c).max()) if o else None for c, o in zip(captions, others, strict=True)]


def harmonic_mean(a: float, b: float) -> float:
    """2 a b / (a + b) of two numbers that are not negative; 0 where both are 0."""
    return 2 * a * b / (a + b) if a + b > 0 else 0.0
