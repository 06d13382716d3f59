"""Dense metrics against reference values, torchmetrics and plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from cutline.transfer.depth import gradient_loss, silog
from cutline.transfer.metrics import IGNORE, Confusion, DepthErrors, depth_errors


def test_miou_reference_values() -> None:
    c = Confusion(3)
    truth = torch.tensor([[0, 0, 1, 1], [0, 2, 2, IGNORE], [1, 1, 2, IGNORE]])
    c.update(torch.tensor([[0, 1, 1, 1], [0, 2, 0, 2], [1, 2, 2, 0]]), truth)
    assert c.iou().tolist() == pytest.approx([0.5, 0.6, 0.5])
    assert c.scores()["miou"] == pytest.approx(0.5333333333)
    assert c.scores()["accuracy"] == pytest.approx(0.7)


def test_miou_of_the_corenet_case() -> None:
    c = Confusion(2)
    c.update(torch.tensor([[1, 0, 1], [0, 1, 1]]), torch.tensor([[0, 0, 0], [0, 1, 1]]))
    assert c.iou().tolist() == pytest.approx([0.5, 0.5])


def test_a_class_nobody_has_does_not_count_and_a_class_only_predicted_does() -> None:
    c = Confusion(4)
    c.update(torch.tensor([0, 0, 3]), torch.tensor([0, 1, 0]))  # class 2 is nowhere, class 3 only predicted
    iou = c.iou()
    assert math.isnan(iou[2])
    assert c.scores()["miou"] == pytest.approx((1 / 3 + 0 + 0) / 3)
    assert c.scores()["macc"] == pytest.approx((1 / 2 + 0) / 2)  # over classes in the truth


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**31))
def test_confusion_agrees_with_torchmetrics_and_with_a_loop(classes: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    predicted = torch.randint(0, classes, (3, 5, 7), generator=g)
    truth = torch.randint(-1, classes, (3, 5, 7), generator=g)
    ours = Confusion(classes)
    for p, t in zip(predicted, truth):
        ours.update(p, t)
    loop = np.zeros((classes, classes), int)
    for p, t in zip(predicted.flatten().tolist(), truth.flatten().tolist()):
        if t != IGNORE:
            loop[t, p] += 1
    assert (ours.matrix.numpy() == loop).all()
    theirs = MulticlassJaccardIndex(classes, ignore_index=IGNORE)(predicted, truth)
    assert ours.scores()["miou"] == pytest.approx(theirs.item(), abs=1e-6)
    accuracy = MulticlassAccuracy(classes, average="micro", ignore_index=IGNORE)(predicted, truth)
    assert ours.scores()["accuracy"] == pytest.approx(accuracy.item(), abs=1e-6)


def test_depth_reference_values() -> None:
    e = depth_errors(torch.tensor([1.1, 1.8, 5.2, 8.8]), torch.tensor([1.0, 2.0, 4.0, 8.0]))
    expected = {
        "delta1": 0.75, "delta2": 1.0, "delta3": 1.0, "absrel": 0.15, "sqrel": 0.1175, "rmse": 0.729726,
        "rmse_log": 0.156608, "log10": 0.060622, "silog": 13.028169,
    }  # fmt: skip
    assert e == pytest.approx(expected, abs=1e-6)


def test_depth_is_averaged_over_pictures_not_pixels() -> None:
    errors = DepthErrors()
    truth = torch.full((2, 2), 2.0)
    one = torch.tensor([[True, False], [False, False]])
    errors.update(truth + 1, truth, torch.ones(2, 2, dtype=torch.bool))
    errors.update(truth + 3, truth, one)
    errors.update(truth + 9, truth, torch.zeros(2, 2, dtype=torch.bool))  # no reading: does not count
    assert errors.pictures == 2
    assert errors.scores()["rmse"] == pytest.approx((1 + 3) / 2)


def test_silog_is_the_formula_over_valid_pixels() -> None:
    rng = np.random.default_rng(0)
    p, t = rng.uniform(0.5, 9, (2, 4, 5)), rng.uniform(0.5, 9, (2, 4, 5))
    valid = rng.random((2, 4, 5)) < 0.7
    d = np.log(p[valid]) - np.log(t[valid])
    expected = math.sqrt((d**2).mean() - 0.5 * d.mean() ** 2)
    assert silog(torch.tensor(p), torch.tensor(t), torch.tensor(valid)).item() == pytest.approx(expected)


def test_silog_edges() -> None:
    p = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    everywhere = torch.ones(3, dtype=torch.bool)
    scaled = silog(p, 3 * p.detach(), everywhere, variance=1.0)  # λ = 1 forgives a common factor
    assert scaled.item() == pytest.approx(0, abs=1e-3)
    perfect = silog(p, p.detach(), everywhere)
    perfect.backward()
    assert torch.isfinite(p.grad).all()
    nothing = silog(p, p.detach(), ~everywhere)
    nothing.backward()
    assert nothing.item() == 0


def test_the_gradient_loss_is_the_formula() -> None:
    """By loops, in double precision: at every 1st, 2nd, 4th and 6th pixel, over differences of two valid ones."""
    rng = np.random.default_rng(0)
    p, t = rng.uniform(0.5, 9, (2, 11, 14)), rng.uniform(0.5, 9, (2, 11, 14))
    valid = rng.random((2, 11, 14)) < 0.8
    d, expected = np.log(p + 1e-3) - np.log(t + 1e-3), 0.0
    for s in (1, 2, 4, 6):
        total, count = 0.0, 0
        for b, i, j in np.ndindex(2, 11, 14):
            if i % s or j % s or not valid[b, i, j]:
                continue
            count += 1
            for k, m in ((i + 2 * s, j), (i, j + 2 * s)):
                if k < 11 and m < 14 and valid[b, k, m]:
                    total += abs(d[b, k, m] - d[b, i, j])
        expected += total / count
    found = gradient_loss(torch.tensor(p), torch.tensor(np.where(valid, t, 0)), torch.tensor(valid))
    assert found.item() == pytest.approx(expected, rel=1e-12)
    nothing = torch.zeros(1, 1, 1, dtype=torch.bool)
    assert gradient_loss(torch.ones(1, 1, 1), torch.ones(1, 1, 1), nothing).item() == 0
