"""The published DataCompDR layout: tars made here exactly so, read into columns, and refused where they are broken."""

import gzip
import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs_made import picture, write_tar
from PIL import Image
from reinforce_made import run
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms.autoaugment import _apply_op

from cutline.captions.datacompdr import PUBLISHED, ImportConfig, ImportWork, _operation, import_work, parse_teachers
from cutline.captions.work import Failed
from cutline.errors import ConfigError, DataError
from cutline.pairs import Pairs, create_from_rows
from cutline.train.stream import Stream, TextConfig, teachers_of
from cutline.train.stream.randaugment import BINS, OPERATIONS, carry_out
from cutline.train.stream.replay import DRAWN, IMAGE, TEXT

TEACHERS = parse_teachers("A=4@100,B=2@70")
WIDTH = 6


def vectors(uid: int, what: int, count: int) -> torch.Tensor:
    """Embeddings that bfloat16 holds."""
    generator = torch.Generator().manual_seed(uid * 10 + what)
    return torch.randn(count, WIDTH, generator=generator).bfloat16()


def npz(arrays: Mapping[str, Any]) -> bytes:
    out = io.BytesIO()
    np.savez(out, **{k: v.float().numpy() if isinstance(v, torch.Tensor) else v for k, v in arrays.items()})
    return out.getvalue()


def pth(content: Any) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return gzip.compress(out.getvalue())


def embedded(n: int) -> dict[str, torch.Tensor]:
    return {"image_emb": vectors(n, 0, 3), "text_emb": vectors(n, 1, 1 + 2)}


def sample(n: int, **changes: bytes | None) -> list[tuple[str, bytes]]:
    """Members of the sample of uid u<n>: bfloat16 for even n and float32 for odd ones."""
    paug = {
        "param_aug": [
            [[n, 1, 8, 9], [[7, 0.27], [10, 7]]],
            [[0, 0, 16, 9], [[1, -0.09], [3, 30.45]]],
            [[2, 3, 10, 6], None],
        ]
    }
    files: dict[str, bytes | None] = {
        "json": json.dumps({"uid": f"u{n}", "sha256": "0" * 64}).encode(),
        "paug.json": json.dumps(paug).encode(),
        "pth.gz" if n % 2 == 0 else "npz": (pth if n % 2 == 0 else npz)(embedded(n)),
        "syn.json": json.dumps({"syn_text": [f"syn {n} a", f"syn {n} b"]}).encode(),
        "url.txt": f"http://x/{n}.jpg".encode(),
    }
    return [(f"{n:08d}.{e}", data) for e, data in (files | changes).items() if data is not None]


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    """Ten rows in another order than the shards; u6 has no alt text, and u9 is in no shard."""
    some = [8, 2, 5, 0, 1, 3, 7, 4, 6, 9]
    rows = [
        {"key": f"{n:08d}", "image": picture(n, size=(20, 30)), "alt": None if n == 6 else f"alt {n}", "uid": f"u{n}"}
        for n in some
    ]
    create_from_rows(tmp_path / "t.lance", rows)
    return Pairs.open(tmp_path / "t.lance")


def shards(folder: Path, samples: list[list[tuple[str, bytes]]]) -> str:
    for i in range(2):
        write_tar(folder / f"{i:05d}.tar", [m for s in samples[i::2] for m in s])
    return str(folder / "{00000..00001}.tar")


def work_of(pairs: Pairs, pattern: str, **options: Any) -> ImportWork:
    return import_work(pairs, ImportConfig(shards=[pattern], teachers=TEACHERS, **options), show=False)


def made(pairs: Pairs, pattern: str, **options: Any) -> dict[str, Any]:
    """uid → what is made of its row."""
    work = pickle.loads(pickle.dumps(work_of(pairs, pattern, **options)))
    worker, rows = work.load(), pairs.read(range(len(pairs)), ["key", "uid", *work.reads])
    return {row["uid"]: m for row, m in zip(rows, worker.make(worker.prepare(rows)), strict=True)}


