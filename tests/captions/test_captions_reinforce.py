"""Stored augmentations and teachers' embeddings: against plain open_clip calls, and the same however they are made."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from reinforce_made import rows, run, table, teacher

from cutline.captions.reinforce import ReinforceConfig, ReinforceWork, reinforce_work
from cutline.captions.work import Failed
from cutline.errors import ConfigError, DataError
from cutline.pairs import Pairs
from cutline.train.stream import Augment, Augmentation, teachers_of
from cutline.train.stream.pictures import RowPicture, replay_view

TEXTS = ["alt", "captions"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("teachers")
    return [teacher(folder, 32, 24, 0.4), teacher(folder, 48, 16, 0.3)]


@pytest.fixture(scope="module")
def work(teachers: list[str], tmp_path_factory: pytest.TempPathFactory) -> ReinforceWork:
    pairs = table(tmp_path_factory.mktemp("pairs") / "t.lance")
    return reinforce_work(pairs, ReinforceConfig(teachers=teachers, texts=TEXTS, augmentations=3))


@pytest.fixture(scope="module")
def made(work: ReinforceWork) -> list[Any]:
    worker = work.load()
    return list(worker.make(worker.prepare(rows())))


def stored(value: dict[str, Any], size: tuple[int, int]) -> Augmentation:
    crop = (value[k] for k in ("top", "left", "height", "width"))
    return Augmentation(*crop, size, value["flip"], tuple((o["name"], o["amount"]) for o in value["operations"]))


@torch.no_grad()
def test_embeddings_are_those_of_open_clip_one_at_a_time(teachers: list[str], made: list[Any]) -> None:
    """image = [normalize(f₁(view at size 1)), normalize(f₂(view at size 2))], and text likewise."""
    models = []
    for folder, size in zip(teachers, (32, 48), strict=True):
        model, _, test = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (test.transforms[-1].mean, test.transforms[-1].std))
        models.append((model.eval(), open_clip.get_tokenizer(f"local-dir:{folder}"), size, mean, std))
    for row, values in zip(rows(), made, strict=True):
        picture = RowPicture(row["image"])
        for augmentation, vector in zip(values["dr_augment"], values["dr_image"], strict=True):
            how, parts = stored(augmentation, picture.size), []
            for model, _, size, mean, std in models:
                view = torch.from_numpy(replay_view(picture, Augment(), how, size).copy()).float() / 255
                parts.append(model.encode_image(((view - mean) / std)[None], normalize=True)[0])
            assert torch.from_numpy(vector).float().allclose(torch.cat(parts), atol=1e-3)
        for column, texts in {"alt": [row["alt"] or ""], "captions": row["captions"] or [""]}.items():
            texts = [t for t in texts if t.strip()] or [""]
            assert len(values[f"dr_text_{column}"]) == len(texts)
            for text, vector in zip(texts, values[f"dr_text_{column}"], strict=True):
                parts = [model.encode_text(tokenizer([text]), normalize=True)[0] for model, tokenizer, *_ in models]
                assert torch.from_numpy(vector).float().allclose(torch.cat(parts), atol=1e-3)


def test_each_teachers_part_has_length_one(made: list[Any]) -> None:
    for values in made:
        for column in ("dr_image", "dr_text_alt", "dr_text_captions"):
            assert values[column].dtype == np.float16
            for part in np.split(values[column].astype(float), [24], axis=1):
                assert np.linalg.norm(part, axis=1) == pytest.approx(1, abs=2e-3)


def test_augmentations_are_those_of_the_config_and_differ_between_rows(made: list[Any], work: ReinforceWork) -> None:
    drawn = [a for values in made for a in values["dr_augment"]]
    assert len({str(a) for a in drawn}) == len(drawn) == 36
    assert {len(a["operations"]) for a in drawn} == {2}
    shares = []
    for row, values in zip(rows(), made, strict=True):
        height, width = RowPicture(row["image"]).size
        for a in values["dr_augment"]:
            assert 0 <= a["top"] <= a["top"] + a["height"] <= height
            assert 0 <= a["left"] <= a["left"] + a["width"] <= width
            shares.append(a["height"] * a["width"] / height / width)
    assert min(shares) < 0.25 < 0.75 < max(shares)


@pytest.mark.parametrize("batch", [1, 5])
def test_what_is_made_does_not_depend_on_the_batch(work: ReinforceWork, made: list[Any], batch: int) -> None:
    worker = pickle.loads(pickle.dumps(work)).load()
    for start in range(0, 12, batch):
        some = worker.make(worker.prepare(rows()[start : start + batch]))
        for ours, theirs in zip(some, made[start : start + batch], strict=True):
            assert ours["dr_augment"] == theirs["dr_augment"]
            for column in ("dr_image", "dr_text_alt", "dr_text_captions"):
                assert np.abs(ours[column].astype(float) - theirs[column].astype(float)).max() < 1e-3


def test_a_table_holds_the_columns_and_says_which_teachers_made_them(tmp_path: Path, teachers: list[str]) -> None:
    pairs = table(tmp_path / "t.lance")
    work = reinforce_work(pairs, ReinforceConfig(teachers=teachers, texts=TEXTS, augmentations=3))
    worker = work.load()
    made = worker.make(worker.prepare(rows()))
    pairs = run(pairs, work, batch=5)
    columns = ["dr_augment", "dr_image", "dr_text_alt", "dr_text_captions"]
    assert [str(pairs.schema.field(c).type) for c in columns[1:]] == [
        "list<item: fixed_size_list<item: halffloat>[40]>"
    ] * 3
    for read, fresh in zip(pairs.read(range(12), columns), made, strict=True):
        assert read["dr_augment"] == fresh["dr_augment"]
        assert all(np.abs(np.asarray(read[c], float) - fresh[c]).max() < 1e-3 for c in columns[1:])
    found = teachers_of(pairs, "dr_image")
    assert [(t.name, t.width, t.size) for t in found] == [(teachers[0], 24, 32), (teachers[1], 16, 48)]
    assert found[0].logit_scale == pytest.approx(1 / 0.07, rel=1e-5)  # open_clip's initial one
    assert found[0].hash != found[1].hash
    assert len(pairs.where("dr_augment IS NOT NULL AND array_length(dr_image) = 3")) == 12
    with pytest.raises(DataError, match="'alt'.*does not say which teachers"):
        teachers_of(pairs, "alt")


def test_pictures_that_cannot_be_used_give_a_reason_and_the_others_are_made(
    work: ReinforceWork, made: list[Any]
) -> None:
    some = rows()[:4]
    some[0]["image"], some[0]["error"] = None, "gone.tar: no such file"
    some[2]["image"] = some[2]["image"][: len(some[2]["image"]) // 2]
    worker = work.load()
    first, second, third, fourth = worker.make(worker.prepare(some))
    assert isinstance(first, Failed)
    assert "cannot be read" in first.reason
    assert third == Failed("picture: truncated")
    assert np.abs(second["dr_image"].astype(float) - made[1]["dr_image"]).max() < 1e-3  # type: ignore[call-overload,index]
    assert np.abs(fourth["dr_text_alt"].astype(float) - made[3]["dr_text_alt"]).max() < 1e-3  # type: ignore[call-overload,index]
    assert all(isinstance(m, Failed) for m in worker.make(worker.prepare([some[0], some[2]])))


def test_half_precision_stays_near(work: ReinforceWork, made: list[Any]) -> None:
    worker = replace(work, config=work.config.model_copy(update={"precision": "bf16"})).load()
    for ours, theirs in zip(worker.make(worker.prepare(rows())), made, strict=True):
        for column in ("dr_image", "dr_text_alt", "dr_text_captions"):
            difference = np.abs(ours[column].astype(float) - theirs[column].astype(float))  # type: ignore[call-overload,index]
            assert 0 < difference.max() < 0.03


def test_a_teacher_that_gives_nan_is_a_reason(work: ReinforceWork) -> None:
    worker = work.load()
    with torch.no_grad():
        worker.models[1].logit_scale.fill_(1.0)
        worker.models[1].text_projection.fill_(float("nan"))
    assert worker.make(worker.prepare(rows()[:1])) == [Failed("a teacher's embedding is not finite")]


def test_teachers_that_do_not_fit_are_refused(tmp_path: Path, teachers: list[str]) -> None:
    pairs: Pairs = table(tmp_path / "t.lance", 2)
    with pytest.raises(ConfigError, match="'scratch:vit_pwee_patch16_reg1_gap_256' has no text tower"):
        reinforce_work(pairs, ReinforceConfig(teachers=["scratch:vit_pwee_patch16_reg1_gap_256"]))
    with pytest.raises(DataError, match="no column 'caption'"):
        reinforce_work(pairs, ReinforceConfig(teachers=teachers, texts=["caption"]))
    with pytest.raises(ConfigError, match="other weights than when this work began"):
        reinforce_work(pairs, ReinforceConfig(teachers=["scratch:vit-tiny-64"])).load()
