"""Suites: averages by group, nothing measured twice, failures named, other configs refused."""

import csv
import json
from pathlib import Path

import pytest

from cutline import towers
from cutline.errors import ConfigError
from cutline.zeroshot import classify
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
