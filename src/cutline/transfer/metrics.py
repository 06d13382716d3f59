"""Scores of predictions, gathered picture by picture in constant memory.

`Confusion` gives IoU, accuracy and their means over the whole set (one confusion matrix). `DepthErrors` gives the usual
depth figures per picture and averages them over pictures, as the MIM protocol does (2205.13543); averaging over pixels
instead gives other numbers, so the protocol of a result says which was used.
"""

import torch
from torch import Tensor

from cutline.objectives.gather import of_all

IGNORE = -1  # the label of pixels that do not count, in every target of this package


class Confusion:
    """Confusion matrix of `classes` classes: rows truth, columns prediction; pixels of truth `IGNORE` do not count."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.matrix = torch.zeros(classes, classes, dtype=torch.int64)

    def update(self, predicted: Tensor, truth: Tensor) -> None:
        """Add pixels; two integer tensors of one shape, truth in [0, classes) or `IGNORE`."""
        # Counted with a row of its own for `IGNORE`, -1, which is cheaper than taking those pixels out.
        index = (truth.int() + 1) * self.classes + predicted.int()
        counts = torch.bincount(index.flatten(), minlength=(self.classes + 1) * self.classes)
        self.matrix += counts.reshape(self.classes + 1, self.classes)[1:].cpu()

    def join(self) -> None:
        """Add up what all processes have counted."""
        self.matrix = torch.stack(of_all(self.matrix)).sum(0)

    def iou(self) -> Tensor:
        """Intersection over union by class (classes,), NaN for a class neither in the truth nor predicted."""
        hits = self.matrix.diag().double()
        return hits / (self.matrix.sum(0) + self.matrix.sum(1) - hits)

    def scores(self) -> dict[str, float]:
        """miou over classes in truth or prediction, macc over classes in the truth, and pixel accuracy; shares of 1."""
        hits, truth = self.matrix.diag().double(), self.matrix.sum(1)
        return {
            "miou": self.iou().nanmean().item(),
            "macc": (hits / truth)[truth > 0].mean().item(),
            "accuracy": (hits.sum() / truth.sum()).item(),
        }


class Hits:
    """Whether the true class of a picture is the first guess, and among the first five; counted by class."""

    def __init__(self, classes: int) -> None:
        self.first, self.five, self.truth = (torch.zeros(classes, dtype=torch.int64) for _ in range(3))

    def update(self, scores: Tensor, truth: Tensor) -> None:
        """Add pictures: scores (B, K), the higher the likelier; truth (B,) class ids."""
        best = scores.topk(min(5, scores.shape[1]), dim=1).indices == truth[:, None]
        classes = len(self.truth)
        self.truth += torch.bincount(truth, minlength=classes).cpu()
        self.first += torch.bincount(truth[best[:, 0]], minlength=classes).cpu()
        self.five += torch.bincount(truth[best.any(1)], minlength=classes).cpu()

    def join(self) -> None:
        """Add up what all processes have counted."""
        self.first, self.five, self.truth = (torch.stack(of_all(x)).sum(0) for x in (self.first, self.five, self.truth))

    def accuracy(self) -> Tensor:
        """Share of each class's pictures that is told (K,), NaN for a class without a picture."""
        return self.first.double() / self.truth

    def scores(self) -> dict[str, float]:
        """top1 and top5 over pictures (top5 only where there are more than five classes), and mean_class, the mean of
        the classes' own accuracies over classes with a picture; shares of 1."""
        total = self.truth.sum().item()
        five = {"top5": self.five.sum().item() / total} if len(self.truth) > 5 else {}
        return {"top1": self.first.sum().item() / total, **five, "mean_class": self.accuracy().nanmean().item()}


def depth_errors(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Errors of one picture's valid pixels, two positive 1-d tensors in metres.

    rmse in metres, absrel = mean |p - t| / t, sqrel = mean (p - t)² / t, rmse_log and log10 of the logarithms,
    deltak = share of pixels with max(p / t, t / p) < 1.25^k, silog = 100 · standard deviation of log p - log t
    (Eigen et al., 1406.2283).
    """
    p, t = predicted.double(), truth.double()
    ratio = torch.maximum(p / t, t / p)
    log = p.log() - t.log()
    errors = {
        "rmse": (p - t).square().mean().sqrt(),
        "absrel": ((p - t).abs() / t).mean(),
        "sqrel": ((p - t).square() / t).mean(),
        "rmse_log": log.square().mean().sqrt(),
        "log10": (p.log10() - t.log10()).abs().mean(),
        "silog": 100 * (log.square().mean() - log.mean().square()).clamp_min(0).sqrt(),
        "delta1": (ratio < 1.25).double().mean(),
        "delta2": (ratio < 1.25**2).double().mean(),
        "delta3": (ratio < 1.25**3).double().mean(),
    }
    return {k: v.item() for k, v in errors.items()}


class DepthErrors:
    """Mean over pictures of `depth_errors`; pictures without a single valid pixel do not count."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.pictures = 0

    def update(self, predicted: Tensor, truth: Tensor, valid: Tensor) -> None:
        """Add one picture: prediction and truth (H, W) in metres, and which pixels count."""
        if not valid.any():
            return
        for name, value in depth_errors(predicted[valid], truth[valid]).items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.pictures += 1

    def join(self) -> None:
        """Add up what all processes have gathered."""
        parts = of_all((self.sums, self.pictures))
        self.sums = {name: sum(sums.get(name, 0.0) for sums, _ in parts) for sums, _ in parts for name in sums}
        self.pictures = sum(pictures for _, pictures in parts)

    def scores(self) -> dict[str, float]:
        return {k: v / self.pictures for k, v in self.sums.items()}
