"""Distillation against reference values, open_clip, a plain float64 version, two real processes, and in training."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from objectives_made import recipe, rows_of
from open_clip.loss import DistillClipLoss
from reinforce_made import run as run_work
from reinforce_made import table, teacher
from torch import Tensor

from cutline import towers
from cutline.captions.reinforce import ReinforceConfig, reinforce_work
from cutline.errors import ConfigError, DataError
from cutline.objectives import distill
from cutline.objectives.base import Batch, Features, Texts
from cutline.objectives.distill import Config, Objective, OnlineTeacher
from cutline.train import loop
from cutline.train.recipe import Recipe
from cutline.train.stream import replay


class Fixed(torch.nn.Module):
    """A model that gives its inputs back."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(10.0), dtype=torch.float64))

    def encode_image(self, x, normalize):
        return x

    def encode_text(self, x, normalize):
        return x


def made(phase: float) -> Tensor:
    x = np.sin(0.7 * np.arange(24).reshape(4, 6) + phase)
    return torch.tensor(x / np.linalg.norm(x, axis=1, keepdims=True))


def batch_of(
    image: Tensor, text: Tensor, said: Tensor, told: Tensor, teachers: list[Any], owners: list[int] | None = None
) -> Batch:
    who = torch.tensor(owners if owners else range(len(image)))
    columns = {distill.IMAGE: said, f"{distill.TEXT}/text": told, distill.TEACHERS: teachers}
    return Batch({"image": image}, {"text": Texts(text, who, owners is None)}, columns)


def loss_of(batch: Batch, **config: Any) -> Tensor:
    model = Fixed()
    return Objective(Config(**config), model)(batch, Features(model, batch))["text"]


def one(width: int, scale: float) -> SimpleNamespace:
    return SimpleNamespace(width=width, logit_scale=scale)


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_loss_equals_the_reference_value(vectors, chunk):
    batch = batch_of(vectors["image"], vectors["text"], made(0.4), made(0.9), [one(6, 50)])
    assert loss_of(batch, chunk=chunk).item() == pytest.approx(4.3794855694, abs=1e-9)


def test_an_ensemble_is_the_mean_of_softmaxes_with_their_own_scales_and_widths(vectors):
    """The second teacher's vectors are made two numbers wider by zeros, which change no product."""
    wider = [F.pad(made(p), (0, 2)) for p in (2.1, 2.5)]
    said, told = torch.cat([made(0.4), wider[0]], 1), torch.cat([made(0.9), wider[1]], 1)
    batch = batch_of(vectors["image"], vectors["text"], said, told, [one(6, 50), one(8, 40)])
    assert loss_of(batch).item() == pytest.approx(4.3831854949, abs=1e-9)
    batch.columns[distill.TEACHERS] = [one(6, 100), one(8, 100)]
    assert loss_of(batch, logit_scales=[50, 40]).item() == pytest.approx(4.3831854949, abs=1e-9)
    with pytest.raises(ConfigError, match="logit_scales has 1 values, and the teachers are 2"):
        loss_of(batch, logit_scales=[50])


def plain(
    image: Tensor, text: Tensor, said: Tensor, told: Tensor, owners: list[int], scale: Tensor, s: float
) -> Tensor:
    """The docstring's formula with loops."""
    total = torch.zeros((), dtype=image.dtype)
    for i in range(len(image)):
        target, student = (s * said[i] @ told.T).softmax(0), (scale * image[i] @ text.T).softmax(0)
        total = total - (target * student.log()).sum() / len(image)
    for j, owner in enumerate(owners):
        target, student = (s * told[j] @ said.T).softmax(0), (scale * text[j] @ image.T).softmax(0)
        total = total - (target * student.log()).sum() / owners.count(owner) / len(set(owners))
    return total / 2


