"""The engine: the same columns here, after a kill, and on Ray; failures counted, retried, and too many of them told."""

import threading
from pathlib import Path

import pytest
from captions_made import Capitals, Shouter
from pairs_made import sample, write_tar
from processes import kill_until_done

from cutline.captions.engine import RunConfig, run
from cutline.errors import DataError
from cutline.pairs import Pairs, create
from cutline.pairs.journal import locked


def go(table: Pairs, work: Capitals, **options):
    return run(table, work, "loud", RunConfig.model_validate({"batch": 7} | options), show=False)


def loud(table: Pairs) -> list:
    whole = Pairs.open(table.path)
    return [(r["loud"], r["length"]) for r in whole.read(range(len(whole)), ["loud", "length"])]


EXPECTED = [(f"ALT {n}", len(f"alt {n}")) for n in range(120)]


def test_columns_appear_in_one_version_with_provenance(table):
    new, report = go(table, Capitals())
    assert loud(new) == EXPECTED
    assert new.version == table.version + 1
    assert new.provenance("loud").how == new.provenance("length").how == "capitals"
    assert (report.rows, report.done, report.bad, report.tokens) == (120, 120, 0, 120)


def test_a_column_that_exists_is_refused_before_any_work(table, tmp_path):
    new, _ = go(table, Capitals())
    with pytest.raises(DataError, match=r"has a column 'loud' already.*drop"):
        go(new, Capitals(log=str(tmp_path / "log")))
    assert not (tmp_path / "log").exists()


def test_failed_rows_are_null_counted_and_named(table):
    bad = ("000003", "000050")
    new, report = go(table, Capitals(bad=bad))
    assert [n for n, row in enumerate(loud(new)) if row == (None, None)] == [3, 50]
    assert report.failed["no text"].model_dump() == {"n": 2, "examples": list(bad)}
    assert new.failed("loud") == report.failed


def test_rows_that_may_yet_be_made_are_tried_by_the_second_start_alone(table, tmp_path):
    log = tmp_path / "log"
    with pytest.raises(
        DataError, match=r"2 of 120 rows are still to be made: timed out \(2, for example 000004, 000099"
    ):
        go(table, Capitals(away=("000004", "000099")))
    assert Pairs.open(table.path).columns == table.columns
    new, report = go(table, Capitals(log=str(log), away=("000099",)), accept=True)
    assert log.read_text().split() == ["2", "000004"]  # both rows in one batch
    assert report.failed["timed out"].n == 1
    assert loud(new) == [*EXPECTED[:99], (None, None), *EXPECTED[100:]]


def test_too_many_failures_stop_the_run_and_keep_the_rest(table):
    bad = tuple(f"{n:06d}" for n in range(0, 120, 2))
    with pytest.raises(DataError, match=r"of the first 105 rows failed, more than the 10% allowed: no text \(53\)"):
        go(table, Capitals(bad=bad))
    few = tuple(f"{n:06d}" for n in range(14))
    with pytest.raises(DataError, match=r"14 of 120 rows failed.*--max-bad 0.13"):
        go(table, Capitals(bad=few), restart=True)
    new, _ = go(table, Capitals(), max_bad=0.13)  # goes on: nothing is made again
    assert loud(new)[:15] == [(None, None)] * 14 + EXPECTED[14:15]


def test_a_second_start_goes_on_behind_the_last_batch(table, tmp_path, monkeypatch):
    log = tmp_path / "log"
    real = Shouter.make

    def crash(self, rows):
        if rows[0]["key"] == "000070":
            raise KeyboardInterrupt
        return real(self, rows)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        m.setattr(Shouter, "make", crash)
        go(table, Capitals(log=str(log)))
    new, report = go(table, Capitals(log=str(log)))
    assert loud(new) == EXPECTED
    assert report.done == 50
    assert [line.split()[1] for line in log.read_text().splitlines()] == [f"{n:06d}" for n in range(0, 120, 7)]


WRITE = """
import sys
from captions_made import Capitals
from cutline.captions.engine import RunConfig, run
from cutline.pairs import Pairs
table = Pairs.open(sys.argv[1])
print("go", flush=True)
run(table, Capitals(log=sys.argv[2], seconds=0.005), "loud", RunConfig(batch=4), show=False)
"""


