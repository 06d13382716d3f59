"""Progress on a pipe: lines with the rate and the time left."""

import pytest

from cutline import progress as module
from cutline.progress import progress


def test_what_an_earlier_start_did_does_not_count_for_the_rate(monkeypatch, capsys):
    clock = iter([0.0, 0.0, 20.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with progress("run", 1000, "images", done=900) as tick:
        tick(20)
    assert capsys.readouterr().err.startswith("run: 920/1,000 images, 1.0/s, 80 s left")


@pytest.mark.parametrize("show", [True, False])
def test_quick_work_prints_nothing_on_a_pipe(capsys, show):
    with progress("run", 2, show=show) as tick:
        tick(2, "done")
    assert capsys.readouterr().err == ""