@pytest.mark.parametrize("owners", [None, [0, 0, 1, 2, 2, 2, 3], [1, 1, 3]])
@pytest.mark.parametrize("chunk", [None, 2])
def test_value_and_gradients_equal_the_formula(vectors, owners, chunk):
    torch.manual_seed(0)
    n = len(owners or range(4))
    text, told = (F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1) for d in (6, 5))
    said = F.normalize(torch.randn(4, 5, dtype=torch.float64), dim=1)
    found = []
    for kind in ("ours", "plain"):
        image, words = vectors["image"].clone().requires_grad_(), text.clone().requires_grad_()
        model = Fixed()
        if kind == "ours":
            batch = batch_of(image, words, said, told, [one(5, 30)], owners)
            value = Objective(Config(chunk=chunk), model)(batch, Features(model, batch))["text"]
        else:
            value = plain(image, words, said, told, owners or list(range(4)), model.logit_scale.exp(), 30)
        value.backward()
        found.append((value.detach(), image.grad, words.grad, model.logit_scale.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_value_and_gradient_equal_open_clips_loss(vectors):
    grads = []
    for kind in ("ours", "theirs"):
        image = vectors["image"].clone().requires_grad_()
        if kind == "ours":
            value = loss_of(batch_of(image, vectors["text"], made(0.4), made(0.9), [one(6, 50)]))
        else:
            scales = (torch.tensor(s, dtype=torch.float64) for s in (10, 50))
            value = DistillClipLoss()(image, vectors["text"], next(scales), made(0.4), made(0.9), next(scales))[1]
        value.backward()
        grads.append(image.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


def test_a_student_like_its_teacher_reaches_the_entropy_that_is_logged(vectors):
    model = Fixed()
    batch = batch_of(vectors["image"], vectors["text"], vectors["image"], vectors["text"], [one(6, 10)])
    objective = Objective(Config(), model)
    loss = objective(batch, Features(model, batch))["text"]
    assert loss.item() == pytest.approx(objective.logged["entropy/text"].item(), rel=1e-12)
    loss.backward()
    assert abs(model.logit_scale.grad.item()) < 1e-12


def test_a_batch_of_one_picture_is_finite(vectors):
    image = vectors["image"][:1].clone().requires_grad_()
    loss = loss_of(batch_of(image, vectors["text"][:1], made(0.4)[:1], made(0.9)[:1], [one(6, 50)]))
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(image.grad).all()


def test_half_precision_vectors_have_the_length_of_the_scale(vectors):
    """float16 rounds lengths by up to a thousandth, which a scale of 100 would make a tenth of a logit."""
    batch = batch_of(vectors["image"], vectors["text"], made(0.4).half(), made(0.9).half(), [one(6, 100)])
    taught = distill.stored(batch, None)
    torch.testing.assert_close(taught.image.norm(dim=1), torch.full((4,), 100.0))
    torch.testing.assert_close(taught.text["text"].norm(dim=1), torch.ones(4))


def test_names_of_columns_are_those_of_the_stream():
    assert (distill.IMAGE, distill.TEXT, distill.TEACHERS) == (replay.IMAGE, replay.TEXT, replay.TEACHERS)


@pytest.fixture(scope="module")
def reinforced(tmp_path_factory) -> tuple[Any, list[str]]:
    """A table with the embeddings of two teachers, and their folders."""
    folder = tmp_path_factory.mktemp("reinforced")
    teachers = [teacher(folder, 32, 24, 0.4), teacher(folder, 48, 16, 0.3)]
    pairs = table(folder / "t.lance", 24)
    config = ReinforceConfig(teachers=teachers, texts=["alt", "captions"], augmentations=3)
    return run_work(pairs, reinforce_work(pairs, config)), teachers


def values(pairs: str, rule: str = "sum", **options: Any) -> dict[str, Any]:
    text = {"columns": {"alt": 1, "captions": 1}, "rule": rule}
    v = recipe(text, distill=options, contrastive={"weight": 0.25})
    v["data"] |= {"pairs": pairs, "replay": "dr"}
    v["train"]["samples"] = 480
    return v


@pytest.mark.parametrize("rule", ["sample", "sum", "all"])
def test_it_trains_on_stored_embeddings(reinforced, tmp_path, rule):
    pairs, _ = reinforced
    v = values(str(pairs.path), rule, weight=0.75)
    rows = rows_of(loop.train(Recipe.model_validate(v), tmp_path / "run"))
    sources = ["alt", "captions"] if rule == "sum" else ["text"]
    gap = [sum(r[f"distill/{s}"] - r[f"distill/entropy/{s}"] for s in sources) for r in rows]
    assert min(gap) >= 0  # a KL divergence
    assert sum(gap[-8:]) < 0.7 * sum(gap[:8])


def test_the_embeddings_are_of_the_drawn_augmentation_and_caption(reinforced, tmp_path):
    """The loss of a batch, from the table's own columns by the key, and what was drawn."""
    pairs, _ = reinforced
    run = loop.prepare(Recipe.model_validate(values(str(pairs.path))), tmp_path / "run", resume=False)
    batch = next(run.stream.batches())
    taught = distill.stored(batch, None)
    by_key = {row["key"]: row for row in pairs.read(range(len(pairs)), ["key", "alt", "dr_image", "dr_text_alt"])}
    for i, key in enumerate(batch.keys):
        vector = np.asarray(by_key[key]["dr_image"][int(batch.columns[replay.DRAWN][i])], float)
        parts = [v / np.linalg.norm(v) / 0.07 for v in np.split(vector, [24])]
        assert taught.image[i].numpy() == pytest.approx(np.concatenate(parts), abs=1e-3)
        if by_key[key]["alt"] is None:
            continue  # another caption stands in
        vector = np.asarray(by_key[key]["dr_text_alt"][0], float)
        parts = [v / np.linalg.norm(v) for v in np.split(vector, [24])]
        assert taught.text["alt"][i].numpy() == pytest.approx(np.concatenate(parts), abs=1e-4)


def test_stored_embeddings_that_are_not_finite_are_told_by_column(reinforced, tmp_path):
    """The row is replaced by another, and where there are too many the run stops."""
    pairs, _ = reinforced
    copy = table(tmp_path / "t.lance", 24)
    for column in ("dr_augment", "dr_image", "dr_text_alt", "dr_text_captions"):
        values_of = [r[column] for r in pairs.read(range(len(pairs)), [column])]
        if column == "dr_image":
            values_of = [np.full((3, 40), np.nan, np.float16)] * 24
        copy = copy.add_column(
            column, values_of, type=pairs.schema.field(column).type, provenance=pairs.provenance(column)
        )
    with pytest.raises(DataError, match="dr_image is not finite"):
        loop.train(Recipe.model_validate(values(str(copy.path))), tmp_path / "run")


def test_without_teachers_the_recipe_is_told_where_they_come_from(reinforced, tmp_path):
    v = values(str(reinforced[0].path))
    del v["data"]["replay"]
    with pytest.raises(ConfigError, match="data.replay.*cutline reinforce"):
        loop.train(Recipe.model_validate(v), tmp_path / "run")


def student(context: int = 16, **custom: Any) -> towers.Model:
    cfg = recipe()["towers"]["custom"] | custom
    return towers.build(towers.TowerConfig(custom=cfg, context_length=context))


def test_an_online_teacher_sees_its_own_pictures_and_the_words(tmp_path):
    """At its own size the pixels are the same, so its embeddings are open_clip's of the plain picture and text."""
    folder = teacher(tmp_path, 48, 24, 0.4)
    model, _, test = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    (mean, std), own = (
        [torch.tensor(v).view(3, 1, 1) for v in m]
        for m in ((test.transforms[-1].mean, test.transforms[-1].std), open_clip_default())
    )
    pixels, texts = torch.rand(3, 3, 48, 48), ["a red square", "two dogs", ""]
    tokens = towers.Tokenizer(small := student())(texts)
    batch = Batch(
        {"image": (pixels - own[0]) / own[1]}, {"text": Texts(towers.Tokenizer(small).trimmed(tokens), torch.arange(3))}
    )
    taught = OnlineTeacher(folder, small)(batch)
    with torch.no_grad():
        image = model.eval().encode_image((pixels - mean) / std, normalize=True) / 0.07
        text = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(texts), normalize=True)
    torch.testing.assert_close(taught.image, image, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(taught.text["text"], text, rtol=1e-4, atol=1e-5)


def open_clip_default() -> tuple[tuple[float, ...], tuple[float, ...]]:
    return open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


def test_an_online_teachers_view_is_the_picture_resized(tmp_path):
    small = student()
    online = OnlineTeacher(teacher(tmp_path, 32, 24, 0.4), small)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in open_clip_default())
    view = online.view((torch.full((1, 3, 48, 48), 0.25) - mean) / std)
    own = torch.tensor([0.4, 0.5, 0.4]).view(3, 1, 1), torch.tensor([0.6, 0.4, 0.4]).view(3, 1, 1)
    torch.testing.assert_close(view, ((0.25 - own[0]) / own[1]).expand(1, 3, 32, 32), rtol=1e-4, atol=1e-5)


def test_an_online_teacher_that_cannot_read_the_tokens_is_refused(tmp_path):
    folder = teacher(tmp_path, 32, 24, 0.4)  # a context of 16
    with pytest.raises(ConfigError, match="reads at most 16 tokens, and the student 24: set towers.context_length=16"):
        OnlineTeacher(folder, student(24))
    text = recipe()["towers"]["custom"]["text_cfg"] | {"tokenizer_kwargs": {"clean": "canonicalize"}}
    with pytest.raises(ConfigError, match="another tokeniser.*cutline reinforce"):
        OnlineTeacher(folder, student(text_cfg=text))
    with pytest.raises(ConfigError, match="no text tower"):
        OnlineTeacher("scratch:resnet18", student())


def test_it_trains_with_an_online_teacher_that_is_not_saved(tmp_path):
    v = recipe(distill={"teacher": teacher(tmp_path, 32, 24, 0.4)})
    v["towers"]["context_length"] = 16
    v["train"]["samples"] = 480
    run = loop.train(Recipe.model_validate(v), tmp_path / "run")
    gap = [r["distill/text"] - r["distill/entropy/text"] for r in rows_of(run)]
    assert sum(gap[-8:]) < 0.7 * sum(gap[:8])
    prepared = loop.prepare(Recipe.model_validate(v), run, resume=True)
    assert not list(prepared.trainee.objectives.parameters())
    assert not list(prepared.trainee.objectives.buffers())
    online = prepared.trainee.methods()["distill"].online[0].model
    with torch.no_grad():
        next(online.parameters()).add_(1)
    towers.save(online, Path(v["objectives"]["distill"]["teacher"]))
    with pytest.raises(ConfigError, match="has other weights than when this run began"):
        loop.prepare(Recipe.model_validate(v), run, resume=True)
    assert not online.training
    assert not any(p.requires_grad for p in online.parameters())
