"""The sweep of the learning rate: judged by validation and never by test, kept through failures, resumable."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import run_cutline

from cutline.errors import ConfigError, DataError, DivergedError, TrainingError
from cutline.record import Protocol, Result, check_comparable
from cutline.transfer import sweep as module
from cutline.transfer.classify import ClassifyConfig
from cutline.transfer.data import DenseData, open_data
from cutline.transfer.segment import SegmentConfig
from cutline.transfer.sweep import parse_rates, sweep


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the sweep runs, in place of training: the score of a rate is its distance from 3e-4, and 1 fails."""
    seen: list[dict[str, Any]] = []

    def transfer(task: str, encoder: Any, data: DenseData, config: Any, out: Path | None, resume: bool) -> Result:
        if config.lr == 1:
            raise DivergedError("the loss was not finite")
        train, scored = (set(data.splits[name].keys) for name in ("train", config.split))
        seen.append({"lr": config.lr, "train": train, "scored": scored, "split": config.split, "labels": config.labels})
        metrics = {"miou": -abs(np.log(config.lr / 3e-4)), "rmse": abs(np.log(config.lr / 3e-4))}
        protocol = Protocol(task=task, data="x", data_fingerprint="x", split=config.split, settings={"lr": config.lr})
        result = Result(metrics=metrics, protocol=protocol)
        if out is not None:
            result.write(out)
        return result

    monkeypatch.setattr(module, "transfer", transfer)
    return seen


@pytest.mark.parametrize("task", ["segment", "depth"])
def test_the_best_rate_is_found_on_pictures_that_are_not_scored(
    folder: Callable[..., Path], encoder: Any, trials: list[dict[str, Any]], task: Any
) -> None:
    data, config = open_data(f"folder:{folder(train=20)}", task), SegmentConfig(labels=10, seed=3)
    result = sweep(task, encoder, data, config, rates=[1e-3, 1e-4, 4e-4, 1])
    assert [t["lr"] for t in trials] == [1e-4, 4e-4, 1e-3, 4e-4]
    *tried, final = trials
    assert final["scored"] == set(data.split("val").keys)
    assert len(final["train"]) == 20
    assert final["labels"] == 10
    for trial in tried:
        assert len(trial["train"]) == 9
        assert len(trial["scored"]) == 1
        assert not trial["train"] & trial["scored"]
        assert trial["labels"] is None
        assert trial["train"] | trial["scored"] <= final["train"]
    assert result.protocol.settings["lr"] == "best of 0.0001, 0.0004, 0.001, 1 by a tenth of the training pictures"


def test_val_judges_where_test_is_scored(
    folder: Callable[..., Path], encoder: Any, trials: list[dict[str, Any]]
) -> None:
    data = open_data(f"folder:{folder()}", "segment")
    data = replace(data, splits={**data.splits, "test": data.split("val").part([0, 2])})
    sweep("segment", encoder, data, SegmentConfig(split="test"), rates=[1e-4, 1e-3])
    assert [t["split"] for t in trials] == ["val", "val", "test"]
    assert trials[0]["scored"] == set(data.split("val").keys)


def test_encoders_with_different_best_rates_share_a_column(
    folder: Callable[..., Path], encoder: Any, trials: list[dict[str, Any]]
) -> None:
    data = open_data(f"folder:{folder()}", "segment")
    one = sweep("segment", encoder, data, SegmentConfig(), rates=[1e-4, 1e-3])
    check_comparable([one, one.model_copy()])
    other = sweep("segment", encoder, data, SegmentConfig(), rates=[1e-4, 2e-3])
    with pytest.raises(DataError, match="lr: 'best of"):
        check_comparable([one, other])


def test_finished_trials_are_not_run_again(
    folder: Callable[..., Path], encoder: Any, tmp_path: Path, trials: list[dict[str, Any]]
) -> None:
    data, out = open_data(f"folder:{folder()}", "segment"), tmp_path / "out"
    first = sweep("segment", encoder, data, SegmentConfig(), out, [1e-4, 1e-3])
    assert (out / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert Result.read(out) == first
    trials.clear()
    (out / "sweep" / "kept").touch()
    with pytest.raises(ConfigError, match="a finished run of another config"):  # `trials` writes no whole protocol
        sweep("segment", encoder, data, SegmentConfig(), out, [1e-4, 1e-3], resume=True)
    (out / "result.json").unlink()  # killed in the last training
    assert sweep("segment", encoder, data, SegmentConfig(), out, [1e-4, 1e-3], resume=True) == first
    assert (out / "sweep" / "kept").exists()
    assert sweep("segment", encoder, data, SegmentConfig(), out, [1e-4, 1e-3]) == first
    assert not (out / "sweep" / "kept").exists()


def test_a_sweep_killed_before_it_said_what_was_tried_is_put_right_by_resuming(
    folder: Callable[..., Path], encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, rates, out = SegmentConfig(head="linear", frozen=True, steps=2, batch=4), [1e-3, 1e-2], tmp_path / "out"
    data = open_data(f"folder:{folder()}", "segment")
    first = sweep("segment", encoder, data, config, out, rates)
    best = (out / "recipe.yaml").read_text().partition("lr: ")[2].split()[0]
    settings = {**first.protocol.settings, "lr": float(best)}
    first.model_copy(update={"protocol": first.protocol.model_copy(update={"settings": settings})}).write(out)
    monkeypatch.setattr("cutline.transfer.segment.segment", None)  # nothing is trained again
    again = sweep("segment", encoder, data, config, out, rates, resume=True)
    assert again == first == Result.read(out)
    with pytest.raises(ConfigError, match="holds another sweep: best of 0.001, 0.01 by"):
        sweep("segment", encoder, data, config, out, [1e-3], resume=True)


def test_what_cannot_be_swept_is_told(folder: Callable[..., Path], encoder: Any, trials: list[dict[str, Any]]) -> None:
    data = open_data(f"folder:{folder(train=2)}", "segment")
    with pytest.raises(DataError, match="2 training pictures are too few"):
        sweep("segment", encoder, data, SegmentConfig(batch=2))
    with pytest.raises(TrainingError, match="failed at every learning rate"):
        sweep("segment", encoder, f"folder:{folder()}", SegmentConfig(), rates=[1])
    with pytest.raises(ConfigError, match="above 0, not -1"):
        sweep("segment", encoder, data, SegmentConfig(), rates=[-1])
    with pytest.raises(ConfigError, match="knn trains nothing"):
        sweep("classify", encoder, data, ClassifyConfig(head="knn"))
    assert parse_rates("lr") == []
    assert parse_rates("lr=1e-4,0.003") == [1e-4, 0.003]
    for wrong in ("batch", "lr=a", "lr:1"):
        with pytest.raises(ConfigError, match="neither lr nor a list"):
            parse_rates(wrong)


def test_the_command_sweeps(folder: Callable[..., Path], tmp_path: Path) -> None:
    done = run_cutline(
        "transfer", "segment", "--encoder", "scratch:vit-tiny-64", "--data", f"folder:{folder()}", "--sweep", "lr=1e-3,1e-2",
        "--out", str(tmp_path / "out"), "head=linear", "steps=3", "batch=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "The best learning rate is" in done.stderr
    assert {p.name for p in (tmp_path / "out" / "sweep").iterdir()} == {"lr-0.001", "lr-0.01"}
    assert Result.read(tmp_path / "out").protocol.settings["lr"].startswith("best of 0.001, 0.01 by")
