"""Suites: averages by group, nothing measured twice, failures named, other configs refused."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_made import save
from processes import LEAVE, on_two_processes

from cutline import towers
from cutline.errors import ConfigError
from cutline.record import Protocol, Result
from cutline.transfer.metrics import Confusion
from cutline.zeroshot import classify
from cutline.zeroshot.segment import chance
from cutline.zeroshot.suite import folder_of, load_suite, run
from cutline.zeroshot.table import table

SUITES = Path(__file__).parents[2] / "recipes" / "suites"
TEXT = """
name: mine
tasks:
  plain: {task: classify, group: names, data: "imagefolder:{root}", config: {prompts: name}}
  photo: {task: classify, group: names, metric: mean_class, data: "imagefolder:{root}", config: {prompts: photo}}
  texts: {task: retrieve, group: texts, metric: [i2t_r1, t2i_r5], data: "scenes:n=6,size=48"}
  gone: {task: classify, group: names, data: "imagefolder:{root}/nowhere"}
"""


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "mine.yaml").write_text(TEXT)
    return tmp_path / "mine.yaml"


def test_a_suite_goes_on_where_it_stopped_and_averages_what_there_is(
    here, suite, model, pictures, tmp_path, monkeypatch
):
    towers.save(model, tmp_path / "a")
    out = tmp_path / "out"
    command = ["zeroshot", "suite", str(suite), f"root={pictures}", "--model", f"{tmp_path}/a", "--out", str(out)]
    done = here(*command)
    assert done.returncode == 1
    assert "1 scores failed (gone)" in done.stderr
    assert "gone FAILED" in done.stderr
    cells = {c["name"]: c for c in json.loads((out / "table.json").read_text())["scores"]}
    results = {n: json.loads((folder_of(out, f"{tmp_path}/a", n) / "result.json").read_text())["metrics"]
               for n in ("plain", "photo", "texts")}  # fmt: skip
    values = [100 * results["plain"]["top1"], 100 * results["photo"]["mean_class"],
              50 * (results["texts"]["i2t_r1"] + results["texts"]["t2i_r5"])]  # fmt: skip
    assert [cells[n]["value"] for n in ("plain", "photo", "texts", "gone")] == [*map(pytest.approx, values), None]
    assert cells["mean of names"]["value"] == pytest.approx(sum(values[:2]) / 2)
    assert (cells["mean of names"]["scored"], cells["mean of names"]["of"]) == (2, 3)
    assert cells["mean of all"]["value"] == pytest.approx(sum(values) / 3)
    assert cells["plain"]["chance"] == pytest.approx(100 / 7)
    assert "(3 of 4)" in (out / "table.md").read_text()
    assert len(list(csv.DictReader((out / "table.csv").open()))) == 7
    assert (out / "table.png").stat().st_size > 1000
    monkeypatch.setattr(classify, "classify", lambda *_, **__: pytest.fail("measured again"))
    (tmp_path / "mine.yaml").write_text(TEXT.replace("metric: mean_class, ", "").split("  gone")[0])
    assert here(*command).returncode == 0  # a metric is only a look at what was measured
    (tmp_path / "mine.yaml").write_text(TEXT.replace("prompts: photo", "prompts: simple"))
    done = here(*command)
    assert "photo holds a score of another config. Choose another --out" in done.stderr


def test_scores_of_other_weights_and_models_of_one_name_are_refused(suite, model, model_of, pictures, tmp_path):
    towers.save(model, tmp_path / "a")
    loaded = load_suite(suite, [f"root={pictures}"])
    loaded.tasks = {"plain": loaded.tasks["plain"]}
    assert run(loaded, [f"{tmp_path}/a"], tmp_path / "out", say=str) == {}
    towers.save(model_of("siglip"), tmp_path / "a")
    with pytest.raises(ConfigError, match="score of another weights"):
        run(loaded, [f"{tmp_path}/a"], tmp_path / "out", say=str)
    with pytest.raises(ConfigError, match="'b' and 'B' would share|'B' and 'b' would share"):
        run(loaded, ["b", "B"], tmp_path / "out", say=str)


def test_a_score_of_other_pictures_is_measured_again_and_no_other(suite, model, pictures, tmp_path):
    towers.save(model, tmp_path / "a")
    loaded, out, name = load_suite(suite, [f"root={pictures}/test"]), tmp_path / "out", f"{tmp_path}/a"
    loaded.tasks = {n: loaded.tasks[n] for n in ("plain", "texts")}

    def lines():
        said = []
        assert run(loaded, [name], out, say=said.append) == {}
        return [line.strip().split(",")[0] for line in said]

    assert [line.split(" ")[0] for line in lines()[1:]] == ["plain:", "texts:"]
    before = Result.read(folder_of(out, name, "plain"))
    assert lines() == [f"{name}: 0 of 2 data sets to score"]
    shutil.copy(pictures / "test/sky/0.png", pictures / "test/wine/1.png")
    assert lines()[1] == "plain: its data have changed since it was scored"
    after = Result.read(folder_of(out, name, "plain"))
    assert after.protocol.data_fingerprint != before.protocol.data_fingerprint
    assert len(lines()) == 1
    (pictures / "test").rename(pictures / "gone")
    assert lines()[1].startswith("plain: its score stays")
    assert Result.read(folder_of(out, name, "plain")) == after


def test_segmentation_has_its_chance_in_the_table(tmp_path):
    (tmp_path / "s.yaml").write_text("name: s\ntasks: {words: {task: segment, data: x, metric: [miou, accuracy]}}")
    suite, confusion = load_suite(tmp_path / "s.yaml"), Confusion(4)
    confusion.update(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 1]))
    protocol = Protocol(task="zeroshot-segment", data="x", data_fingerprint="f", split="val")
    Result(metrics={**confusion.scores(), **chance(confusion)}, protocol=protocol).write(
        folder_of(tmp_path, "m", "words")
    )
    (cell,) = table(suite, ["m"], tmp_path).rows[0]
    uniform = [0.5 * 0.25 / (0.5 + 0.25 - 0.5 * 0.25)] * 2 + [0, 0]
    assert cell.chance == pytest.approx(100 * np.mean([np.mean(uniform), 1 / 4]))


TWO = (
    LEAVE
    + """
