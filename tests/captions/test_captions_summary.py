"""Sums over a set: vocabulary and distinct-n against plain counting, Spearman against its formula, a whole summary."""

import json
from collections import Counter
from statistics import fmean

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs_made import picture
from torchmetrics.functional import spearman_corrcoef

from cutline.captions.engine import RunConfig
from cutline.captions.score.distinct import Distinct, Vocabulary
from cutline.captions.score.plan import ScoreConfig, score
from cutline.captions.score.summary import Summary, spearman, summarise
from cutline.errors import DataError
from cutline.pairs import Pairs, create_from_rows
from cutline.scenes import SceneConfig
from cutline.scenes.write import write_pairs

CAPTIONS = st.lists(
    st.lists(st.sampled_from(["a", "dog", "Dog", "cat,", "sits", "…", "été"]), max_size=8).map(" ".join) | st.none(),
    max_size=12,
)


def plain_words(caption):
    return "".join(c if c.isalnum() or c == "_" else " " for c in caption.lower()).split()


@given(CAPTIONS, CAPTIONS)
@settings(max_examples=50)
def test_vocabulary_equals_plain_counting(first, second):
    vocabulary = Vocabulary()
    for batch in (first, second):
        vocabulary.add(pa.array(batch, pa.string()))
    captions = [c for c in [*first, *second] if c and c.strip()]
    for n, found in vocabulary.ngrams.items():
        grams = [tuple(w[i : i + n]) for w in map(plain_words, captions) for i in range(len(w) - n + 1)]
        assert (found.total, found.count) == (len(grams), len(set(grams)))
    assert (vocabulary.captions.total, vocabulary.captions.count) == (len(captions), len(set(captions)))


def test_many_different_ones_are_estimated_in_bounded_memory():
    distinct = Distinct(limit=10_000)
    hashes = np.random.default_rng(0).integers(0, 2**64, 400_000, dtype=np.uint64)
    for part in np.split(hashes, 20):
        distinct.add(part)
        distinct.add(part)
        assert len(distinct._smallest) <= 10_000
    assert distinct.full
    assert distinct.total == 800_000
    assert distinct.count == pytest.approx(400_000, rel=0.04)  # four standard errors


def plain_spearman(a, b):
    """Pearson's correlation of mean ranks, counted one by one."""

    def ranks(x):
        return [sum(v < u for v in x) + (sum(v == u for v in x) + 1) / 2 for u in x]

    p, q = ranks(a), ranks(b)
    dp, dq = [u - fmean(p) for u in p], [u - fmean(q) for u in q]
    return sum(u * v for u, v in zip(dp, dq)) / (sum(u * u for u in dp) * sum(v * v for v in dq)) ** 0.5


def test_spearman_shares_ranks_among_equal_values():
    rng = np.random.default_rng(0)
    for levels in (2, 3, 50):
        a = rng.integers(0, levels, 60).astype(np.float32)
        b = (a + rng.integers(0, 3, 60)).astype(np.float32)
        assert spearman(a, b) == pytest.approx(plain_spearman(a, b), abs=1e-9)
        theirs = spearman_corrcoef(torch.tensor(a), torch.tensor(b))
        assert spearman(a, b) == pytest.approx(float(theirs), abs=1e-5)


def test_spearman_leaves_out_what_has_no_score_and_survives_many_ties():
    a, b = np.arange(5, dtype=np.float32), np.array([0, 1, np.nan, 3, 2], np.float32)
    assert spearman(a, b) == pytest.approx(0.8)
    assert spearman(a, np.ones(5, np.float32)) is None
    flag = np.repeat([0, 1], 200_000).astype(np.float32)
    assert spearman(flag, flag) == pytest.approx(1)


