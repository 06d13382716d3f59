"""Batches: the same whatever the threads, resumable anywhere, and steadfast with broken pictures."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cutline.errors import ConfigError, DataError
from cutline.objectives.base import Batch, View
from cutline.train.stream import Augment, Cached, Stream, TextConfig


class Pictures:
    """A source of small random pictures; rows in `broken` have none."""

    def __init__(self, n: int = 100, broken: Sequence[int] = (), side: int = 24, fingerprint: str = "f") -> None:
        self.n, self.broken, self.side, self.fingerprint = n, set(broken), side, fingerprint
        self.columns = ["key", "image", "alt", "captions", "score", "embedding"]
        self.reads = 0

    def __len__(self) -> int:
        return self.n

    def read(self, rows: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        self.reads += len(rows)
        return [{k: v for k, v in self.row(r).items() if k in [*columns, "error"]} for r in rows]

    def row(self, r: int) -> dict[str, Any]:
        assert type(r) is int
        image = np.random.default_rng(r).integers(0, 256, (self.side + r % 5, self.side, 3), dtype=np.uint8)
        values = {
            "key": f"k{r}", "image": image, "alt": None if r % 7 == 0 else f"alt {r}", "captions": [f"c{r}"] * (r % 3),
            "score": r / 2, "embedding": np.full(4, r, np.float32),
        }  # fmt: skip
        return values | ({"image": None, "error": "cut off"} if r in self.broken else {})


class Letters:
    """A tokeniser of one token per character; pads with 0 to 32."""

    def __call__(self, texts: list[str]) -> Tensor:
        return torch.tensor([([ord(c) for c in t] + [0] * 32)[:32] for t in texts])

    def trimmed(self, tokens: Tensor) -> Tensor:
        return tokens[:, :16]

    def truncated(self, texts: list[str], tokens: Tensor | None = None) -> int:
        return sum(len(t) > 32 for t in texts)


def stream(source: Any = None, **options: Any) -> Stream:
    defaults: dict[str, Any] = {
        "batch": 16,
        "size": 16,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
        "seed": 3,
        "augment": Augment(scale=(0.3, 1.0), flip=0.5),
        "text": TextConfig(columns={"alt": 1.0, "captions": 1.0}),
        "tokenizer": Letters(),
        "threads": 0,
    }
    return Stream(source or Pictures(), **(defaults | options))


def same(a: Batch, b: Batch) -> bool:
    assert a.views.keys() == b.views.keys()
    assert a.texts.keys() == b.texts.keys()
    return (
        a.keys == b.keys
        and all(torch.equal(a.views[k], b.views[k]) for k in a.views)
        and all(torch.equal(a.texts[k].tokens, b.texts[k].tokens) for k in a.texts)
        and all(torch.equal(a.texts[k].owners, b.texts[k].owners) for k in a.texts)
        and all(torch.equal(a.columns[k], b.columns[k]) for k in a.columns)
    )


@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize("threads", [1, 2, 4, 7])
def test_batches_do_not_depend_on_the_number_of_threads(threads: int, block: int | None) -> None:
    options: dict[str, Any] = {
        "source": Pictures(n=400, broken=[3, 50, 301]),
        "batch": 100,
        "views": {"local": View(size=8, count=3, scale=(0.1, 0.4))},
        "columns": ["embedding"],
        "max_bad": 0.1,
        "block": block,
    }
    plain, threaded = stream(**options), stream(**options, threads=threads)
    for a, b in zip(plain.batches(6), threaded.batches(6), strict=True):
        assert same(a, b)
    assert plain.counts == threaded.counts
    assert plain.counts["broken"] > 0


@pytest.mark.parametrize("at", [0, 1, 5, 6, 13])
def test_resuming_anywhere_equals_the_tail(at: int) -> None:
    whole = list(stream(threads=2).batches(16))
    first = stream(threads=2)
    for _ in itertools.islice(first, at):
        pass
    second = stream(threads=1)
    second.load_state_dict(first.state_dict())
    for a, b in zip(whole[at:], second.batches(16), strict=True):
        assert same(a, b)


def test_state_is_that_of_the_batch_in_hand_not_of_those_made_ahead() -> None:
    s = stream(threads=4)
    for i, _ in enumerate(s.batches(9)):
        assert s.state_dict()["step"] == i + 1


def test_epochs_show_each_row_once_and_augment_it_anew() -> None:
    s = stream(Pictures(n=32), batch=16)
    batches = list(s.batches(4))
    assert sorted(batches[0].keys + batches[1].keys) == sorted(f"k{i}" for i in range(32))
    views = [
        {k: v for b in e for k, v in zip(b.keys, b.views["image"], strict=True)} for e in (batches[:2], batches[2:])
    ]
    assert sum(torch.equal(views[0][k], views[1][k]) for k in views[0]) < 4


def test_ranks_together_make_the_batch_of_one_process() -> None:
    alone = list(stream(batch=24).batches(5))
    ranks = [list(stream(batch=24, rank=r, world=3).batches(5)) for r in range(3)]
    for step, batch in enumerate(alone):
        assert [k for r in ranks for k in r[step].keys] == batch.keys
        assert torch.equal(torch.cat([r[step].views["image"] for r in ranks]), batch.views["image"])


def test_views_of_a_picture_are_adjacent_and_differ() -> None:
    views = {"local": View(size=8, count=3, scale=(0.1, 0.4)), "global": View(scale=(0.5, 1.0))}
    batch = next(iter(stream(views=views)))
    plain = next(iter(stream()))
    assert batch.views["local"].shape == (48, 3, 8, 8)
    assert batch.views["global"].shape == (16, 3, 16, 16)
    assert torch.equal(batch.views["image"], plain.views["image"])  # a further view changes nothing of the first
    # A picture's own mean colour is in all of its views: neighbours of one picture are nearer than those of others.
    flat = Pictures()
    flat.row = lambda r: Pictures.row(flat, r) | {"image": np.full((20, 20, 3), r * 2, np.uint8)}  # type: ignore[method-assign]
    batch = next(iter(stream(flat, views=views, mean=(0, 0, 0), std=(1, 1, 1))))
    shade = batch.views["local"].mean(dim=(1, 2, 3)).view(16, 3) * 255 / 2
    assert shade.allclose(torch.tensor([[float(k[1:])] * 3 for k in batch.keys]), atol=1e-3)


def test_columns_belong_to_their_rows() -> None:
    batch = next(iter(stream(columns=["score", "embedding", "captions"])))
    rows = [int(k[1:]) for k in batch.keys]
    assert batch.columns["score"].tolist() == [r / 2 for r in rows]
    assert torch.equal(batch.columns["embedding"], torch.tensor(rows)[:, None].expand(-1, 4).float())
    assert batch.columns["captions"] == [[f"c{r}"] * (r % 3) for r in rows]


def test_all_texts_know_their_owners() -> None:
    batch = next(iter(stream(text=TextConfig(columns={"alt": 1.0, "captions": 1.0}, rule="all"))))
    texts = ["".join(chr(c) for c in row if c) for row in batch.texts["text"].tokens]
    for text, owner in zip(texts, batch.texts["text"].owners.tolist(), strict=True):
        assert text == "" or text.lstrip("altc ") == batch.keys[owner][1:]
    assert len(texts) > 16


def test_sum_gives_each_column_its_tokens() -> None:
    batch = next(iter(stream(text=TextConfig(columns={"alt": 1.0, "captions": 1.0}, rule="sum"))))
    assert list(batch.texts) == ["alt", "captions"]
    assert batch.texts["alt"].tokens.shape == (16, 16)
    assert batch.texts["captions"].owners.tolist() == list(range(16))


def test_without_text_there_is_none() -> None:
    batch = next(iter(stream(text=None, tokenizer=None)))
    assert batch.texts == {}


def test_broken_pictures_are_replaced_by_whole_rows_and_counted() -> None:
    broken = [5, 17, 60]
    s = stream(Pictures(broken=broken), max_bad=0.05, columns=["score"])
    batches = list(s.batches(6))
    keys = [k for b in batches for k in b.keys]
    assert not {f"k{r}" for r in broken} & set(keys)
    met = {r for r in broken if any(e == f"k{r}: cut off" for e in s.examples["unreadable"])}
    assert s.counts["broken"] == s.counts["unreadable"] == len(met) >= 2
    assert s.counts["pictures"] == 96
    for b in batches:
        assert len(set(b.keys)) == 16  # a replacement is not a second copy of a row of the batch
        assert b.columns["score"].tolist() == [int(k[1:]) / 2 for k in b.keys]


def test_too_many_broken_pictures_stop_the_stream_with_names() -> None:
    s = stream(Pictures(n=1000, broken=range(0, 1000, 10)), batch=50)
    with pytest.raises(DataError, match=r"unreadable \(k\d+: cut off.*max_bad"):
        list(s.batches(20))
    assert 100 <= s.counts["pictures"] <= 300


def test_a_share_of_broken_pictures_just_below_the_limit_does_not_stop_it() -> None:
    s = stream(Pictures(n=1000, broken=range(0, 1000, 125)), batch=50)  # 0.8 %
    assert len(list(s.batches(60))) == 60


@pytest.mark.parametrize("threads", [0, 2])
def test_only_broken_pictures_is_an_error_not_a_hang(threads: int) -> None:
    with pytest.raises(DataError, match="unreadable"):
        next(iter(stream(Pictures(broken=range(100)), threads=threads)))


def test_replacements_that_are_broken_too_are_replaced_in_turn() -> None:
    s = stream(Pictures(n=200, broken=range(0, 200, 2)), max_bad=1.0, batch=10)
    for batch in s.batches(20):
        assert all(int(k[1:]) % 2 for k in batch.keys)
        assert len(set(batch.keys)) >= 9  # two broken ones may still choose the same
    assert s.counts["broken"] > 150  # a half of 200, and half of the replacements, and …


def test_max_bad_zero_allows_none() -> None:
    with pytest.raises(DataError):
        list(stream(Pictures(n=1000, broken=[7]), max_bad=0.0, batch=100).batches(10))


def test_empty_texts_are_counted() -> None:
    s = stream(Pictures(n=42), batch=42)  # rows 0 and 21 have neither alt text nor captions
    next(iter(s))
    assert s.counts["empty texts"] == 2
    assert s.counts["texts"] == 42


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "seed: 3 then, 4 now"),
        ({"batch": 8}, "batch: 16 then, 8 now"),
        ({"source": Pictures(fingerprint="g")}, "fingerprint: 'f' then, 'g' now"),
        ({"block": 8}, "block"),
    ],
)
def test_resuming_in_another_order_is_refused(change: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        stream(**change).load_state_dict(stream().state_dict())


def test_an_unknown_column_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no column 'caption'.*alt, captions.*Did you mean 'captions'"):
        stream(text=TextConfig(columns={"caption": 1.0}))
    with pytest.raises(ConfigError, match="no column 'depth'"):
        stream(columns=["depth"])


def test_an_error_of_the_source_reaches_the_caller() -> None:
    class Failing(Pictures):
        def read(self, rows: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
            raise DataError("the shard is gone")

    with pytest.raises(DataError, match="the shard is gone"):
        list(stream(Failing(), threads=2).batches(3))


def test_waiting_is_measured() -> None:
    s = stream()
    list(s.batches(2))
    assert s.waited > 0


def test_a_cached_source_reads_each_row_once_and_gives_the_same() -> None:
    source = Pictures(n=48)
    cached = Cached(source)
    for a, b in zip(stream(Pictures(n=48)).batches(6), stream(cached).batches(6), strict=True):
        assert same(a, b)
    assert source.reads == 48
    for a, b in zip(stream(Pictures(n=48)).batches(6), stream(Cached(source), threads=4).batches(6), strict=True):
        assert same(a, b)
    source.reads = 48
    list(stream(cached, seed=9, columns=["score"]).batches(3))  # one more column: read again, once
    assert source.reads == 96


@pytest.mark.parametrize("threads", [0, 2])
def test_memory_of_a_batch_is_used_again_only_when_nobody_holds_it(threads: int) -> None:
    held, copies, places = [], [], set()
    for step, batch in enumerate(stream(Pictures(n=320), threads=threads).batches(20)):
        places.add(batch.views["image"].data_ptr())
        if step in (2, 5):
            held.append(batch.views["image"][3:5])  # shares the memory, while the batch itself is let go
            copies.append(held[-1].clone())
    assert len(places) < 14
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


@pytest.mark.gpu
def test_pinned_batches_equal_the_others_and_copy_beside_the_work() -> None:
    for a, b in zip(
        stream(threads=2, columns=["score"]).batches(8), stream(pin=True, columns=["score"]).batches(8), strict=True
    ):
        assert b.views["image"].is_pinned()
        assert b.texts["text"].tokens.is_pinned()
        there = b.to(torch.device("cuda"))
        del b
        assert torch.equal(there.views["image"].cpu(), a.views["image"])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("sample", {"text": (True, 1.0)}),
        ("sum", {"alt": (True, 2.0), "captions": (True, 0.5)}),
        ("all", {"text": (False, 1.0)}),
    ],
)
def test_texts_say_whether_they_pair_up_and_what_they_weigh(rule: Any, expected: dict[str, tuple[bool, float]]) -> None:
    text = TextConfig(columns={"alt": 2.0, "captions": 0.5}, rule=rule)
    batch = next(iter(stream(text=text, tokenizer=Letters())))
    assert {k: (t.paired, t.weight) for k, t in batch.texts.items()} == expected
