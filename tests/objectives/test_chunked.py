"""Chunks of rows: equal to one piece in value and gradient, and never a matrix of all pairs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cutline.objectives.chunked import chunked
from cutline.objectives.contrastive import multi_positive_loss, paired_loss
from cutline.objectives.sigmoid import sigmoid_loss


def squares(rows: Tensor, factor: Tensor, columns: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    products = rows @ columns.T
    return (factor[:, None] * products.square() * power).sum(), (products > 0).sum()


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_values_and_gradients_are_those_of_one_piece(chunk):
    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=torch.float64) for s in ((7, 3), (7,), (5, 3), ())]
    found = []
    for size in (None, chunk):
        own = [x.clone().requires_grad_(i != 1) for i, x in enumerate(leaves)]  # the factor has no gradient
        loss, count = chunked(squares, size, own[:2], own[2:])
        (2.5 * loss).backward()
        assert not count.requires_grad
        found.append((loss.detach(), count, *(x.grad for x in own if x.requires_grad)))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_without_a_gradient_only_the_values_are_made():
    rows, columns = torch.randn(6, 2), torch.randn(4, 2)
    loss, count = chunked(squares, 2, (rows, torch.ones(6)), (columns, torch.tensor(1.0)))
    assert not loss.requires_grad
    assert loss.item() == pytest.approx((rows @ columns.T).square().sum().item(), rel=1e-5)
    assert count.item() == (rows @ columns.T > 0).sum()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("owners", [None, [0, 0, 1, 2, 2, 2, 3], [1, 1, 3, 0]])
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunked_infonce_equals_plain(vectors, owners, weighted, chunk):
    """Paired and with several texts a picture, with and without weights: value, accuracy and all gradients."""
    torch.manual_seed(0)
    text = F.normalize(torch.randn(len(owners or range(4)), 6, dtype=torch.float64), dim=1)
    weight = torch.tensor([0.2, 1.0, 0.0, 0.7]) if weighted else None
    found = []
    for size in (None, chunk):
        image, words = vectors["image"].clone().requires_grad_(), text.clone().requires_grad_()
        scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
        if owners is None:
            loss, hits = paired_loss(image, words, scale, weight, size)
        else:
            loss, hits = multi_positive_loss(image, words, torch.tensor(owners), scale, weight, size)
        loss.backward()
        found.append((loss.detach(), hits, image.grad, words.grad, scale.grad))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-13)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made under it has."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            self.most = max(self.most, x.numel() if isinstance(x, Tensor) else 0)
        return out


@pytest.mark.parametrize("method", ["sigmoid", "paired", "many"])
def test_no_matrix_of_all_pairs_is_made(method):
    image, text = (F.normalize(torch.randn(64, 4), dim=1).requires_grad_() for _ in range(2))
    scale, owners = torch.tensor(10.0), torch.arange(64)
    for chunk, most in ((None, 64 * 64), (8, 8 * 64)):
        with Largest() as largest:
            if method == "sigmoid":
                loss, _ = sigmoid_loss(image, text, owners, scale, -scale, True, chunk)
            elif method == "paired":
                loss, _ = paired_loss(image, text, scale, None, chunk)
            else:
                loss, _ = multi_positive_loss(image, text, owners, scale, None, chunk)
            loss.backward()
        assert largest.most == most


def test_a_compiled_model_may_use_it():
    """torch.compile breaks its graph there and goes on."""
    rows, columns = torch.randn(6, 2, requires_grad=True), torch.randn(4, 2)

    def loss(rows: Tensor) -> Tensor:
        return chunked(squares, 2, (rows * 2, torch.ones(6)), (columns, torch.tensor(1.0)))[0]

    torch.compile(loss, backend="eager")(rows).backward()
    compiled, rows.grad = rows.grad, None
    loss(rows).backward()
    torch.testing.assert_close(compiled, rows.grad)
