"""Results carry their protocol; scores of different protocols cannot share a column."""

import math
import os
import signal
import subprocess
import sys

import pytest

from cutline.errors import DataError
from cutline.record import Protocol, Result, check_comparable, fingerprint, hash_files, write_atomic


def result(**changes):
    protocol = {
        "task": "segment",
        "data": "camvid:x",
        "data_fingerprint": "f",
        "split": "val",
        "settings": {"crop": 224},
    }
    return Result(metrics={"miou": 0.5}, protocol=Protocol(**(protocol | changes)))


def test_result_round_trip(tmp_path):
    r = result(encoder="runs/a", encoder_hash="h", seed=3)
    r.write(tmp_path)
    assert Result.read(tmp_path) == r


def test_a_score_that_is_no_number_is_still_a_result(tmp_path):
    r = Result(
        metrics={"rmse": math.nan}, protocol=Protocol(**result(settings={"cap": math.inf}).protocol.model_dump())
    )
    r.write(tmp_path)
    assert math.isnan(Result.read(tmp_path).metrics["rmse"])
    assert Result.read(tmp_path).protocol.settings == {"cap": math.inf}


def test_encoder_seed_and_path_may_differ_in_a_column():
    check_comparable([result(), result(encoder="other", encoder_hash="z", seed=5, data="camvid:elsewhere")])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"settings": {"crop": 160}}, "crop: 224 against 160"),
        ({"data_fingerprint": "g"}, "data_fingerprint"),
        ({"split": "test"}, "split"),
    ],
)
def test_other_protocols_are_refused_and_named(changes, named):
    with pytest.raises(DataError, match=named):
        check_comparable([result(), result(**changes)])
    with pytest.raises(DataError) as error:
        check_comparable([result(), result(settings={"crop": 160})])
    assert "settings" not in str(error.value)


def test_missing_and_broken_results_are_data_errors(tmp_path):
    with pytest.raises(DataError, match="cannot read a result"):
        Result.read(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(DataError, match="cannot read a result"):
        Result.read(tmp_path)


def test_fingerprints_depend_on_content_and_order(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    assert fingerprint({"x": 1, "y": 2}) == fingerprint({"y": 2, "x": 1}) != fingerprint({"x": 2, "y": 1})
    assert hash_files([tmp_path / "a", tmp_path / "b"]) != hash_files([tmp_path / "b", tmp_path / "a"])


def test_a_kill_while_writing_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "f"
    write_atomic(path, b"old" * 1000)
    code = (
        "import os, signal, sys\nfrom cutline import record\n"
        "os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "record.write_atomic(sys.argv[1], b'new' * 1000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old" * 1000
