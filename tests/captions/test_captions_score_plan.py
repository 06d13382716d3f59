"""Which scores are made of what is given, and making them of a table: columns, second starts, columns that are taken."""

import pytest

from cutline.captions.engine import RunConfig
from cutline.captions.score import text, truth
from cutline.captions.score.plan import ScoreConfig, names, score, works
from cutline.captions.select import SelectConfig, select
from cutline.config import check
from cutline.errors import ConfigError, DataError
from cutline.pairs import Pairs
from cutline.scenes import SceneConfig
from cutline.scenes.write import write_pairs

MODEL = "scratch:vit-tiny-64"


@pytest.fixture
def scenes(tmp_path) -> Pairs:
    write_pairs(SceneConfig(n=20, size=48, seed=2, mix="mild"), tmp_path / "s.lance")
    return Pairs.open(tmp_path / "s.lance")


def wanted(pairs, **options):
    return names(pairs, ScoreConfig(**{"column": "captions"} | options))


def test_all_scores_are_made_that_can_be(scenes):
    assert wanted(scenes) == list(text.KINDS)
    assert wanted(scenes, model=MODEL) == [*text.KINDS, "clip", "alt_cosine"]
    assert wanted(scenes, model=MODEL, column="alt", reference="captions") == [*text.KINDS, "clip", "refclip"]
    assert wanted(scenes, truth=True) == [*text.KINDS, *truth.KINDS]
    assert wanted(scenes, only=["cosine", "tokens"], model=MODEL) == ["tokens", "cosine"]
    assert [p.name for p in works(scenes, ScoreConfig(column="alt", only=["tokens", "counts"]), "s")] == [
        "text",
        "truth",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["clip"]}, "--with MODEL"),
        ({"reference": "alt"}, "--with MODEL"),
        ({"only": ["refclip"], "model": MODEL}, "--reference COLUMN"),
        ({"model": MODEL, "reference": "captions"}, "with itself"),
        ({"only": ["alt_cosine"], "model": MODEL, "column": "alt"}, "with itself"),
        ({"model": MODEL, "reference": "gone"}, "has no column 'gone'"),
        ({"model": MODEL, "reference": "width"}, "holds int32, not captions"),
    ],
)
def test_what_does_not_fit_together_is_told(scenes, options, message):
    with pytest.raises((ConfigError, DataError), match=message):
        wanted(scenes, **options)


def test_an_unknown_score_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'tokens'"):
        check(ScoreConfig, {"column": "alt", "only": ["token"]})


def test_columns_without_text_are_refused(scenes):
    with pytest.raises(DataError, match="holds int32, not captions"):
        works(scenes, ScoreConfig(column="width"), "s")


def test_scores_become_columns_and_a_second_start_keeps_them(scenes):
    config = ScoreConfig(column="captions", model=MODEL, truth=True, only=["tokens", "clip", "object_f1"])
    done, reports = score(scenes, config, "s", RunConfig(batch=8), show=False)
    assert [r.columns for r in reports] == [["s_tokens"], [f"s_{n}" for n in truth.KINDS], ["s_clip"]]
    row = done.read([3], ["captions", "s_tokens", "s_clip", "s_object_f1", "s_counts"])[0]
    assert len(row["s_tokens"]) == len(row["s_clip"]) == len(row["s_counts"]) == len(row["captions"]) == 5
    assert min(row["s_object_f1"]) > 0.5
    made = done.provenance("s_clip")
    assert (made.how, made.model, made.inputs) == ("caption score", MODEL, ["image", "captions"])
    again, reports = score(Pairs.open(scenes.path), config, "s", RunConfig(), show=False)
    assert reports == []
    assert again.version == done.version


def test_a_column_of_other_scores_is_not_written_over(scenes):
    score(scenes, ScoreConfig(column="alt", only=["tokens"]), "s", RunConfig(), show=False)
    with pytest.raises(DataError, match="has a column 's_tokens' already"):
        score(scenes, ScoreConfig(column="captions", only=["tokens", "email"]), "s", RunConfig(), show=False)
    assert "s_email" not in Pairs.open(scenes.path).columns


def test_scores_of_captions_that_were_written_anew_are_refused(scenes):
    pairs = scenes.add_column("cap", ["a short one"] * len(scenes))
    config = ScoreConfig(column="cap", only=["tokens"])
    pairs = score(pairs, config, "s", RunConfig(), show=False)[0].drop("cap")
    pairs = pairs.add_column("cap", ["one that has many more words than the first"] * len(scenes))
    with pytest.raises(DataError, match="'cap' was written anew since 's_tokens' was made from it: drop 's_tokens'"):
        score(pairs, config, "s", RunConfig(), show=False)
    for rule in (
        {"rule": "where", "where": "s_tokens < 5"},
        {"rule": "top-fraction", "by": ["s_tokens"], "fraction": 0.5},
    ):
        with pytest.raises(DataError, match="'cap' was written anew since 's_tokens'"):
            select(pairs, SelectConfig(columns=["cap"], **rule), "chosen")


def test_scores_of_some_rows_are_not_taken_for_those_of_all(scenes):
    config = ScoreConfig(column="captions", only=["tokens"])
    some = Pairs.open(scenes.path, where="key = 's2-00000000'")
    score(some, config, "s", RunConfig(), show=False)
    assert score(some, config, "s", RunConfig(), show=False)[1] == []
    with pytest.raises(DataError, match="has a column 's_tokens' already"):
        score(scenes, config, "s", RunConfig(), show=False)
