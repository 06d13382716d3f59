"""Kill `create` and `add_column` anywhere: what is on disk opens, and a second start ends as an undisturbed one."""

import subprocess
import sys
from pathlib import Path

import lance
import pytest
from pairs_made import sample, write_tar
from processes import kill_until_done

from cutline.errors import DataError
from cutline.pairs import Pairs, Provenance, create, ingest
from cutline.pairs.journal import locked

OPTIONS = {"captions": "json:captions", "max_bad": 0.5, "show": False}


@pytest.fixture
def small_commits(monkeypatch):
    monkeypatch.setattr(ingest, "BATCH", 8)
    monkeypatch.setattr(ingest, "COMMIT", 16)


@pytest.fixture
def bad_shards(tmp_path: Path) -> list[Path]:
    """Shards with something to count in each; the last one is cut off."""
    shards = []
    for s in range(3):
        members = [m for n in range(30 * s, 30 * s + 30) for m in sample(n, txt=None if n % 9 == 0 else b" padded ")]
        shards.append(write_tar(tmp_path / f"{s}.tar", [*members, *sample(1)]))
    raw = shards[-1].read_bytes()
    shards[-1].write_bytes(raw[: raw.find(b"000085.jpg") + 700])
    return shards


def contents(path: Path) -> list:
    pairs = Pairs.open(path)
    return [
        pairs.fingerprint,
        pairs.read(range(len(pairs)), pairs.columns),
        pairs.report.skipped,
        pairs.report.repaired,
    ]


class Crash(BaseException):
    pass


def crash_at(monkeypatch, calls: int, after: bool) -> None:
    """Let `create` "die" before or after its n-th write of any kind."""
    names = ("update_field_metadata", "update_schema_metadata")
    writes = [(lance, "write_dataset"), (ingest.Journal, "write"), (ingest.Journal, "clear")]
    wrap_writes(monkeypatch, calls, after, *writes, *((lance.LanceDataset, name) for name in names))


def wrap_writes(monkeypatch, calls: int, after: bool, *writes: tuple) -> None:
    left = [calls]

    def wrap(owner, name):
        real = getattr(owner, name)

        def write(*args, **options):
            left[0] -= 1
            if left[0] == 0 and not after:
                raise Crash
            result = real(*args, **options)
            if left[0] == 0:
                raise Crash
            return result

        monkeypatch.setattr(owner, name, write)

    for owner, name in writes:
        wrap(owner, name)


def test_create_goes_on_after_a_crash_at_any_write(tmp_path, bad_shards, small_commits, monkeypatch):
    create(tmp_path / "whole.lance", bad_shards, **OPTIONS)
    expected = contents(tmp_path / "whole.lance")
    crashes = 0
    for after in (False, True):
        for calls in range(1, 100):
            out = tmp_path / f"{calls}{after}.lance"
            with monkeypatch.context() as m:
                crash_at(m, calls, after)
                try:
                    create(out, bad_shards, **OPTIONS)
                    break
                except Crash:
                    crashes += 1
            if (out / "_versions").exists() and not Pairs.open(out, unfinished=True).finished:
                with pytest.raises(DataError, match=r"cut off after \d+ pairs.*again"):
                    Pairs.open(out)
            if not (out / "_versions").exists() or (out / "_cutline" / "create.json").exists():
                create(out, bad_shards, **OPTIONS)
            assert contents(out) == expected
    assert crashes > 20


def test_unfinished_create_refuses_other_sources(tmp_path, bad_shards, small_commits, monkeypatch):
    with monkeypatch.context() as m:
        crash_at(m, 4, after=True)
        with pytest.raises(Crash):
            create(tmp_path / "t.lance", bad_shards, **OPTIONS)
    for sources, options in [(bad_shards[:2], OPTIONS), (bad_shards, OPTIONS | {"captions": None})]:
        with pytest.raises(DataError, match="unfinished create of other sources or options"):
            create(tmp_path / "t.lance", sources, **options)
    create(tmp_path / "t.lance", bad_shards, **OPTIONS | {"max_bad": 0.9})


CREATE = """
import sys
from cutline.pairs import create, ingest
import lance
ingest.BATCH, ingest.COMMIT = 8, 16
print("go", flush=True)
create(sys.argv[1], sys.argv[2:], captions="json:captions", max_bad=0.5, show=False)
"""

ADD = """
import sys, time
from cutline.pairs import Pairs, Provenance
pairs = Pairs.open(sys.argv[1])
print("go", flush=True)
calls = open(sys.argv[2], "a")
def made(rows):
    print(len(rows), rows[0]["key"], file=calls, flush=True)
    time.sleep(0.005)
    return [r["alt"].upper() for r in rows]
pairs.add_column("upper", made, columns=["key", "alt"], batch=4, provenance=Provenance(how="test", time=""), show=False)
"""


def test_create_survives_sigkill(tmp_path, bad_shards, small_commits):
    create(tmp_path / "whole.lance", bad_shards, **OPTIONS)
    out = tmp_path / "killed.lance"

    def done() -> bool:
        return (out / "_versions").exists() and Pairs.open(out, unfinished=True).finished

    kill_until_done(CREATE, str(out), *map(str, bad_shards), longest=0.12, kills=3, seed=1, done=done)
    assert contents(out) == contents(tmp_path / "whole.lance")