def test_a_work_survives_sigkill_without_a_row_lost_or_doubled(table, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    log = tmp_path / "log"
    hits = kill_until_done(
        WRITE,
        table.path,
        str(log),
        longest=0.15,
        kills=3,
        seed=3,
        done=lambda: "loud" in Pairs.open(table.path).columns,
    )
    assert loud(table) == EXPECTED
    made = [line.split()[1] for line in log.read_text().splitlines()]
    assert sorted(set(made)) == [f"{n:06d}" for n in range(0, 120, 4)]
    assert len(made) <= 30 + hits  # at most the batch in flight is made again


def test_a_filter_leaves_the_other_rows_null(table):
    new, report = go(table.where("alt LIKE '%7%'"), Capitals())
    kept = [n for n in range(120) if "7" in str(n)]
    assert loud(new) == [EXPECTED[n] if n in kept else (None, None) for n in range(120)]
    assert report.rows == len(kept)


def test_a_picture_that_does_not_decode_is_null_with_a_reason(tmp_path):
    shard = write_tar(tmp_path / "s.tar", [*sample(0), *sample(1, jpg=b"\xff\xd8 no"), *sample(2)])
    create(tmp_path / "t.lance", [shard], show=False)
    table = Pairs.open(tmp_path / "t.lance")
    new, report = go(table, Capitals(pictures=True), max_bad=0.5)
    assert [text for text, _ in loud(new)] == ["ALT 0", None, "ALT 2"]
    assert report.failed["picture: not a picture"].examples == ["000001"]


def test_an_estimate_tells_the_cost_and_adds_nothing(table):
    said = []
    config = RunConfig(batch=10, estimate=True)
    same, report = run(table, Capitals(seconds=0.2), "loud", config, show=False, say=said.append)
    assert same.columns == Pairs.open(table.path).columns
    assert 20 <= report.done < 120
    assert said[0].startswith("120 rows at ")
    assert 20 < float(said[0].split()[3]) < 55  # 10 rows in 0.2 s
    assert said[0].endswith("120 tokens")
    assert loud(go(table, Capitals())[0]) == EXPECTED


def test_two_writers_of_one_column_do_not_meet(table):
    held, free = threading.Event(), threading.Event()

    def hold():
        with locked(table.path, "add-loud"):
            held.set()
            free.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    try:
        with pytest.raises(DataError, match="another process is at work"):
            go(table, Capitals())
    finally:
        free.set()
        thread.join()


def test_a_filter_that_no_row_passes_is_refused(table):
    with pytest.raises(DataError, match=r"no row of .* passes the filter 'width < 0'"):
        go(table.where("width < 0"), Capitals())


def test_rows_that_failed_are_made_again_after_too_many_did(table):
    """The cause was put right: the same work, started again, makes the rows that had failed for good."""
    few = tuple(f"{i:06d}" for i in range(40))
    with pytest.raises(DataError, match="tries the failed rows once more"):
        go(table, Capitals(bad=few), max_bad=0.1)
    new, report = go(table, Capitals(), max_bad=0.1)
    assert loud(new) == EXPECTED
    assert report.failed == {}


@pytest.fixture(scope="module")
def ray():
    """A real Ray on this machine."""
    ray = pytest.importorskip("ray")
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
    )
    yield ray
    ray.shutdown()


def test_ray_gives_the_same_columns_and_a_killed_worker_costs_nothing(ray, table, tmp_path):
    work = Capitals(bad=("000003",), log=str(tmp_path / "log"), die="000080")
    new, report = go(table, work, on="ray", workers=2)
    assert (tmp_path / "log.died").exists()
    assert loud(new) == [*EXPECTED[:3], (None, None), *EXPECTED[4:]]
    assert report.failed["no text"].examples == ["000003"]
    assert (report.done, report.tokens) == (120, 120)


def test_an_error_on_ray_is_the_users_error_and_the_work_goes_on_here(ray, tmp_path):
    members = [m for n in range(119) for m in sample(n)] + [("raise.jpg", sample(0)[0][1]), ("raise.txt", b"alt")]
    create(tmp_path / "t.lance", [write_tar(tmp_path / "s.tar", members)], show=False)
    table = Pairs.open(tmp_path / "t.lance")
    with pytest.raises(DataError, match="the server is gone"):
        go(table, Capitals(), on="ray")
