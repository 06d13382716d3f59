"""Retrieval against big_vision's matrices, a plain loop, chance; on pairs with broken pictures; held-out pairs."""

import math

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutline import towers
from cutline.config import load
from cutline.errors import ConfigError, DataError
from cutline.record import Result
from cutline.scenes import Scenes, parse_spec
from cutline.zeroshot.encode import embed_pairs
from cutline.zeroshot.retrieve import RetrieveConfig, chance, recall, retrieve

OWNERS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
FOUND = [[.8, .8, .1, .5, .1, .2, .5, .1], [.5, .4, 0, 0, .4, .2, .6, .4],
         [.5, .4, .1, .5, 0, .8, .8, .3], [.5, .4, .1, .5, .4, .2, .3, .3]]  # fmt: skip
PERFECT = [[0, 0, .1, .5, .1, .2, .5, .1], [.5, .4, 0, 0, .4, .2, .6, .4],
           [.5, .4, .1, .5, 0, 0, .8, .3], [.5, .4, .1, .5, .3, .2, 0, 0]]  # fmt: skip


def recalls(distances: list[list[float]]) -> dict[str, float]:
    return recall(-torch.tensor(distances), torch.eye(8), OWNERS, cells=24)


def test_image_to_text_equals_the_reference():
    got = recalls(FOUND)
    assert [got[f"i2t_r{k}"] for k in (1, 5, 10)] == [0.5, 0.75, 1.0]


def test_text_to_image_equals_the_reference():
    other = [list(row) for row in FOUND]
    other[0][6] = 0.1
    got = recalls(other)
    assert [got[f"t2i_r{k}"] for k in (1, 5, 10)] == [0.375, 1.0, 1.0]


def test_perfect_rankings_find_everything():
    assert set(recalls(PERFECT).values()) == {1.0}


def test_a_collapsed_encoder_finds_nothing():
    got = recall(torch.ones(30, 4), torch.ones(30, 4), torch.arange(30))
    assert set(got.values()) == {0.0}


def test_embeddings_that_are_not_finite_are_refused():
    with pytest.raises(DataError, match="not finite"):
        recall(torch.full((2, 3), math.nan), torch.ones(2, 3), torch.arange(2))


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 4))
def test_any_hit_recall_equals_a_plain_loop(seed, n, most):
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(n), rng.integers(1, most + 1, n))
    image, text = rng.standard_normal((n, 5)), rng.standard_normal((len(owners), 5))
    sim = image @ text.T
    got = recall(torch.tensor(image), torch.tensor(text), torch.tensor(owners), ks=(1, 3), cells=7)
    for k in (1, 3):
        hits = [any(owners[j] == i for j in np.argsort(-sim[i])[:k]) for i in range(n)]
        assert got[f"i2t_r{k}"] == pytest.approx(np.mean(hits))
        found = [owners[j] in np.argsort(-sim[:, j])[:k] for j in range(len(owners))]
        assert got[f"t2i_r{k}"] == pytest.approx(np.mean(found))


def test_chance_is_what_random_rankings_get():
    torch.manual_seed(0)
    owners = torch.arange(20).repeat_interleave(3)
    runs = [recall(torch.randn(20, 40), torch.randn(60, 40), owners) for _ in range(200)]
    expected = chance(20, owners)
    for name, value in expected.items():
        assert np.mean([r[name] for r in runs]) == pytest.approx(value, abs=0.02)


class Some:
    """Six scenes, two of which cannot be used."""

    fingerprint = "f"

    def __init__(self, broken: int = 1) -> None:
        self.scenes, self.broken = Scenes(parse_spec("scenes:n=12,size=48")), broken
        self.columns = self.scenes.columns

    def __len__(self) -> int:
        return 12

    def read(self, rows, columns):
        found = self.scenes.read(list(rows), columns)
        for row, values in zip(rows, found, strict=True):
            if row < self.broken:
                values |= {"image": None, "error": "missing file"}
            if row == 11:
                values["captions"] = ["", " "]
        return found


class Textless(Some):
    def read(self, rows, columns):
        return [row | {"alt": None} for row in self.scenes.read(list(rows), columns)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vision = {"image_size": 48, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "layers": 1, "heads": 1}
    return towers.build(towers.TowerConfig(custom={"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))


def test_unusable_pairs_are_left_out_and_counted(model):
    got = embed_pairs(model, Some(), ["captions"], batch=4)
    assert got.image.shape == (10, 16)
    assert got.text.shape == (50, 16)
    assert got.owners.tolist() == sorted(list(range(10)) * 5)
    assert got.skipped == {"missing file": 1, "no text": 1}


def test_too_many_unreadable_pictures_stop_it(model):
    with pytest.raises(DataError, match="2 of 12 pictures cannot be read"):
        embed_pairs(model, Some(broken=2), ["captions"])


def test_pairs_without_any_text_say_so(model):
    with pytest.raises(DataError, match="none of 12 pairs has a text in alt"):
        embed_pairs(model, Textless(), ["alt"])


@pytest.mark.parametrize("wrong", ["batch=0", "max_texts=0"])
def test_options_that_would_score_nothing_are_refused(wrong):
    with pytest.raises(ConfigError, match=rf"{wrong}.*greater than or equal to 1"):
        load(RetrieveConfig, None, [wrong])


def test_unknown_column_is_named(model):
    with pytest.raises(DataError, match="'caption'.*captions"):
        retrieve(model, Some(), RetrieveConfig(columns=["caption"]))


def test_embeddings_do_not_depend_on_the_batch(model):
    one, all_ = embed_pairs(model, Some(), ["captions"], batch=1), embed_pairs(model, Some(), ["captions"], batch=12)
    torch.testing.assert_close(one.image, all_.image)
    torch.testing.assert_close(one.text, all_.text)


def test_score_carries_its_protocol(model, tmp_path):
    result = retrieve(model, Some(), RetrieveConfig(max_texts=2), "somewhere", tmp_path)
    assert Result.read(tmp_path) == result
    assert result.metrics["texts"] == 20
    captions = [text for row in Some().read(range(1, 11), ["captions"]) for text in row["captions"][:2]]
    longer = sum(len(open_clip.get_tokenizer("ViT-B-32").encode(text)) + 2 > 16 for text in captions)
    assert result.metrics["truncated"] == longer > 0
    assert result.protocol.settings["columns"] == ["captions"]
    assert result.protocol.settings["hit"] == "any"
    assert len(result.protocol.encoder_hash) == 16


def test_pairs_seen_in_training_are_known(tmp_path):
    from cutline.config import dump
    from cutline.train.recipe import Recipe
    from cutline.zeroshot.retrieve import held_out

    table, run = str(tmp_path / "a.lance"), tmp_path / "run"
    (tmp_path / "a.lance").mkdir()
    run.mkdir()
    for where, expected in (("key < '5'", (True, "NOT (key < '5')")), (None, (True, None))):
        values = {"name": "r", "data": {"pairs": table, "where": where}, "towers": {"model": "vit-tiny-64"}}
        (run / "recipe.yaml").write_text(dump(Recipe.model_validate(values | {"objectives": {"contrastive": {}}})))
        assert held_out(str(run), f"{table}/") == expected
    assert held_out(str(run), str(tmp_path / "other.lance")) == (False, None)
    assert held_out("ViT-B-32:openai", table) == (False, None)
