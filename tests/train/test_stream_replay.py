"""Replayed augmentations: the teacher's pixels to the bit, and its vectors of what was drawn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from reinforce_made import rows, run, table, teacher
from torch import Tensor

from cutline.captions.reinforce import AUGMENTATIONS, ReinforceConfig, reinforce_work, vectors
from cutline.errors import ConfigError, DataError
from cutline.objectives.base import Batch, View
from cutline.pairs import Pairs, Provenance
from cutline.train.stream import Augment, Cached, Stream, TextConfig, open_source
from cutline.train.stream.replay import DRAWN, IMAGE, TEACHERS, TEXT

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
TEXTS = TextConfig(columns={"alt": 1.0, "captions": 1.0})


class Letters:
    """A tokeniser of one token per character."""

    def __call__(self, texts: list[str]) -> Tensor:
        return torch.tensor([([ord(c) for c in t] + [0] * 32)[:32] for t in texts])

    def trimmed(self, tokens: Tensor) -> Tensor:
        return tokens

    def truncated(self, texts: list[str], tokens: Tensor | None = None) -> int:
        return 0


def stream(source: Any, **options: Any) -> Stream:
    defaults: dict[str, Any] = {
        "batch": 6, "size": 32, "mean": MEAN, "std": STD, "seed": 3, "replay": "dr", "columns": [IMAGE, TEXT],
        "text": TEXTS, "tokenizer": Letters(), "threads": 0, "max_bad": 0.0,
    }  # fmt: skip
    return Stream(source, **(defaults | options))


@pytest.fixture(scope="module")
def reinforced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pairs, Any]:
    """A table with stored augmentations, and the uint8 views that the teacher of 32 px was shown, by key."""
    folder = tmp_path_factory.mktemp("reinforced")
    pairs = table(folder / "t.lance")
    augment = Augment(scale=(0.08, 1.0), flip=0.5, operations=2)
    names = [teacher(folder, 32, 24, 0.4)]
    config = ReinforceConfig(teachers=names, texts=["alt", "captions"], augmentations=4, augment=augment)
    work = reinforce_work(pairs, config)
    prepared = work.load().prepare(rows())
    views = {row["key"]: v for row, v in zip(rows(), prepared.views[32].split(4), strict=True)}
    return run(pairs, work), views


def texts_of(batch: Batch, source: str = "text") -> list[str]:
    return ["".join(chr(c) for c in row if c) for row in batch.texts[source].tokens]


def test_views_are_those_the_teacher_saw_to_the_bit(reinforced: tuple[Pairs, dict[str, Tensor]]) -> None:
    """Also beside a large view, for which the picture is decoded whole; all augmentations are met in time."""
    pairs, seen = reinforced
    for views in ({}, {"large": View(size=200, scale=(0.2, 0.3))}):
        met = set()
        for batch in stream(pairs, mean=(0, 0, 0), std=(1 / 255,) * 3, views=views).batches(24):
            for key, drawn, view in zip(batch.keys, batch.columns[DRAWN].tolist(), batch.views["image"], strict=True):
                assert torch.equal(view.round().byte(), seen[key][drawn]), (key, drawn)
                met.add((key, drawn))
        assert len(met) > 44
    stored = [a for r in pairs.read(range(12), ["dr_augment"]) for a in r["dr_augment"]]
    assert 8 < sum(min(a["height"], a["width"]) >= 64 for a in stored) < 40  # decoded at a half or less, and not


@pytest.mark.parametrize("rule", ["sample", "sum", "all"])
def test_vectors_belong_to_what_was_drawn(reinforced: tuple[Pairs, Any], rule: Any) -> None:
    pairs, _ = reinforced
    text = TEXTS.model_copy(update={"rule": rule})
    stored = {r["key"]: r for r in pairs.read(range(12), pairs.columns)}
    met = 0
    for batch in stream(pairs, text=text).batches(6):
        assert batch.columns[IMAGE].shape == (6, 24)
        assert batch.columns[IMAGE].dtype == torch.float16
        for key, drawn, vector in zip(batch.keys, batch.columns[DRAWN].tolist(), batch.columns[IMAGE], strict=True):
            assert vector.numpy().tolist() == np.asarray(stored[key]["dr_image"][drawn]).tolist()
        for source, texts in batch.texts.items():
            found = batch.columns[f"{TEXT}/{source}"]
            assert len(found) == len(texts.owners) >= 6
            for said, owner, vector in zip(texts_of(batch, source), texts.owners.tolist(), found, strict=True):
                row = stored[batch.keys[owner]]
                of = {row["alt"]: ("alt", 0)} | {c: ("captions", i) for i, c in enumerate(row["captions"] or [])}
                column, place = of[said]
                assert vector.tolist() == np.asarray(row[f"dr_text_{column}"][place]).tolist()
                met += column == "captions" and place > 0
        assert [(t.width, t.size) for t in batch.columns[TEACHERS]] == [(24, 32)]
    assert met > 3


def test_nothing_to_say_has_the_vector_of_the_empty_text(reinforced: tuple[Pairs, Any]) -> None:
    pairs, _ = reinforced
    only = pairs.where("alt IS NULL")
    batch = next(iter(stream(only, batch=1, text=TextConfig())))
    assert texts_of(batch) == [""]
    assert (
        batch.columns[f"{TEXT}/text"][0].tolist()
        == np.asarray(only.read([0], ["dr_text_alt"])[0]["dr_text_alt"][0]).tolist()
    )


def test_batches_are_a_pure_function_of_seed_epoch_and_position(reinforced: tuple[Pairs, Any]) -> None:
    pairs, _ = reinforced
    options: dict[str, Any] = {"views": {"local": View(size=16, count=2)}}
    whole = list(stream(pairs, **options).batches(8))
    later = stream(Cached(open_source(pairs.path)), **options, threads=3)
    later.step = 3
    for a, b in zip(whole[3:], later.batches(8), strict=True):
        assert a.keys == b.keys
        assert a.columns.keys() == b.columns.keys() == {DRAWN, IMAGE, f"{TEXT}/text", TEACHERS}
        assert all(torch.equal(a.columns[k], b.columns[k]) for k in (DRAWN, IMAGE, f"{TEXT}/text"))
        assert all(torch.equal(a.views[k], b.views[k]) for k in a.views)
    assert any(not torch.equal(a.columns[DRAWN], b.columns[DRAWN]) for a, b in zip(whole, stream(pairs, seed=4)))


def test_what_is_drawn_without_replay_stays_as_it_was(reinforced: tuple[Pairs, Any]) -> None:
    pairs, _ = reinforced
    options: dict[str, Any] = {"columns": (), "views": {"large": View(size=200, count=2, scale=(0.2, 0.3))}}
    plain, replayed = (next(iter(stream(pairs, replay=r, **options))) for r in (None, "dr"))
    assert plain.keys == replayed.keys
    assert texts_of(plain) == texts_of(replayed)
    assert plain.columns == {}
    assert list(replayed.columns) == [DRAWN]
    assert not torch.equal(plain.views["image"], replayed.views["image"])
    assert torch.equal(plain.views["large"], replayed.views["large"])


CROP = {"top": 0, "left": 0, "height": 8, "width": 8, "flip": False, "operations": []}
GOOD: dict[str, list[Any]] = {  # a row's values
    "dr_augment": [[CROP, CROP]], "dr_image": [[[0.5] * 4] * 2], "dr_text_alt": [[[0.5] * 4]],
}  # fmt: skip


def add(
    pairs: Pairs, width: int = 4, settings: dict[str, Any] | None = None, read: dict[str, str] | None = None,
    **columns: list[Any],
) -> Pairs:  # fmt: skip
    """The columns of a small reinforcement, with values that the test chooses."""
    settings = {"teachers": [{"name": "t", "width": 4}]} if settings is None else settings
    for name, value in GOOD.items():
        kind = AUGMENTATIONS if name == "dr_augment" else vectors(width)
        found = columns.get(name, value * len(pairs))
        made = Provenance(how="test", settings=settings, read=read or {})
        pairs = pairs.add_column(name, pa.array(found, kind), provenance=made)
    return pairs


def plain(pairs: Pairs, **options: Any) -> Stream:
    return stream(pairs, **({"batch": 4, "text": TextConfig(), "max_bad": 0.9} | options))


OUTSIDE = CROP | {"top": 60, "left": 3}
ODD = CROP | {"operations": [{"name": "Blur", "amount": 1.0}]}
NAN = [[0.5, 0.5, float("nan"), 0.5]] * 2


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("dr_augment", None, r"no stored augmentation \(leave out by where: dr_augment IS NOT NULL\)"),
        ("dr_augment", [OUTSIDE] * 2, r"stored crop outside the picture \(k0: 8 × 8 at \(60, 3\) of 50 × 70"),
        ("dr_augment", [ODD] * 2, r"unknown stored operation \(k0: Blur 1.0"),
        ("dr_image", NAN, r"dr_image is not finite \(k0: vector"),
        ("dr_text_alt", NAN[:1], r"dr_text_alt is not finite \(k0: vector 0"),
        ("dr_text_alt", None, r"dr_text_alt is null \(k0"),
    ],
)
def test_a_row_that_cannot_be_replayed_is_replaced_and_counted(
    tmp_path: Path, column: str, value: Any, reason: str
) -> None:
    pairs = add(table(tmp_path / "t.lance", 6), **{column: [value] + GOOD[column] * 5})
    batches = list(plain(pairs).batches(6))
    assert "k0" not in {k for b in batches for k in b.keys}
    with pytest.raises(DataError, match=reason):
        list(plain(pairs, max_bad=0.0, batch=6).batches(30))


def test_vectors_of_other_teachers_or_texts_are_refused_by_name(tmp_path: Path) -> None:
    def made(name: str, **options: Any) -> Pairs:
        return add(table(tmp_path / f"{name}.lance", 6), **options)

    with pytest.raises(DataError, match=r"'dr_image' holds list.*\[5\].*teachers of 'dr_image' are 4 wide"):
        plain(made("wide", width=5, **{c: [[[0.5] * 5]] * 6 for c in ("dr_image", "dr_text_alt")}))
    with pytest.raises(DataError, match=r"'dr_image'.*does not say which teachers"):
        plain(made("nameless", settings={}))
    with pytest.raises(DataError, match=r"'dr_text_alt' holds 2 vectors for 1 texts of alt.*reinforce"):
        next(iter(plain(made("more", dr_text_alt=[[[0.5] * 4] * 2] * 6))))
    with pytest.raises(DataError, match=r"'dr_image' holds 1 vectors for 2 augmentations"):
        next(iter(plain(made("fewer", dr_image=[[[0.5] * 4]] * 6))))
    with pytest.raises(DataError, match=r"'alt' was written anew since 'dr_text_alt' was made"):
        plain(made("stale", read={"alt": "another digest"}))


def test_what_is_missing_is_named_with_the_command(tmp_path: Path) -> None:
    pairs = table(tmp_path / "t.lance", 6)
    with pytest.raises(ConfigError, match=r"no column 'dr_augment', 'dr_image', 'dr_text_alt'.*cutline reinforce"):
        plain(pairs)
    with pytest.raises(ConfigError, match=r"'dr_text_captions'.*--texts alt,captions"):
        plain(add(pairs), text=TEXTS)
    with pytest.raises(ConfigError, match=r"data\.replay.*needs a table of pairs"):
        plain(open_source("scenes:n=20,size=48,seed=0"), text=TextConfig(columns={"captions": 1.0}))
    with pytest.raises(ConfigError, match=r"objectives.distill asks.*Set data\.replay"):
        plain(pairs, replay=None)


def test_a_run_trains_on_replayed_views(reinforced: tuple[Pairs, Any], tmp_path: Path) -> None:
    from cutline.train.loop import train
    from cutline.train.recipe import Recipe

    recipe = Recipe.model_validate({
        "name": "replay",
        "data": {"pairs": reinforced[0].path, "replay": "dr", "threads": 0, "text": {"columns": {"alt": 1.0}}},
        "towers": {"model": "vit-tiny-64"},
        "objectives": {"contrastive": {}},
        "train": {"batch": 6, "samples": 12, "device": "cpu", "log_every": 1},
    })  # fmt: skip
    train(recipe, tmp_path / "run", show=False)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert all(np.isfinite(losses))
