"""Colours and CutDepth in training: by their formulas, by the properties they must have, and as options."""

import colorsys
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cutline.config import load
from cutline.errors import ConfigError
from cutline.transfer.augment import CutDepth, jitter, photometric, saturate
from cutline.transfer.batches import Batches, Cut, cut
from cutline.transfer.data import Sample, open_data
from cutline.transfer.depth import DepthConfig
from cutline.transfer.depth import fit as fit_depth
from cutline.transfer.segment import SegmentConfig, Segmenter, fit
from cutline.transfer.store import load as load_model
from cutline.transfer.store import save

FILL = (10, 20, 30)


class Draws:
    """A generator whose draws are given: chances first, then the values between the bounds."""

    def __init__(self, chances: list[list[float] | float], values: list[list[float]]) -> None:
        self.chances, self.values = list(chances), list(values)

    def random(self, size: int | None = None) -> Any:
        return np.array(self.chances.pop(0)) if size else self.chances.pop(0)

    def uniform(self, low: Any, high: Any) -> np.ndarray:
        found = np.array(self.values.pop(0))
        assert (found >= low).all()
        assert (found <= high).all()
        return found


def pixels(*colours: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(colours, dtype=torch.uint8).T[:, None]


def plain(colour: tuple[int, int, int], steps: Callable[[list[float]], list[float]]) -> list[int]:
    return [round(255 * c) for c in steps([c / 255 for c in colour])]


def clipped(values: list[float]) -> list[float]:
    return [min(1.0, max(0.0, v)) for v in values]


COLOURS = [(200, 40, 90), (10, 120, 250), (128, 128, 128), (0, 0, 0), (255, 255, 255), (90, 91, 14)]


@pytest.mark.parametrize("last", [False, True])
def test_photometric_distortion_by_formula(last: bool) -> None:
    """Brightness, contrast (second or last), HSV saturation and hue, pixel by pixel with Python's own colorsys."""
    delta, contrast, saturation, hue = 20.0, 1.3, 0.6, 0.07

    def steps(c: list[float]) -> list[float]:
        c = clipped([v + delta / 255 for v in c])
        if not last:
            c = clipped([v * contrast for v in c])
        h, s, v = colorsys.rgb_to_hsv(*c)
        c = list(colorsys.hsv_to_rgb((h + hue) % 1, min(1.0, s * saturation), v))
        return clipped([v * contrast for v in c]) if last else c

    rng = Draws([[0, 0, 0, 0], 0.0 if last else 1.0], [[delta, contrast, saturation, hue]])
    found = photometric(pixels(*COLOURS), rng)  # type: ignore[arg-type]
    expected = [plain(c, steps) for c in COLOURS]
    assert np.abs(found[:, 0].T.numpy().astype(int) - np.array(expected)).max() <= 1


def test_jitter_by_formula() -> None:
    contrast, brightness, gamma, hue, saturation, value = 0.9, 0.15, 1.2, -0.08, 0.1, -0.05

    def steps(c: list[float]) -> list[float]:
        c = [v**gamma for v in clipped([v * contrast + brightness for v in c])]
        h, s, v = colorsys.rgb_to_hsv(*c)
        s = min(1.0, s + saturation) if s > 0 else 0.0  # grey stays grey
        return list(colorsys.hsv_to_rgb((h + hue) % 1, s, min(1.0, max(0.0, v + value))))

    rng = Draws([[0, 0, 0]], [[contrast, brightness, gamma], [hue, saturation, value]])
    colours = [c for c in COLOURS if len(set(c)) == 3 or c == (128, 128, 128)]
    found = jitter(pixels(*colours), rng)  # type: ignore[arg-type]
    assert np.abs(found[:, 0].T.numpy().astype(int) - np.array([plain(c, steps) for c in colours])).max() <= 1


@pytest.mark.parametrize("change", [photometric, jitter])
def test_colours_change_half_the_time_by_no_more_than_they_may(change: Callable[..., torch.Tensor]) -> None:
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    rng = np.random.default_rng(0)
    levels = np.array([int(change(grey, rng)[0, 0, 0]) for _ in range(400)])
    # Grey has no hue and no saturation: brightness and contrast alone change it (jitter: gamma and value too).
    assert 0.1 < (levels == 100).mean() < 0.4
    assert levels.min() >= (34 if change is photometric else 0)  # 0.5 (100 - 32)
    assert levels.max() <= 198  # 1.5 (100 + 32)
    assert change(grey, rng).dtype == torch.uint8


def test_saturation_keeps_the_brightest_channel() -> None:
    x = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(saturate(x, 1.0, 0.0), x, atol=1e-6)
    assert torch.allclose(saturate(x, 0.4, 0.0).amax(0), x.amax(0), atol=1e-6)
    assert torch.allclose(saturate(x, 0.0, 0.0), x.amax(0).expand(3, 5, 5), atol=1e-6)


def test_cutdepth_by_formula() -> None:
    """A strip from α W of width (1 - α) β p W, in grey by depth / far; the rest and the sample given stay."""
    image = np.full((4, 100, 3), 7, np.uint8)
    target = np.linspace(0, 12, 400, dtype=np.float32).reshape(4, 100)
    sample = Sample("0", image, target)
    cut = CutDepth(share=1.0, far=10.0)(sample, Draws([[0.0, 0.3, 0.5]], []))  # type: ignore[arg-type]
    strip = slice(30, 30 + int(70 * 0.5 * 0.75))
    grey = np.clip(np.round(target[:, strip] / 10 * 255), 0, 255)
    assert (cut.image[:, strip] == grey[:, :, None]).all()
    assert (np.delete(cut.image, np.r_[strip], 1) == 7).all()
    assert cut.target is target
    assert (image == 7).all()
    thin = CutDepth(1.0, 10.0)(sample, Draws([[0.0, 0.999, 0.0]], []))  # type: ignore[arg-type]
    assert (thin.image != 7).any(2).any(0).sum() == 1  # never less than one column


def test_cutdepth_meets_its_share_of_the_pictures() -> None:
    sample = Sample("0", np.zeros((2, 40, 3), np.uint8), np.full((2, 40), 5.0, np.float32))
    rng, paste = np.random.default_rng(0), CutDepth(0.25, 10.0)
    met = [bool(paste(sample, rng).image.any()) for _ in range(1000)]
    assert 0.2 < np.mean(met) < 0.3


def test_a_changed_batch_depends_on_seed_and_step_alone_and_has_the_same_targets(folder: Callable[..., Path]) -> None:
    split = open_data(f"folder:{folder()}", "depth").split("train")
    bare = Cut((24, 24), (0.5, 2.0), True, None, FILL, 0)
    changed = Cut((24, 24), (0.5, 2.0), True, None, FILL, 0, "jitter", CutDepth(0.5, 10.0))
    one, two = (list(Batches(split, range(8), 4, 7, changed, threads=t).iterate(0, 3))[2] for t in (1, 3))
    assert torch.equal(one.images, two.images)
    assert not torch.equal(one.images, Batches(split, range(8), 4, 7, bare).make(2).images)
    small = Sample("0", np.full((4, 4, 3), 90, np.uint8), np.ones((4, 4), np.float32))
    picture, target = cut(
        small, Cut((8, 8), (1, 1), False, None, FILL, 0, "photometric"), False, np.random.default_rng(3)
    )
    assert picture[:, 7, 7].tolist() == list(FILL)  # the surroundings keep their colour
    assert (target[:4, :4] == 1).all()


def test_batches_in_other_colours_are_not_whole(folder: Callable[..., Path]) -> None:
    """So that frozen features are not kept for pictures that change."""
    split = open_data(f"folder:{folder()}", "segment").split("train")
    for options, whole in ((("none", None), True), (("photometric", None), False), (("none", CutDepth(1, 1)), False)):
        assert Batches(split, range(8), 4, 0, Cut((32, 32), (1.0, 1.0), True, None, FILL, 0, *options)).whole == whole


def test_they_are_options(folder: Callable[..., Path], encoder: Any) -> None:
    root = folder()
    quick: dict[str, Any] = {"steps": 2, "batch": 4, "head": "linear"}

    def trained(fit: Any, config: Any) -> torch.Tensor:
        return next(fit(encoder, f"folder:{root}", config).head.parameters()).detach()

    bare = trained(fit, SegmentConfig(**quick, colour="none"))
    assert not torch.equal(bare, trained(fit, SegmentConfig(**quick, colour="photometric")))
    deep = trained(fit_depth, DepthConfig(**quick, colour="none"))
    assert not torch.equal(deep, trained(fit_depth, DepthConfig(**quick, colour="none", cutdepth=1)))


def test_the_auxiliary_head_by_formula(encoder: Any) -> None:
    """3x3-BN-ReLU-1x1 on the third level, 256 channels, beside the logits that the model predicts with."""
    torch.manual_seed(0)
    model = Segmenter(encoder, SegmentConfig(aux=0.4, channels=64), ["a", "b", "c"]).train(False)
    x = torch.randn(2, 3, 32, 32)
    maps = model.features(x)
    (one, main), (weight, aux) = model.outputs(maps, (32, 32))
    assert (one, weight) == (1.0, 0.4)
    assert torch.equal(main, model(x))
    level = model.pyramid(maps)[2]
    conv, norm, _, _, last = model.auxiliary.body
    assert conv.weight.shape == (256, level.shape[1], 3, 3)
    logits = last(norm(conv(level)).relu())
    plain = torch.nn.functional.interpolate(logits, (32, 32), mode="bilinear", align_corners=False)
    assert torch.allclose(aux, plain, atol=1e-5)
    with pytest.raises(ValueError, match="head=fpn has no auxiliary head, which is upernet's: leave aux out"):
        SegmentConfig(aux=0.4, head="fpn")


def test_the_logged_loss_holds_the_auxiliary_one(folder: Callable[..., Path], encoder: Any, tmp_path: Path) -> None:
    """The loss is UPerNet's and `aux` times the auxiliary head's: linear in `aux` at the first step."""
    spec = f"folder:{folder()}"
    losses = []
    for aux in (0.4, 0.8, 1.2):
        config = SegmentConfig(aux=aux, channels=64, steps=1, batch=8, drop_path=0.0, colour="none")
        fit(encoder, spec, config, tmp_path / str(aux))
        losses.append(json.loads((tmp_path / str(aux) / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)
    assert (losses[1] - losses[0]) / 0.4 == pytest.approx(np.log(3), rel=0.5)  # a random head of three classes


def test_an_auxiliary_head_is_saved_with_the_model(folder: Callable[..., Path], encoder: Any, tmp_path: Path) -> None:
    model = fit(encoder, f"folder:{folder()}", SegmentConfig(aux=0.4, channels=64, steps=1, batch=8))
    again = load_model(save(model, tmp_path / "model"))
    assert again.state_dict().keys() == model.state_dict().keys()
    picture = np.full((32, 32, 3), 90, np.uint8)
    assert (again.predict([picture])[0] == model.predict([picture])[0]).all()


def test_an_unknown_colour_is_refused() -> None:
    with pytest.raises(ConfigError, match="colour"):
        load(SegmentConfig, None, ["colour=sepia"])