import sys
import torch.distributed as dist
from cutline.zeroshot.suite import load_suite, run
dist.init_process_group("gloo")
plan, model, out = sys.argv[1:]
print(run(load_suite(plan), [model], __import__("pathlib").Path(out)))
leave()
"""
)


def test_two_processes_score_as_one(model, pictures, tmp_path, monkeypatch):
    """To the last digit; and what only one of the two finds wrong fails on both."""
    rng, dense = np.random.default_rng(0), tmp_path / "dense"
    for split, count in (("train", 1), ("val", 7)):
        for i in range(count):
            save(dense / split / "images" / f"{i}.png", rng.integers(0, 256, (24, 40, 3), dtype=np.uint8))
            save(dense / split / "masks" / f"{i}.png", rng.integers(0, 3, (24, 40), dtype=np.uint8))
    (dense / "classes.txt").write_text("ground\nred box\nsky")
    shutil.copytree(pictures / "test", tmp_path / "broken/test")
    for i in range(3):
        (tmp_path / f"broken/test/wine/{i}.png").write_bytes(b"")  # all in the second one's share
    (tmp_path / "test/sky/1.png").write_bytes(b"")
    (tmp_path / "two.yaml").write_text(f"""
name: two
device: cpu
root: {tmp_path}
tasks:
  classes: {{task: classify, data: "imagefolder:{{root}}", config: {{batch: 4, prompts: simple, split: test}}}}
  broken: {{task: classify, data: "imagefolder:{{root}}/broken", config: {{batch: 4, prompts: simple}}}}
  texts: {{task: retrieve, data: "scenes:n=7,size=48", config: {{batch: 2, max_texts: 3}}}}
  pixels: {{task: segment, data: "folder:{{root}}/dense", config: {{batch: 2, prompts: name}}}}
""")
    name = str(towers.save(model, tmp_path / "model"))
    said = []
    failed = run(load_suite(tmp_path / "two.yaml"), [name], tmp_path / "one", say=said.append)
    monkeypatch.setenv("CUTLINE_CACHE", str(tmp_path / "cache"))  # the two embed the names themselves
    printed = on_two_processes(TWO, str(tmp_path / "two.yaml"), name, str(tmp_path / "both"), folder=tmp_path)
    assert printed == ["\n".join([*said, f"{failed}\n"]), f"{failed}\n"]
    assert list(failed) == [(name, "broken")]
    for entry in ("classes", "texts", "pixels"):
        one, both = (Result.read(folder_of(tmp_path / n, name, entry)) for n in ("one", "both"))
        assert both.protocol == one.protocol
        assert both.per_class == one.per_class
        assert both.metrics == one.metrics
        pictures_seen = [folder_of(tmp_path / n, name, entry) / "samples.png" for n in ("one", "both")]
        assert pictures_seen[0].read_bytes() == pictures_seen[1].read_bytes()


def scored(suite, pictures, folder):
    """One data set, from YAML to table."""
    loaded = load_suite(suite, [f"root={pictures}"])
    loaded.tasks = {"photo": loaded.tasks["photo"]}
    run(loaded, [f"{folder}/a"], folder / "out", say=str)
    return table(loaded, [f"{folder}/a"], folder / "out")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("task: retrieve", "task: retreive", "line 6.*did you mean 'retrieve'"),
        ("prompts: name", "promts: name", "did you mean 'prompts'"),
        ("prompts: name", "device: cpu", "give it to the whole suite"),
        ("metric: mean_class", "metric: top9", "no metric 'top9'; there are top1, top5"),
    ],
)
def test_what_is_wrong_in_a_suite_is_told(suite, model, pictures, tmp_path, old, new, message):
    suite.write_text(TEXT.replace(old, new))
    towers.save(model, tmp_path / "a")
    with pytest.raises(ConfigError, match=message):
        scored(suite, pictures, tmp_path)


def test_the_suites_of_recipes_are_read():
    assert [len(load_suite(path, ["root=/data"]).tasks) for path in sorted(SUITES.glob("*.yaml"))] == [32, 7]
