"""Image–text retrieval: recall at 1, 5 and 10 both ways, with several captions a picture.

A picture is found if any of its captions is among the k nearest texts; a text if its picture is among the k nearest
pictures (big_vision's `image_text_retrieval`, and the Flickr30k/COCO protocol of CLIP). Ties count against us, so that
a collapsed encoder scores nothing.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from cutline import towers
from cutline.config import Config, load
from cutline.errors import DataError
from cutline.objectives.gather import world
from cutline.record import Protocol, Result
from cutline.towers.pictures import test_transform, weights_hash
from cutline.train.device import device_of, process_group
from cutline.train.recipe import Recipe
from cutline.train.stream import open_source
from cutline.zeroshot.encode import embed_pairs
from cutline.zeroshot.nearest import draw_nearest
from cutline.zeroshot.texts import open_joint

KS = (1, 5, 10)
CELLS = 1 << 22  # similarities held at a time


class RetrieveConfig(Config):
    """columns: text columns that hold a picture's captions (None: every caption column of the data, or its alt text);
    max_texts: captions used of a picture; where: a filter of the table; batch: pictures a step; device: "auto" is a GPU
    where there is one."""

    columns: list[str] | None = None
    max_texts: int = Field(5, ge=1)
    where: str | None = None
    batch: int = Field(64, ge=1)
    device: str = "auto"


def recall(
    image: Tensor, text: Tensor, owners: Tensor, ks: tuple[int, ...] = KS, cells: int = CELLS
) -> dict[str, float]:
    """Recalls from embeddings: image (n, D), text (m, D), owners (m,) → {"i2t_r1": …, "t2i_r1": …} in 0…1.

    Memory is a few times `cells` numbers beside the embeddings. Raises `DataError` for embeddings that are not finite.
    """
    if not (torch.isfinite(image).all() and torch.isfinite(text).all()):
        raise DataError("some embeddings are not finite; the model is broken, and no recall can be given.")
    places = torch.arange(len(text))
    ranks = {"i2t": _ranks(image, text, owners, places, cells), "t2i": _ranks(text, image, places, owners, cells)}
    return {f"{way}_r{k}": (found < k).double().mean().item() for way, found in ranks.items() for k in ks}


def _ranks(queries: Tensor, others: Tensor, query: Tensor, other: Tensor, cells: int) -> Tensor:
    """How many negatives are at least as near to each query as its nearest positive; query[p], other[p]: the p-th positive
    pair."""
    order = query.argsort(stable=True)
    query, other = query[order].contiguous(), other[order]
    ranks = []
    for a in range(0, len(queries), step := max(1, cells // len(others))):
        similarity = queries[a : a + step] @ others.T
        first, last = torch.searchsorted(query, torch.tensor([a, a + len(similarity)])).tolist()
        rows = query[first:last] - a
        own = similarity[rows, other[first:last]]
        best = similarity.new_full((len(similarity),), -torch.inf).scatter_reduce(0, rows, own, "amax")
        nearer = (similarity >= best[:, None]).sum(1)
        ranks.append(nearer.index_add(0, rows, -(own >= best[rows]).long()))
    return torch.cat(ranks)


def chance(n: int, owners: Tensor, ks: tuple[int, ...] = KS) -> dict[str, float]:
    """The recalls of a random ranking: 1 − C(m−c, k) / C(m, k) for a picture with c of the m texts; k/n for a text."""
    m, counts = len(owners), torch.bincount(owners, minlength=n).tolist()
    out = {}
    for k in ks:
        out[f"i2t_r{k}"] = sum(1 - math.comb(m - c, k) / math.comb(m, k) if m >= k else 1.0 for c in counts) / n
        out[f"t2i_r{k}"] = min(k / n, 1.0)
    return out


def retrieve(
    model: towers.Model | str, source: Any, config: RetrieveConfig, data: str = "", out: Path | None = None
) -> Result:
    """Score `model` (a model, a run directory or a tag) on every pair of `source` (or what `open_source` takes); on all
    processes of torchrun.

    metrics: recalls in 0…1, `chance_…` beside them, pictures, texts, and texts truncated at the context. Writes
    `out/result.json` and `out/samples.png`. Raises `CutlineError` for a model without a text tower.
    """
    began = time.monotonic()
    with process_group(config.device):
        loaded = open_joint(model, device_of(config.device))
        if isinstance(source, str):
            source, data = open_source(source, config.where), data or source
        columns = config.columns or caption_columns(source)
        embedded = embed_pairs(loaded, source, columns, config.batch, config.max_texts)
        metrics = recall(embedded.image, embedded.text, embedded.owners)
        metrics |= {f"chance_{k}": v for k, v in chance(len(embedded.image), embedded.owners).items()}
        metrics |= {"pictures": len(embedded.image), "texts": len(embedded.text), "truncated": embedded.truncated}
        metrics |= {f"skipped: {reason}": n for reason, n in embedded.skipped.items()}
        settings = {"columns": columns, "max_texts": config.max_texts, "where": config.where, "ks": list(KS),
                    "transform": str(test_transform(loaded)), "hit": "any", "ties": "against"}  # fmt: skip
        protocol = Protocol(
            task="retrieve", data=data, data_fingerprint=source.fingerprint, split=config.where or "all", settings=settings,
            encoder=loaded.name or "model", encoder_hash=weights_hash(loaded),
        )  # fmt: skip
        result = Result(metrics=metrics, protocol=protocol, seconds=time.monotonic() - began)
        if out is not None and world()[0] == 0:
            draw_nearest(out / "samples.png", source, embedded)
            result.write(out)
    return result


def caption_columns(source: Any) -> list[str]:
    """The caption columns of a source: those named caption…, or else the alt text."""
    found = [c for c in source.columns if c.startswith("caption")]
    if not found and "alt" in source.columns:
        found = ["alt"]
    if not found:
        raise DataError(f"no caption column found among {', '.join(source.columns)}; name one with columns=[NAME].")
    return found


def held_out(model: str, data: str) -> tuple[bool, str | None]:
    """Whether `model` (a run directory) was trained on the table `data`, and the filter of what it has not seen of it."""
    recipe = Path(model) / "recipe.yaml"
    if not recipe.exists():
        return False, None
    trained = load(Recipe, recipe).data
    same = trained.pairs == data or (
        Path(trained.pairs).exists() and Path(trained.pairs).resolve() == Path(data).resolve()
    )
    return same, f"NOT ({trained.where})" if same and trained.where else None
