"""Choosing captions: each rule against the same rule written plainly, with nulls, NaN, ties, lists and filters."""

import math

import numpy as np
import pytest
from pairs_made import picture
from processes import run_cutline

from cutline.captions.engine import RunConfig, run
from cutline.captions.select import SelectConfig, select
from cutline.config import check
from cutline.errors import ConfigError, DataError
from cutline.pairs import Pairs, Provenance, create_from_rows

N = 60
NAN = float("nan")


@pytest.fixture
def pairs(tmp_path) -> Pairs:
    """60 rows: texts `alt` and `ours` and lists `many`, with scores that hold null, NaN and ties."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(N):
        scores = rng.random(3).round(1).tolist()  # rounded: many are equal
        rows.append({
            "key": f"k{i:03d}", "image": picture(i % 5), "alt": f"alt {i}" if i % 7 else None, "ours": f"ours {i}",
            "s_alt": scores[0] if i % 7 else None, "s_ours": NAN if i % 11 == 3 else scores[1],
            "many": [f"{i} a", f"{i} b"] if i % 5 else None, "s_many": scores[1:] if i % 5 else None,
            "vr": scores[0] - 0.2, "vc": scores[1], "rc": scores[2] if i != 9 else None,
        })  # fmt: skip
    create_from_rows(tmp_path / "t.lance", rows)
    return Pairs.open(tmp_path / "t.lance")


def chosen(pairs, name="chosen", **options):
    """The new column as a list, after the rule was run as a work of its own."""
    rows, work = select(pairs, SelectConfig(**options), name)
    done, _ = run(rows, work, name, RunConfig(batch=16), show=False)
    done = Pairs.open(done.path)
    return [row[name] for row in done.read(range(N), [name])]


def column(pairs, name):
    return [row[name] for row in pairs.read(range(N), [name])]


def test_where_keeps_the_rows_of_a_filter(pairs):
    got = chosen(pairs, rule="where", columns=["ours"], where="s_alt >= 0.5 AND alt IS NOT NULL")
    assert got == [
        o if s is not None and s >= 0.5 else None for o, s in zip(column(pairs, "ours"), column(pairs, "s_alt"))
    ]
    assert 5 < sum(o is not None for o in got) < 50


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.77, 1.0])
def test_top_fraction_takes_exactly_so_many_of_the_scored_and_the_best(pairs, fraction):
    got = chosen(pairs, rule="top-fraction", columns=["ours"], by=["s_ours"], fraction=fraction)
    scores = column(pairs, "s_ours")
    scored = [s for s in scores if not math.isnan(s)]
    kept = [s for s, o in zip(scores, got) if o is not None]
    assert len(kept) == max(1, math.floor(fraction * len(scored) + 0.5))
    assert sorted(kept) == sorted(scored)[len(scored) - len(kept) :]


def test_ties_do_not_prefer_the_beginning_and_are_the_same_at_every_start(pairs):
    options = {"rule": "top-fraction", "columns": ["ours"], "by": ["flat"], "fraction": 0.5}
    pairs = pairs.add_column("flat", [1.0] * N)
    kept = [i for i, o in enumerate(chosen(pairs, "one", **options)) if o is not None]
    assert len(kept) == N // 2
    assert 5 < sum(i < N // 2 for i in kept) < N // 2 - 5
    assert [i for i, o in enumerate(chosen(pairs, "two", **options)) if o is not None] == kept


def test_top_fraction_of_lists_takes_captions_one_by_one(pairs):
    got = chosen(pairs, rule="top-fraction", columns=["many"], by=["s_many"], fraction=0.25)
    pool = [(s, c) for cs, ss in zip(column(pairs, "many"), column(pairs, "s_many")) if cs for c, s in zip(cs, ss)]
    kept = [c for row in got if row for c in row]
    assert len(kept) == len(pool) // 4
    floor = min(s for s, c in pool if c in kept)
    assert all(c in kept for s, c in pool if s > floor)
    assert [] not in got


def test_the_threshold_is_noted(pairs):
    _, work = select(pairs, SelectConfig(rule="top-fraction", columns=["ours"], by=["s_ours"], fraction=0.3), "x")
    noted = work.provenance()
    assert (noted.how, noted.inputs) == ("caption select", ["ours", "s_ours"])
    assert noted.settings["fraction"] == 0.3
    scores = sorted(s for s in column(pairs, "s_ours") if not math.isnan(s))
    assert noted.settings["threshold"] == scores[-noted.settings["chosen"]]


def test_best_of_takes_the_caption_with_the_highest_score(pairs):
    got = chosen(pairs, "best", rule="best-of", columns=["alt", "ours", "many"], by=["s_alt", "s_ours", "s_many"])
    source = column(Pairs.open(pairs.path), "best_from")
    rows = pairs.read(range(N), ["alt", "ours", "many", "s_alt", "s_ours", "s_many"])
    for row, text, name in zip(rows, got, source, strict=True):
        pool = [("alt", row["alt"], row["s_alt"]), ("ours", row["ours"], row["s_ours"])]
        pool += [("many", c, s) for c, s in zip(row["many"] or [], row["s_many"] or [])]
        pool = [p for p in pool if p[1] and p[2] is not None and not math.isnan(p[2])]
        first = max(pool, key=lambda p: p[2]) if pool else (None, None)  # max takes the first of equal ones
        assert (name, text) == first[:2]
    assert {"alt", "ours", "many", None} >= set(source) >= {"alt", "ours", "many"}


def test_alip_weights_equal_their_formula(pairs):
    rows, work = select(pairs, SelectConfig(rule="alip", columns=["alt", "ours"], by=["vr", "vc", "rc"]), "w")
    run(rows, work, "w", RunConfig(), show=False)
    cosines = [[r["vr"], r["vc"], r["rc"]] for r in pairs.read(range(N), ["vr", "vc", "rc"])]
    means = [np.mean([c[k] for c in cosines if c[k] is not None]) for k in range(3)]
    for (vr, vc, rc), row in zip(cosines, Pairs.open(pairs.path).read(range(N), ["w_alt", "w_ours"]), strict=True):
        if rc is None:
            assert row == {"w_alt": None, "w_ours": None}
            continue
        gate = np.exp(rc - means[2]) ** 2
        sample = min(1.0, gate)
        for name, cosine, mean in (("w_alt", vr, means[0]), ("w_ours", vc, means[1])):
            pair = np.exp(cosine - mean) ** 2 if gate < 1 else 1.0
            assert row[name] == pytest.approx(sample * pair, rel=1e-6)


def test_a_rule_sees_only_the_rows_of_a_filtered_table(pairs):
    some = pairs.where("vc > 0.5")
    got = chosen(some, rule="top-fraction", columns=["ours"], by=["s_alt"], fraction=0.5)
    inside = [v > 0.5 for v in column(pairs, "vc")]
    scored = sum(s is not None for s, i in zip(column(pairs, "s_alt"), inside) if i)
    assert sum(o is not None for o in got) == math.floor(0.5 * scored + 0.5)
    assert all(i for i, o in zip(inside, got) if o is not None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "where", "columns": ["ours"]}, "--where"),
        ({"rule": "top-fraction", "columns": ["ours"], "by": ["s_ours"]}, "--fraction"),
        ({"rule": "top-fraction", "columns": ["ours"], "by": ["s_ours"], "fraction": 0.0}, "greater than 0"),
        ({"rule": "best-of", "columns": ["ours", "alt"], "by": ["s_ours"]}, "takes 2 columns and 2 scores"),
        ({"rule": "alip", "columns": ["alt", "ours"], "by": ["vr"]}, "takes 2 columns and 3 scores"),
        ({"rule": "best", "columns": ["ours"]}, "rule"),
    ],
)
def test_options_that_do_not_fit_the_rule_are_told(options, message):
    with pytest.raises(ConfigError, match=message):
        check(SelectConfig, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "where", "columns": ["ours"], "where": "gone > 1"}, "cannot be used"),
        ({"rule": "top-fraction", "columns": ["many"], "by": ["s_ours"], "fraction": 0.3}, "does not hold the scores"),
        ({"rule": "top-fraction", "columns": ["ours"], "by": ["alt"], "fraction": 0.3}, "not scores"),
        ({"rule": "top-fraction", "columns": ["ours"], "by": ["empty"], "fraction": 0.3}, "no caption has a score"),
        ({"rule": "alip", "columns": ["many", "ours"], "by": ["vr", "vc", "rc"]}, "holds lists"),
    ],
)
def test_columns_that_do_not_fit_the_rule_are_told(pairs, options, message):
    pairs = pairs.add_column("empty", [None] * N, type="float32")
    with pytest.raises(DataError, match=message):
        select(pairs, SelectConfig(**options), "x")


def test_scores_by_different_models_are_not_compared(pairs):
    for name, column_, model in (("a_clip", "alt", "one"), ("o_clip", "ours", "two")):
        settings = {"column": column_, "prefix": name[0], "prompt": ""}
        made = Provenance(how="caption score", model=model, settings=settings)
        pairs = pairs.add_column(name, [0.5] * N, provenance=made)
    with pytest.raises(DataError, match="model 'one' against 'two'"):
        select(pairs, SelectConfig(rule="best-of", columns=["alt", "ours"], by=["a_clip", "o_clip"]), "x")
    with pytest.raises(DataError, match="not hold the scores of 'alt', but of 'ours'"):
        select(pairs, SelectConfig(rule="best-of", columns=["alt", "ours"], by=["o_clip", "a_clip"]), "x")


def test_alip_refuses_scores_that_are_no_cosines_or_stand_in_another_order(pairs):
    with pytest.raises(DataError, match="'big' holds no cosines"):
        select(
            pairs.add_column("big", [2.0] * N),
            SelectConfig(rule="alip", columns=["alt", "ours"], by=["big", "vc", "rc"]),
            "w",
        )
    made = Provenance(how="caption score", settings={"column": "ours", "prefix": "p", "scores": ["cosine"]})
    pairs = pairs.add_column("p_cosine", [0.1] * N, provenance=made)
    with pytest.raises(DataError, match="'p_cosine' is cosine of 'ours' where cosine of 'alt' belongs"):
        select(pairs, SelectConfig(rule="alip", columns=["alt", "ours"], by=["p_cosine", "vc", "rc"]), "w")


def test_scores_of_captions_that_are_not_there_do_not_count(pairs):
    pairs = pairs.add_column("s", [float(i) for i in range(N)]).add_column(
        "late", ["x" if i < 30 else None for i in range(N)]
    )
    got = chosen(pairs, rule="top-fraction", columns=["late"], by=["s"], fraction=0.5)
    assert [i for i, o in enumerate(got) if o] == [*range(15, 30)]


def test_the_command_writes_weights_and_says_how_many_were_chosen(pairs):
    done = run_cutline(
        "caption", "select", pairs.path, "--rule", "alip", "--columns", "alt, ours", "--by", "vr,vc,rc", "--as", "w"
    )
    assert done.returncode == 0, done.stderr
    assert {"w_alt", "w_ours"} <= set(Pairs.open(pairs.path).columns)
    done = run_cutline(
        "caption", "select", pairs.path, "--rule", "where", "--columns", "ours", "--where", "s_alt >= 0.5", "--as", "c"
    )
    n = sum(s is not None and s >= 0.5 for s in column(pairs, "s_alt"))
    assert f"c: chosen in {n} of 60 rows" in done.stdout
