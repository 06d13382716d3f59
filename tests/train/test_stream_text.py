"""Which text a picture gets: weights, fallbacks, rules."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cutline.errors import ConfigError
from cutline.train.stream.order import draws
from cutline.train.stream.text import TextConfig

ROW = {"alt": "a", "captions": ["x", "y", "z"], "none": None, "blank": ["", "  "]}


def many(config: TextConfig, row: dict, n: int = 6000) -> list[dict[str, list[str]]]:
    return [config.choose(row, draws(0, 0, i, "text")) for i in range(n)]


def test_sample_follows_the_weights_and_is_even_within_a_column() -> None:
    chosen = [c["text"][0] for c in many(TextConfig(columns={"alt": 1.0, "captions": 3.0}), ROW)]
    shares = {t: chosen.count(t) / len(chosen) for t in "axyz"}
    assert shares == pytest.approx({"a": 0.25, "x": 0.25, "y": 0.25, "z": 0.25}, abs=0.02)


def test_null_and_blank_captions_fall_back_to_the_other_columns() -> None:
    config = TextConfig(columns={"none": 5.0, "blank": 5.0, "alt": 1.0, "captions": 1.0})
    chosen = [c["text"][0] for c in many(config, ROW)]
    assert chosen.count("a") / len(chosen) == pytest.approx(0.5, abs=0.03)
    assert "" not in chosen


def test_nothing_to_say_gives_the_empty_text() -> None:
    for rule in ("sample", "all"):
        config = TextConfig(columns={"none": 1.0, "blank": 1.0}, rule=rule)
        assert config.choose(ROW, draws(0, 0, 0, "text")) == {"text": [""]}


def test_sum_gives_a_text_per_column_and_the_weights_to_the_loss() -> None:
    config = TextConfig(columns={"alt": 1.0, "captions": 2.0, "none": 1.0}, rule="sum")
    chosen = many(config, ROW)
    assert config.sources == ["alt", "captions", "none"]
    assert config.weights == {"alt": 1.0, "captions": 2.0, "none": 1.0}
    assert {c["alt"][0] for c in chosen} == {"a"}
    assert {c["captions"][0] for c in chosen} == {"x", "y", "z"}
    stands_in = [c["none"][0] for c in chosen]
    assert stands_in.count("a") / len(stands_in) == pytest.approx(1 / 3, abs=0.03)


def test_all_gives_every_caption_or_a_random_subset() -> None:
    columns = {"alt": 1.0, "captions": 1.0, "none": 1.0}
    assert TextConfig(columns=columns, rule="all").choose(ROW, draws(0, 0, 0, "t")) == {"text": ["a", "x", "y", "z"]}
    chosen = many(TextConfig(columns=columns, rule="all", max_texts=2), ROW)
    counts = np.array([sum(t in c["text"] for c in chosen) for t in "axyz"]) / len(chosen)
    assert {len(c["text"]) for c in chosen} == {2}
    assert counts == pytest.approx(0.5, abs=0.03)


@given(
    st.lists(st.one_of(st.none(), st.text(), st.lists(st.text(), max_size=3)), min_size=3, max_size=3),
    st.integers(0, 99),
)
def test_a_text_is_empty_only_where_all_columns_are(values: list, row: int) -> None:
    record = dict(zip("abc", values, strict=True))
    flat = [t for v in values for t in ([v] if isinstance(v, str) else v or []) if t.strip()]
    for rule in ("sample", "sum", "all"):
        config = TextConfig(columns=dict.fromkeys("abc", 1.0), rule=rule, max_texts=20)
        chosen = [t for texts in config.choose(record, draws(0, 0, row, "t")).values() for t in texts]
        assert all(t in flat for t in chosen) if flat else set(chosen) == {""}


def test_weights_must_be_above_zero_and_a_column_be_there() -> None:
    for columns in ({"alt": 0.0}, {"alt": -1.0}, {}):
        with pytest.raises(ValidationError):
            TextConfig(columns=columns)


@pytest.mark.parametrize("value", [3, [1.0, 2.0], {"a": 1}, np.zeros(2)])
def test_a_column_that_is_no_text_is_named(value: object) -> None:
    with pytest.raises(ConfigError, match="'alt' holds no text"):
        TextConfig().choose({"alt": value}, draws(0, 0, 0, "text"))
