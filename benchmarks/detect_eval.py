"""How long scoring the predictions of COCO's 5,000 validation pictures takes, beside pycocotools where it is installed.

    python benchmarks/detect_eval.py [--pictures 5000] [--found 100] [--masks]

Predictions are made up: each object with a jittered box and a random score, and random boxes up to `--found` a picture,
of 80 classes, in pictures of 480 × 640. Prints seconds of gathering (run lengths of masks among them) and of the
scores, and the largest difference of the six figures from pycocotools.
"""

import argparse
import time
from typing import Any

import numpy as np

from cutline.transfer.average_precision import NAMES, AveragePrecision
from cutline.transfer.objects import Objects

HEIGHT, WIDTH, CLASSES, OBJECTS = 480, 640, 80, 7  # 36,781 objects in COCO's 5,000


def boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random corners (count, 4) float32 of sizes from some 10 to some 300 pixels."""
    sides = np.exp(rng.uniform(np.log(10), np.log(300), (count, 2)))
    corner = rng.uniform(0, 1, (count, 2)) * (np.array([WIDTH, HEIGHT]) - sides)
    return np.hstack([corner, corner + sides]).astype(np.float32)


def filled(corners: np.ndarray) -> np.ndarray:
    """Masks (N, H, W) of ellipses in boxes."""
    y, x = np.arange(HEIGHT)[:, None] + 0.5, np.arange(WIDTH) + 0.5
    middle, half = (corners[:, :2] + corners[:, 2:]) / 2, (corners[:, 2:] - corners[:, :2]) / 2
    away = ((x - middle[:, 0, None, None]) / half[:, 0, None, None]) ** 2
    return away + ((y - middle[:, 1, None, None]) / half[:, 1, None, None]) ** 2 <= 1


def picture(rng: np.random.Generator, found: int, masks: bool) -> tuple[Objects, dict[str, Any]]:
    """The objects of one picture and what a detector might find."""
    n = int(rng.poisson(OBJECTS))
    corners, labels = boxes(rng, n), rng.integers(0, CLASSES, n)
    near = corners + rng.normal(0, 3, corners.shape).astype(np.float32)
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    all_boxes = np.vstack([near, boxes(rng, max(0, found - n))])[:found]
    all_labels = np.concatenate([labels, rng.integers(0, CLASSES, max(0, found - n))])[:found]
    one = {"boxes": all_boxes, "labels": all_labels, "scores": rng.random(found).astype(np.float32)}
    if masks:
        one["masks"] = filled(all_boxes)
    areas = np.prod(corners[:, 2:] - corners[:, :2], 1)
    return Objects(corners, labels, np.zeros(n, bool), areas, filled(corners) if masks else None), one


def theirs(gathered: AveragePrecision, kind: str) -> list[float]:
    """pycocotools on the same dictionaries."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    truth.dataset = gathered.dataset()
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(gathered.found[kind]), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [float(v) for v in evaluation.stats[:6]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--found", type=int, default=100)
    parser.add_argument("--masks", action="store_true")
    args = parser.parse_args()
    rng, gathering = np.random.default_rng(0), 0.0
    gathered = AveragePrecision([str(k) for k in range(CLASSES)], args.masks)
    for _ in range(args.pictures):
        truth, found = picture(rng, args.found, args.masks)
        begun = time.perf_counter()
        gathered.update(truth, found)
        gathering += time.perf_counter() - begun
    begun = time.perf_counter()
    scores = gathered.scores()
    scoring = time.perf_counter() - begun
    print(f"{args.pictures} pictures, {args.found} predictions each, {'boxes and masks' if args.masks else 'boxes'}")
    print(f"gathering {gathering:.1f} s, scores {scoring:.1f} s; ap {scores['ap']:.4f}")
    try:
        import pycocotools  # noqa: F401
    except ImportError:
        print("pycocotools is not installed, so nothing to compare with")
        return
    for kind, prefix in (("bbox", ""), ("segm", "mask_"))[: 1 + args.masks]:
        begun = time.perf_counter()
        peer = theirs(gathered, kind)
        seconds = time.perf_counter() - begun
        ours = [scores.get(prefix + name, -1.0) for name in NAMES]
        print(f"pycocotools {kind}: {seconds:.1f} s, largest difference {np.abs(np.subtract(ours, peer)).max():.1e}")


if __name__ == "__main__":
    main()
