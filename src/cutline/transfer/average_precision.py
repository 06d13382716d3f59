"""COCO's average precision of boxes and masks, computed by faster-coco-eval from predictions gathered picture by picture.

AP is the mean over IoU 0.50, 0.55 … 0.95 and classes of the area under the precision–recall curve at 101 recalls; AP50
and AP75 at one IoU; small, medium and large objects are below 32², below 96² and above, by the areas of the data. At
most 100 predictions of a picture count. Masks are kept as run lengths.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cutline.errors import DataError
from cutline.objectives.gather import of_all
from cutline.transfer import masks
from cutline.transfer.objects import Objects

NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


class AveragePrecision:
    """Gathers pictures with `update`; `scores` and `by_class` are then shares of 1. with_masks: of masks, too."""

    def __init__(self, classes: Sequence[str], with_masks: bool) -> None:
        self.classes, self.with_masks = list(classes), with_masks
        self.truth: list[dict[str, Any]] = []
        self.found: dict[str, list[dict[str, Any]]] = {"bbox": [], "segm": []}
        self.pictures = 0
        self.sizes: dict[int, list[int]] = {}  # height and width of pictures with masks, which the library asks for

    def update(self, truth: Objects, found: dict[str, NDArray[Any]]) -> None:
        """Add a picture: its objects, and predictions as `Detector.predict` gives them."""
        self.pictures += 1
        runs = masks.encode(truth.masks) if self.with_masks and truth.masks is not None else None
        for i, box in enumerate(_sides(truth.boxes)):
            row = self._row(truth.labels[i]) | {"bbox": box, "area": float(truth.areas[i])}
            row |= {"iscrowd": int(truth.crowd[i])}
            self.truth.append(row | ({"segmentation": runs[i]} if runs is not None else {}))
        rows = [self._row(k) | {"score": float(s)} for k, s in zip(found["labels"], found["scores"], strict=True)]
        self.found["bbox"] += [row | {"bbox": box} for row, box in zip(rows, _sides(found["boxes"]), strict=True)]
        if self.with_masks:
            # Without their boxes, so that a prediction's area is that of its mask.
            found_runs = masks.encode(found["masks"]) if rows else []
            if every := [*(runs or []), *found_runs]:
                self.sizes[self.pictures] = every[0]["size"]
            self.found["segm"] += [row | {"segmentation": r} for row, r in zip(rows, found_runs, strict=True)]

    def _row(self, label: int) -> dict[str, Any]:
        return {"image_id": self.pictures, "category_id": int(label) + 1}

    def join(self) -> None:
        """Put together the pictures of all processes, in rank order."""
        parts = of_all((self.pictures, self.truth, self.found, self.sizes))
        self.pictures, self.truth, self.found, self.sizes = 0, [], {"bbox": [], "segm": []}, {}
        for pictures, truth, found, sizes in parts:
            before = self.pictures
            self.truth += [row | {"image_id": row["image_id"] + before} for row in truth]
            for kind, rows in found.items():
                self.found[kind] += [row | {"image_id": row["image_id"] + before} for row in rows]
            self.sizes |= {i + before: size for i, size in sizes.items()}
            self.pictures += pictures

    def scores(self) -> dict[str, float]:
        """ap, ap50, ap75, and ap_small, ap_medium and ap_large where there are such objects; mask_ap and so on."""
        scores, self.class_ap = self._evaluate("bbox")
        if self.with_masks:
            of_masks, self.class_mask_ap = self._evaluate("segm")
            scores |= {f"mask_{name}": value for name, value in of_masks.items()}
        return scores

    def by_class(self) -> dict[str, dict[str, float]]:
        """AP by class, of classes that occur in the truth; after `scores`."""
        return {"ap": self.class_ap} | ({"mask_ap": self.class_mask_ap} if self.with_masks else {})

    def dataset(self) -> dict[str, Any]:
        """The truth as COCO's JSON has it; the predictions are `found`."""
        return {
            "images": [
                {"id": i} | dict(zip(("height", "width"), self.sizes.get(i, []))) for i in range(1, self.pictures + 1)
            ],
            "categories": [{"id": k + 1, "name": name} for k, name in enumerate(self.classes)],
            "annotations": [row | {"id": i} for i, row in enumerate(self.truth, 1)],  # 0 would mean "no match"
        }

    def _evaluate(self, kind: str) -> tuple[dict[str, float], dict[str, float]]:
        if all(row["iscrowd"] for row in self.truth):
            raise DataError("the scored pictures have no objects, so there is no average precision. Score others.")
        COCO, COCOeval = coco_library()
        truth = COCO(self.dataset())
        if not self.found[kind]:  # the library takes no empty list
            occur = {self.classes[row["category_id"] - 1] for row in self.truth if not row["iscrowd"]}
            return dict.fromkeys(NAMES[:3], 0.0), {name: 0.0 for name in self.classes if name in occur}
        evaluation = COCOeval(truth, truth.loadRes(self.found[kind]), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        scores = {name: float(v) for name, v in zip(NAMES, evaluation.stats) if v >= 0}  # -1: no such objects
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoUs, recalls, classes), of all areas, 100 each
        each = {
            name: precision[:, :, k].mean() for k, name in enumerate(self.classes) if (precision[:, :, k] >= 0).all()
        }
        return scores, {name: float(value) for name, value in each.items()}


def _sides(boxes: NDArray[Any]) -> list[list[float]]:
    """Corners (N, 4) to COCO's x, y, width, height."""
    corners = np.asarray(boxes, np.float64)
    sides: list[list[float]] = np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]]).tolist()
    return sides


def coco_library() -> tuple[Any, Any]:
    """faster-coco-eval's `COCO` and `COCOeval_faster`; raises `DataError` if the package is missing."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as e:
        raise DataError("average precision needs the package faster-coco-eval: `pip install faster-coco-eval`.") from e
    return COCO, COCOeval_faster