@pytest.mark.parametrize("by", [None, "uid", "key"])
def test_samples_are_joined_by_uid_or_by_name_and_are_exact(pairs: Pairs, tmp_path: Path, by: str | None) -> None:
    pattern = shards(tmp_path, [sample(n) for n in range(9)])
    found = made(pairs, pattern, by=by)
    assert found.pop("u9") == Failed("not in the shards")
    for uid, values in found.items():
        n = int(uid[1:])
        assert values["caption_dr"] == [f"syn {n} a", f"syn {n} b"]
        assert values["dr_image"].dtype == np.float16
        assert np.array_equal(values["dr_image"], vectors(n, 0, 3).float().numpy())  # bfloat16 → float16: exact
        text = vectors(n, 1, 3).float().numpy()
        assert np.array_equal(values["dr_text_alt"], text[:1])
        assert np.array_equal(values["dr_text_caption_dr"], text[1:])
        first, second, third = values["dr_augment"]
        assert [first[k] for k in ("top", "left", "height", "width", "flip")] == [n, 1, 8, 9, False]
        assert first["operations"] == [{"name": "Color", "amount": 0.27}, {"name": "Posterize", "amount": 1.0}]
        assert second["operations"] == [
            {"name": "ShearX", "amount": -0.09},
            {"name": "TranslateX", "amount": 30.45 / 224},
        ]
        assert third["operations"] == []


def test_the_newer_layout_keeps_each_key_of_captions_apart(pairs: Pairs, tmp_path: Path) -> None:
    syn = {"syn_text": ["a", " "], "syn_text_blip": ["b"], "note": "x"}
    arrays = {"image_emb": vectors(1, 0, 3), "text_emb": vectors(1, 1, 1)}
    arrays |= {"syn_text_emb": vectors(1, 2, 2), "syn_text_blip_emb": vectors(1, 3, 1)}
    pattern = shards(tmp_path, [sample(1, **{"syn.json": json.dumps(syn).encode(), "npz": npz(arrays)})])
    values = made(pairs, pattern)["u1"]
    assert values["caption_dr"] == ["a", "b"]
    expected = torch.cat([vectors(1, 2, 2)[:1], vectors(1, 3, 1)])
    assert np.array_equal(values["dr_text_caption_dr"], expected.float().numpy())


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_operations_equal_those_they_were_published_for_to_the_bit(name: str) -> None:
    image = Image.open(io.BytesIO(picture(5, "PNG", (224, 224))))
    space = RandAugment()._augmentation_space(BINS + 1, (224, 224))
    assert list(space) == list(OPERATIONS)  # published by number
    magnitudes, signed = space[name]
    for bin_ in (0, 9, 30):
        magnitude = float(magnitudes[bin_]) if magnitudes.ndim else 0.0
        for sign in (1, -1) if signed else (1,):
            theirs = _apply_op(image, name, sign * magnitude, InterpolationMode.NEAREST, None)
            for which in (name, list(space).index(name)):
                ours = carry_out(image, (_operation(which, sign * magnitude, 224),))
                assert np.array_equal(np.asarray(ours), np.asarray(theirs)), (bin_, sign)


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('unpickled')",))


