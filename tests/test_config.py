"""Recipes: what a wrong key or value says, and what overrides do."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from cutline.config import Config, dump, load
from cutline.errors import ConfigError

# PyYAML itself does not bring control characters back unharmed.
NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1)


class Inner(Config):
    rate: float = Field(0.1, gt=0)
    name: str = "x"


class Outer(Config):
    inner: Inner = Inner()
    columns: dict[str, float] = Field(default_factory=dict)
    steps: int = 10
    maybe: Inner | None = None
    custom: dict[str, Any] | None = None


class Whole(Config):
    outer: Outer = Outer()


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "r.yaml").write_text(text)
    return tmp_path / "r.yaml"


def test_unknown_key_names_key_line_and_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown key 'inner.rat' \(.*r.yaml, line 3\): did you mean 'rate'\?"):
        load(Outer, write(tmp_path, "steps: 3\ninner:\n  rat: 1\n"))


def test_unknown_key_in_an_optional_section_is_found_too(tmp_path):
    with pytest.raises(ConfigError, match="unknown key 'maybe.nam'.*line 2.*did you mean 'name'"):
        load(Outer, write(tmp_path, "maybe:\n  nam: 1\n"))


def test_ill_typed_value_names_key_line_and_value(tmp_path):
    with pytest.raises(ConfigError, match=r"steps \(.*line 1\).*integer.*'many'"):
        load(Outer, write(tmp_path, "steps: many\n"))


def test_wrong_override_is_blamed_on_the_override(tmp_path):
    with pytest.raises(ConfigError, match=r"inner.rate \(override 'inner.rate=-1'\).*greater than 0"):
        load(Outer, write(tmp_path, "inner: {rate: 0.5}\n"), ["inner.rate=-1"])


def test_overrides_are_yaml_and_merge(tmp_path):
    got = load(Outer, write(tmp_path, "inner: {rate: 0.5}\n"), ["inner.name=y", "columns={a: 1, b: 2}", "steps=7"])
    assert got == Outer(inner=Inner(rate=0.5, name="y"), columns={"a": 1, "b": 2}, steps=7)


def test_an_override_of_free_keys_replaces_them_and_one_of_a_section_merges(tmp_path):
    path = write(tmp_path, "inner: {rate: 0.5}\ncolumns: {a: 1, b: 2}\n")
    assert load(Outer, path, ["columns={c: 3}", "inner={name: y}"]) == Outer(
        inner=Inner(rate=0.5, name="y"), columns={"c": 3}
    )
    assert load(Outer, path, ["columns.c=3"]).columns == {"a": 1, "b": 2, "c": 3}


def test_free_keys_that_may_be_null_or_stand_in_a_section_are_replaced_too(tmp_path):
    path = write(tmp_path, "outer: {columns: {a: 1}, custom: {width: 8, depth: {a: 1}}, steps: 7}\n")
    assert load(Whole, path, ["outer.custom={depth: {b: 1}}"]).outer.custom == {"depth": {"b": 1}}
    got = load(Whole, path, ["outer={columns: {b: 2}, custom: {height: 4}}"]).outer
    assert (got.columns, got.custom, got.steps) == ({"b": 2}, {"height": 4}, 7)
    assert load(Whole, path, ["outer.custom.width=9"]).outer.custom == {"width": 9, "depth": {"a": 1}}


def test_keys_with_capitals_are_named_too(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown key 'Steps' \(.*line 1\): did you mean 'steps'"):
        load(Outer, write(tmp_path, "Steps: 3\n"))
    with pytest.raises(ConfigError, match=r"columns.Alt \(.*line 2\).*number"):
        load(Outer, write(tmp_path, "columns:\n  Alt: much\n"))


def test_a_picture_is_no_recipe(tmp_path):
    (tmp_path / "p.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ConfigError, match="p.jpg.*not UTF-8"):
        load(Outer, tmp_path / "p.jpg")


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("a: [", [], "not valid YAML"),
        ("- 1\n", [], "must hold a mapping"),
        ("", ["steps"], "not of the form key=value"),
    ],
)
def test_what_is_no_recipe_says_so(tmp_path, text, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(Outer, write(tmp_path, text), overrides)


def test_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        load(Outer, tmp_path / "none.yaml")


@given(st.builds(Outer, columns=st.dictionaries(NAMES, st.floats(allow_nan=False, allow_infinity=False))))
def test_dump_and_load_give_the_same_config(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("c") / "r.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(Outer, path) == config
