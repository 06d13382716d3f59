"""COCO's average precision written out plainly, to compare the library's with."""

from typing import Any

import numpy as np

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREAS = {"ap": (0, 1e10), "ap_small": (0, 32**2), "ap_medium": (32**2, 96**2), "ap_large": (96**2, 1e10)}


def overlaps(found: Any, truth: Any, crowd: Any) -> np.ndarray:
    """IoU (N, M) of boxes, or of masks; of a crowd the share of the prediction that lies in it."""
    if found.ndim == 3:
        both = np.einsum("nhw,mhw->nm", found.astype(float), truth.astype(float))
        sizes, others = found.sum((1, 2)), truth.sum((1, 2))
    else:
        corner, far = np.maximum(found[:, None, :2], truth[:, :2]), np.minimum(found[:, None, 2:], truth[:, 2:])
        both = np.prod(np.clip(far - corner, 0, None), 2)
        sizes, others = np.prod(found[:, 2:] - found[:, :2], 1), np.prod(truth[:, 2:] - truth[:, :2], 1)
    return both / np.where(crowd, sizes[:, None], sizes[:, None] + others - both)


def matched(truth: Any, found: Any, label: int, area: tuple[float, float], threshold: float, masks: bool) -> Any:
    """Of one picture and class: score, hit or not, and counts or not, of each prediction; and how many truths count."""
    of, by = truth.labels == label, found["labels"] == label
    order = np.argsort(-found["scores"][by], kind="mergesort")[:100]
    what = found["masks" if masks else "boxes"][by][order]
    ignored = truth.crowd[of] | (truth.areas[of] < area[0]) | (truth.areas[of] > area[1])
    first = np.argsort(ignored, kind="mergesort")  # those that count come first
    ignored, crowd = ignored[first], truth.crowd[of][first]
    table = overlaps(what.astype(float), (truth.masks if masks else truth.boxes)[of][first].astype(float), crowd)
    sizes = what.sum((1, 2)) if masks else np.prod(what[:, 2:] - what[:, :2], 1)
    taken, hits, counts = np.zeros(len(ignored), bool), [], []
    for row, size in zip(table, sizes):
        best, at = min(threshold, 1 - 1e-10), -1
        for m in range(len(ignored)):
            if taken[m] and not crowd[m]:
                continue
            if at >= 0 and not ignored[at] and ignored[m]:
                break
            if row[m] >= best:
                best, at = row[m], m
        hits.append(at >= 0)
        counts.append(not ignored[at] if at >= 0 else area[0] <= size <= area[1])
        if at >= 0:
            taken[at] = True
    return found["scores"][by][order], np.array(hits, bool), np.array(counts, bool), int((~ignored).sum())


def precision(pictures: list[Any], label: int, area: tuple[float, float], threshold: float, masks: bool) -> float:
    """Area under the curve of one class at one IoU; NaN without truths."""
    parts = [matched(truth, found, label, area, threshold, masks) for truth, found in pictures]
    total = sum(p[3] for p in parts)
    if not total:
        return float("nan")
    scores, hits, counts = (np.concatenate([p[k] for p in parts]) for k in range(3))
    order = np.argsort(-scores, kind="mergesort")
    hits = hits[order][counts[order]]
    true = np.cumsum(hits)
    share = true / np.arange(1, len(hits) + 1) if len(hits) else np.zeros(0)
    share = np.maximum.accumulate(share[::-1])[::-1]
    at = np.searchsorted(true / total, RECALLS)
    return float(np.mean([share[i] if i < len(share) else 0 for i in at]))


def average_precision(pictures: list[Any], classes: int, masks: bool = False) -> dict[str, float]:
    """ap, ap50, ap75, ap_small, ap_medium, ap_large of pairs (objects, predictions); those without objects left out."""
    found = {}
    for name, area in AREAS.items():
        table = np.array([[precision(pictures, k, area, iou, masks) for iou in IOUS] for k in range(classes)])
        found[name] = table
    whole = found["ap"]
    tables = {"ap": whole, "ap50": whole[:, :1], "ap75": whole[:, 5:6], **{k: found[k] for k in list(AREAS)[1:]}}
    return {name: float(np.nanmean(t)) for name, t in tables.items() if not np.isnan(t).all()}