def test_add_column_survives_sigkill(tmp_path, table):
    calls = tmp_path / "calls"

    def done() -> bool:
        return "upper" in Pairs.open(table.path).columns

    hits = kill_until_done(ADD, table.path, str(calls), longest=0.15, kills=3, seed=2, done=done)
    pairs = Pairs.open(table.path)
    assert [r["upper"] for r in pairs.read(range(120), ["upper"])] == [f"ALT {n}" for n in range(120)]
    made = [line.split()[1] for line in calls.read_text().splitlines()]
    assert sorted(set(made)) == [f"{n:06d}" for n in range(0, 120, 4)]
    assert len(made) <= 30 + hits  # at most the batch in flight is made again


def test_add_column_goes_on_after_a_crash_at_any_write(tmp_path, shards, monkeypatch):
    from cutline import record
    from cutline.pairs import columns

    def made(rows):
        return [r["alt"].upper() for r in rows]

    crashes = 0
    for after in (False, True):
        for calls in range(1, 20):
            create(tmp_path / f"{calls}{after}.lance", [shards], show=False)
            table = Pairs.open(tmp_path / f"{calls}{after}.lance")
            with monkeypatch.context() as m:
                wrap_writes(m, calls, after, (record, "write_atomic"), (lance.LanceDataset, "add_columns"),
                            (columns, "drop_job"), (columns.ColumnJob, "append"))  # fmt: skip
                try:
                    table.add_column("upper", made, columns=["alt"], batch=50, show=False)
                    break
                except Crash:
                    crashes += 1
            if (Path(table.path) / "_cutline" / "add-upper").exists() or "upper" not in Pairs.open(table.path).columns:
                Pairs.open(table.path).add_column("upper", made, columns=["alt"], batch=50, show=False)
            pairs = Pairs.open(table.path)
            assert [r["upper"] for r in pairs.read(range(120), ["upper"])] == [f"ALT {n}" for n in range(120)]
            assert not (Path(table.path) / "_cutline" / "add-upper").exists()
    assert crashes >= 8


def test_only_one_process_creates_a_table(tmp_path, bad_shards):
    code = "import sys, time\nfrom cutline.pairs.journal import locked\n"
    code += "with locked(sys.argv[1], 'create'):\n    print('go', flush=True)\n    time.sleep(60)"
    out = tmp_path / "t.lance"
    child = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        child.stdout.readline()
        with pytest.raises(DataError, match="another process is at work"):
            create(out, bad_shards, **OPTIONS)
    finally:
        child.kill()
        child.wait()
    create(out, bad_shards, **OPTIONS)  # the lock went with its process
    with locked(out, "create"):
        pass


def test_torn_record_of_a_column_is_made_again(tmp_path, table):
    provenance = Provenance(how="test")
    calls = []

    def made(rows):
        calls.append(rows[0]["key"])
        if len(calls) == 6:
            raise RuntimeError("the model fell over")
        return [int(r["key"]) for r in rows]

    with pytest.raises(RuntimeError, match="fell over"):
        table.add_column("number", made, batch=10, provenance=provenance, show=False)
    (piece,) = (Path(table.path) / "_cutline" / "add-number").glob("*.rows")
    piece.write_bytes(piece.read_bytes()[:-3])
    assert Pairs.open(table.path).columns == table.columns
    with pytest.raises(DataError, match=r"begun with other settings \(how: 'test' then"):
        table.add_column("number", made, batch=10, provenance=Provenance(how="else"), show=False)
    again = table.add_column("number", made, batch=10, provenance=Provenance(how="test", time="later"), show=False)
    assert calls == [f"{n:06d}" for n in (0, 10, 20, 30, 40, 50, 40, 50, 60, 70, 80, 90, 100, 110)]
    assert [r["number"] for r in again.read(range(120), ["number"])] == list(range(120))


def test_a_column_whose_input_was_written_anew_meanwhile_is_not_gone_on_with(table):
    def made(rows):
        if rows[0]["key"] == "000100":
            raise KeyboardInterrupt
        return [r["cap"] for r in rows]

    options = {"columns": ["key", "cap"], "batch": 10, "provenance": Provenance(how="test"), "show": False}
    pairs = table.add_column("cap", ["old"] * 120)
    with pytest.raises(KeyboardInterrupt):
        pairs.add_column("copy", made, **options)
    pairs = pairs.drop("cap").add_column("cap", ["new"] * 120)
    with pytest.raises(DataError, match="begun with other settings .'cap' has been written anew."):
        pairs.add_column("copy", lambda rows: [r["cap"] for r in rows], **options)


def test_a_create_that_was_killed_at_its_very_end_leaves_others_unfinished_columns(tmp_path, bad_shards, monkeypatch):
    out = tmp_path / "t.lance"
    with monkeypatch.context() as m, pytest.raises(Crash):  # noqa: PT012
        wrap_writes(m, 1, False, (ingest.Journal, "clear"))
        create(out, bad_shards, **OPTIONS)
    job = out / "_cutline" / "add-loud"
    job.mkdir()
    (job / "job.json").write_text("{}")
    create(out, bad_shards, **OPTIONS)
    assert [p.name for p in (out / "_cutline").iterdir()] == ["add-loud"]


def test_restart_drops_what_was_there(table):
    def fails(rows):
        if rows[0]["key"] == "000100":
            raise RuntimeError
        return [0] * len(rows)

    with pytest.raises(RuntimeError):
        table.add_column("x", fails, batch=10, show=False)
    with pytest.raises(DataError, match="restart=True"):
        table.add_column("x", lambda rows: [1] * len(rows), type="int32", show=False)
    new = table.add_column("x", lambda rows: [1] * len(rows), type="int32", restart=True, show=False)
    assert {r["x"] for r in new.read(range(120), ["x"])} == {1}