BROKEN: dict[str, tuple[dict[str, bytes | None], str]] = {
    "pickle in npz": ({"npz": npz({"image_emb": np.array([Evil()], object), "text_emb": np.zeros((3, 6))})}, "npz is broken, or holds more"),
    "pickle in pth.gz": ({"npz": None, "pth.gz": pth({"image_emb": Evil()})}, "pth.gz is broken, or holds more"),
    "npz cut off": ({"npz": npz(embedded(1))[:200]}, "npz is broken"),
    "pth.gz cut off": ({"npz": None, "pth.gz": pth(embedded(1))[:-40]}, "pth.gz is broken"),
    "no arrays": ({"npz": None}, "neither npz nor pth.gz"),
    "no syn.json": ({"syn.json": None}, "no syn.json"),
    "syn.json is no JSON": ({"syn.json": b"{"}, "syn.json does not parse"),
    "captions are numbers": ({"syn.json": b'{"syn_text": [1, 2]}'}, "holds no list of texts"),
    "one caption too many": ({"syn.json": b'{"syn_text": ["a", "b", "c"]}'}, "text_emb and syn_text have different"),
    "one augmentation too few": ({"paug.json": b'{"param_aug": [[[0, 0, 1, 1], []]]}'}, "image_emb and param_aug"),
    "a crop of three": ({"paug.json": b'{"param_aug": [[[0, 0, 1], []]]}'}, "param_aug has another form"),
    "an operation too many": ({"paug.json": b'{"param_aug": [[[0, 0, 1, 1], [[14, 0]]]]}'}, "param_aug has another form"),
    "a magnitude too large": ({"paug.json": b'{"param_aug": [[[0, 0, 1, 1], [[1, 7]]]]}'}, "param_aug has another form"),
    "NaN": ({"npz": npz(embedded(1) | {"image_emb": torch.full((3, 6), torch.nan)})}, "not finite"),
    "another width": ({"npz": npz({"image_emb": torch.zeros(3, 5), "text_emb": torch.zeros(3, 5)})}, "5 wide and not 6"),
    "another number of texts": ({"npz": npz(embedded(1) | {"text_emb": vectors(1, 1, 4)})}, "another number of texts"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_broken_sample_is_left_out_with_its_reason(pairs: Pairs, tmp_path: Path, what: str) -> None:
    changes, reason = BROKEN[what]
    found = made(pairs, shards(tmp_path, [sample(0), sample(2), sample(1, **changes)]))
    assert isinstance(found["u1"], Failed)
    assert reason in found["u1"].reason
    assert not isinstance(found["u0"], Failed)
    assert not isinstance(found["u2"], Failed)


def test_tars_cut_off_and_samples_without_or_with_the_same_uid_are_counted_by_name(
    pairs: Pairs, tmp_path: Path
) -> None:
    double = [(name.replace("00000001", "00000077"), data) for name, data in sample(1)]
    samples = [sample(0), sample(1), sample(2, json=b'{"url": 1}'), double, sample(4), sample(5)]
    pattern = shards(tmp_path, samples)
    tar = tmp_path / "00000.tar"  # 0, 2, 4
    tar.write_bytes(tar.read_bytes()[: tar.read_bytes().index(b"00000004.syn.json") + 520])
    work = work_of(pairs, pattern)
    assert len(work.shards) == 3  # 0, 1, 5
    skipped = work.shards.skipped
    assert {why: c.n for why, c in skipped.items()} == {
        "sample without a uid": 1,
        "tar cut off or damaged: the rest of it is lost": 1,
        "uid was there before: the first is kept": 1,
    }
    assert skipped["sample without a uid"].examples == ["00000002 (00000.tar)"]
    assert "00000.tar" in skipped["tar cut off or damaged: the rest of it is lost"].examples[0]
    assert {uid for uid, m in made(pairs, pattern).items() if not isinstance(m, Failed)} == {"u0", "u1", "u5"}


def test_what_cannot_be_imported_at_all_is_refused(pairs: Pairs, tmp_path: Path) -> None:
    pattern = shards(tmp_path, [sample(0), sample(1)])
    with pytest.raises(DataError, match=r"6 wide.*ViT-L-14:openai, ViT-L-14:datacomp_xl_s13b_b90k are 768 \+ 768"):
        import_work(pairs, ImportConfig(shards=[pattern]), show=False)
    with pytest.raises(DataError, match="no column 'id'"):
        work_of(pairs, pattern, by="id")
    with pytest.raises(
        DataError, match="no row of .* is in the shards: rows are joined by the column 'alt'.*Name another"
    ):
        work_of(pairs, pattern, by="alt")
    with pytest.raises(ConfigError, match="NAME=WIDTH@SCALE"):
        parse_teachers("ViT-L-14:openai")
    write_tar(tmp_path / "none.tar", [("a.txt", b"x")])
    with pytest.raises(DataError, match=r"no sample was found.*\n.*sample without a uid: 1 \(a"):
        work_of(pairs, str(tmp_path / "none.tar"))
    assert sum(t.width for t in PUBLISHED) == 1536


def test_an_imported_table_is_replayed_in_training(pairs: Pairs, tmp_path: Path) -> None:
    pattern = shards(tmp_path, [sample(n) for n in range(9)])
    pairs = run(pairs, work_of(pairs, pattern), max_bad=0.5)
    assert [(t.name, t.width, t.logit_scale) for t in teachers_of(pairs, "dr_image")] == [("A", 4, 100), ("B", 2, 70)]

    class Words:
        def __call__(self, texts: list[str]) -> torch.Tensor:
            return torch.tensor([[ord(c) for c in t.ljust(8)] for t in texts])

        def trimmed(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens

        def truncated(self, texts: list[str], tokens: torch.Tensor | None = None) -> int:
            return 0

    text = TextConfig(columns={"alt": 1.0, "caption_dr": 1.0}, rule="sum")
    stream = Stream(
        pairs, batch=4, size=16, mean=(0, 0, 0), std=(1, 1, 1), text=text, tokenizer=Words(), threads=0, max_bad=0.5,
        replay="dr", columns=[IMAGE, TEXT],
    )  # fmt: skip
    for batch in stream.batches(4):
        synthetic = ["".join(map(chr, t)).strip() for t in batch.texts["caption_dr"].tokens.tolist()]
        for key, drawn, image, said, vector in zip(
            batch.keys, batch.columns[DRAWN], batch.columns[IMAGE], synthetic, batch.columns[f"{TEXT}/caption_dr"],
            strict=True,
        ):  # fmt: skip
            assert torch.equal(image.bfloat16(), vectors(int(key), 0, 3)[drawn])
            assert torch.equal(vector.bfloat16(), vectors(int(key), 1, 3)[1 + "ab".index(said[-1])])
    assert stream.counts["broken"] > 0  # u9