def test_a_summary_equals_plain_numbers(tmp_path):
    texts = ["a red dog", "a red dog", "IMG_1.JPG", "mail me@a.org", None, "the dog and the dog and the dog"]
    rows = [{"key": str(i), "image": picture(i), "alt": t} for i, t in enumerate(texts)]
    create_from_rows(tmp_path / "t.lance", rows)
    pairs, _ = score(Pairs.open(tmp_path / "t.lance"), ScoreConfig(column="alt"), "s", RunConfig(), show=False)
    s = summarise(pairs, "alt", "s", tmp_path / "out")
    words = [w for t in texts if t for w in plain_words(t)]
    assert (s.rows, s.with_caption, s.captions) == (6, 5, 5)
    assert (s.words, s.vocabulary, s.exact) == (len(words), len(set(words)), True)
    assert s.distinct["1"] == len(set(words)) / len(words)
    assert s.duplicates == pytest.approx(1 / 5)
    assert s.flags == {"truncated": 0, "filename": 0.2, "boilerplate": 0.2, "email": 0.2, "phone": 0}
    assert s.languages == dict(Counter(filter(None, (r["s_language"] for r in pairs.read(range(6), ["s_language"])))))
    tokens = [r["s_tokens"] for r in pairs.read([0, 1, 2, 3, 5], ["s_tokens"])]
    n = s.numbers["tokens"]
    assert (n.count, n.mean, n.least, n.most) == (5, pytest.approx(fmean(tokens)), min(tokens), max(tokens))
    assert n.quantiles["0.5"] == sorted(tokens)[2]
    assert Summary.model_validate_json((tmp_path / "out" / "summary.json").read_text()) == s
    assert (tmp_path / "out" / "scores.png").read_bytes()[:4] == b"\x89PNG"


def test_scores_are_judged_by_the_truth_of_scenes(tmp_path):
    write_pairs(SceneConfig(n=40, size=48, seed=1), tmp_path / "s.lance")
    pairs = Pairs.open(tmp_path / "s.lance")
    pairs, _ = score(pairs, ScoreConfig(column="alt", truth=True), "a", RunConfig(), show=False)
    pairs, _ = score(pairs, ScoreConfig(column="captions", truth=True), "c", RunConfig(), show=False)
    alt, ours = summarise(pairs, "alt", "a", tmp_path / "out"), summarise(pairs, "captions", "c")
    assert (ours.captions, ours.truth["object_precision"], ours.truth["relation_precision"]) == (200, 1, 1)
    assert alt.truth["object_recall"] < 0.5 < ours.truth["object_recall"]
    counts = [r["a_counts"] for r in pairs.read(range(40), ["a_counts"]) if r["a_counts"]]
    right, named = (sum(c[k] for c in counts) for k in ("objects_right", "objects_named"))
    assert alt.truth["object_precision"] == pytest.approx(right / named)
    read = pairs.read(range(40), ["a_boilerplate", "a_object_f1"])
    both = [(r["a_boilerplate"], r["a_object_f1"]) for r in read if r["a_object_f1"] is not None]
    assert alt.spearman["boilerplate"]["object_f1"] == pytest.approx(plain_spearman(*zip(*both)), abs=1e-6)
    assert alt.spearman["boilerplate"]["object_f1"] < 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["spearman"] == alt.spearman


def test_a_row_that_failed_leaves_a_gap_and_shifts_no_score(tmp_path):
    rows = [{"key": str(i), "image": picture(i), "alt": "x", "captions": [f"a dog {i}", "a cat"]} for i in range(4)]
    rows[0]["image"] = picture(1)[:40]
    create_from_rows(tmp_path / "t.lance", rows, max_bad=1)
    config = ScoreConfig(column="captions", model="scratch:vit-tiny-64", only=["tokens", "clip"])
    pairs, reports = score(Pairs.open(tmp_path / "t.lance"), config, "s", RunConfig(max_bad=0.5), show=False)
    assert [r.bad for r in reports] == [0, 1]
    s = summarise(pairs, "captions", "s")
    assert (s.numbers["tokens"].count, s.numbers["clip"].count) == (8, 6)


def test_a_column_without_captions_is_summed_up_and_drawn(tmp_path):
    create_from_rows(tmp_path / "t.lance", [{"key": "a", "image": picture(1), "alt": "a dog"}])
    pairs = Pairs.open(tmp_path / "t.lance").add_column("nothing", [None], type="string")
    pairs, _ = score(pairs, ScoreConfig(column="nothing", only=["tokens"]), "s", RunConfig(), show=False)
    assert summarise(pairs, "nothing", "s", tmp_path / "out").captions == 0
    assert (tmp_path / "out" / "scores.png").exists()


def test_a_column_without_scores_is_told(tmp_path):
    create_from_rows(tmp_path / "t.lance", [{"key": "a", "image": picture(1), "alt": "a dog"}])
    pairs, _ = score(
        Pairs.open(tmp_path / "t.lance"), ScoreConfig(column="alt", only=["tokens"]), "s", RunConfig(), show=False
    )
    with pytest.raises(DataError, match="no scores x_… of 'alt'"):
        summarise(pairs, "alt", "x")
