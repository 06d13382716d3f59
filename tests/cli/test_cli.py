"""The command line, run as commands: help that is quick, errors without tracebacks, the README's chain on real data."""

import json
import subprocess
import sys

import pytest
from processes import run_cutline

from cutline.cli import main
from cutline.errors import DataError
from cutline.record import Result


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nsys.argv = ['cutline', '--help']\nfrom cutline.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'lance', 'open_clip', 'timm', 'torchvision', 'matplotlib', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "no-such.yaml"], "cannot read the recipe 'no-such.yaml'"),
        (["quickstart", "--size", "huge"], "tiny, small, full"),
        (["transfer", "segment", "--encoder", "scratch:vit-tiny-64", "--data", "camvd:x"], "camvid"),
        (["zeroshot", "retrieve", "--model", "nowhere", "--data", "scenes:n=4"], "nowhere"),
        (["pairs", "info", "no-such.lance"], "no-such.lance"),
        (["quickstart", "--size", "tiny", "--out", "/dev/null"], "Not a directory: '/dev/null"),
        (["quickstart", "--size", "tiny", "--seeds", "0"], "seeds (override 'seeds=[]')"),
        (
            ["transfer", "depth", "--encoder", "scratch:vit-tiny-64", "--data", "scenes:n=4", "stepz=3"],
            "did you mean 'steps'",
        ),
    ],
)
def test_user_errors_are_one_message_and_exit_code_1(here, tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    done = here(*command)
    assert done.returncode == 1
    assert message in done.stderr


def test_an_error_of_the_command_has_no_traceback_unless_asked_for(tmp_path, monkeypatch):
    done = run_cutline("pairs", "info", "no-such.lance", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    monkeypatch.setattr(sys, "argv", ["cutline", "--debug", "pairs", "info", str(tmp_path / "no-such.lance")])
    with pytest.raises(DataError):
        main()


def test_scores_of_other_options_are_kept_apart(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["zeroshot", "retrieve", "--model", "scratch:vit-tiny-64", "--data", "scenes:n=4,size=48"]
    folders = set()
    for options in ([], ["max_texts=2"]):
        done = here(*command, *options)
        assert done.returncode == 0, done.stderr
        folders.add(done.stdout.split("Written: ")[1].strip())
    assert len(folders) == 2
    texts = {int(Result.read(tmp_path / f).metrics["texts"]) for f in folders}
    assert texts == {8, 20}


def test_the_readme_chain_on_real_photos(real_data, tmp_path):
    """Tars → table → training → retrieval → segmentation and depth, a few steps each."""
    small = ["train.samples=64", "train.batch=16", "train.warmup=1", "data.threads=1"]
    recipe = __file__.replace("tests/cli/test_cli.py", "recipes/flickr8k-small.yaml")
    brief = ["steps=2", "labels=4", "pictures=4", "batch=2", "channels=16"]
    commands = [
        ["pairs", "create", "flickr.lance", f"{real_data}/flickr8k/{{00000..00003}}.tar", "--alt", "txt", "--captions", "json:captions"],
        ["train", recipe, "data.pairs=flickr.lance", *small],
        ["zeroshot", "retrieve", "--model", "runs/flickr8k-small", "--data", "flickr.lance"],
        ["transfer", "segment", "--encoder", "runs/flickr8k-small", "--data", f"camvid:{real_data}/camvid", *brief],
        ["transfer", "depth", "--encoder", "runs/flickr8k-small", "--data", f"folder:{real_data}/rgbd", *brief],
    ]  # fmt: skip
    outputs = []
    for command in commands:
        done = run_cutline(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert "4,000" in outputs[0]
    run = tmp_path / "runs" / "flickr8k-small"
    scores = {p.parent.name.split("-")[0]: Result.read(p.parent) for p in run.glob("*/result.json")}
    assert scores.keys() == {"retrieve", "segment", "depth"}
    assert scores["retrieve"].metrics["pictures"] == 500  # held out by the recipe's filter
    assert scores["retrieve"].metrics["t2i_r10"] >= scores["retrieve"].metrics["chance_t2i_r10"] / 4
    assert 0 <= scores["segment"].metrics["miou"] < 1
    assert scores["depth"].metrics["rmse"] > 0
    assert all("Written:" in o for o in outputs)
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4


def test_scenes_as_pairs_and_labels(tmp_path):
    done = run_cutline("scenes", "s.lance", "--n", "12", "--size", "48", "--labels", "labels", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "captions" in run_cutline("pairs", "info", "s.lance", cwd=tmp_path).stdout
    assert run_cutline("pairs", "check", "s.lance", cwd=tmp_path).returncode == 0
    assert len(list((tmp_path / "labels").rglob("*.png"))) >= 24
    exported = run_cutline("pairs", "export", "s.lance", "tars", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert run_cutline("pairs", "create", "back.lance", "tars/*.tar", cwd=tmp_path).returncode == 0
