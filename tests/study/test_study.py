"""Plans, statistics and the report; the quickstart itself is run by its command."""

import json
import random
import time
from pathlib import Path

import pytest
import yaml
from processes import run_cutline, start

from cutline import towers
from cutline.config import dump, load
from cutline.errors import ConfigError, DataError
from cutline.pairs import Pairs
from cutline.record import Protocol, Result
from cutline.scenes import parse_spec
from cutline.scenes.write import write_pairs
from cutline.study.cards import _picture, cards
from cutline.study.plan import SIZES, Plan, load_plan, quickstart_plan
from cutline.study.report import _curves, _how
from cutline.study.runner import Cell, _chosen, _pretrain, _transfer, check_folder, results
from cutline.study.statistics import difference, headline, scores
from cutline.train.recipe import Recipe

TINY = {
    "name": "test",
    "seeds": [0, 1],
    "recaption": {
        "scenes": "scenes:n=32,size=48,seed=1", "share": 0.5, "fused": True,
        "captioner": {"image": {"samples": 16, "batch": 8}, "train": {"samples": 16, "batch": 8}},
    },
    "base": {
        "data": {"pairs": "{out}/pairs.lance", "cache": True, "threads": 1},
        "towers": {
            "custom": {
                "embed_dim": 16,
                "vision_cfg": {"image_size": 48, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
                "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "layers": 1, "heads": 1},
            }
        },
        "objectives": {"contrastive": {}},
        "train": {"batch": 8, "samples": 16, "warmup": 1, "save_every": 1, "log_every": 1},
    },
    "arms": {"scratch": None, "alt text": {"data.text.columns": {"alt": 1}}, "ours": {"data.text.columns": {"caption_ours": 1}}, "captions": {"data.text.columns": {"captions": 1}}},
    "compare": ["captions", "alt text"],
    "show": 2,
    "tasks": {
        "seg": {"task": "segment", "data": "scenes:n=8,size=48,seed=2", "config": {"head": "linear", "frozen": True, "steps": 2, "batch": 4, "pictures": 16}},
        "depth": {"task": "depth", "data": "scenes:n=8,size=48,seed=2", "config": {"head": "linear", "frozen": True, "steps": 2, "batch": 4, "pictures": 16}},
        "retrieval": {"task": "retrieve", "data": "scenes:n=8,size=48,seed=3", "config": {"columns": ["captions"]}},
    },
}  # fmt: skip


def made(scores: dict[str, list[float]], **settings) -> dict[Cell, Result]:
    """Results of the task "seg" by arm and seed."""
    return {
        Cell(arm, seed, "seg"): Result(
            metrics={"miou": value},
            protocol=Protocol(
                task="segment", data="d", data_fingerprint="f", split="test", settings=settings, seed=seed
            ),
        )
        for arm, values in scores.items()
        for seed, value in enumerate(values)
    }


@pytest.fixture
def plan() -> Plan:
    return Plan.model_validate(TINY | {"tasks": {"seg": TINY["tasks"]["seg"]}})


def test_every_size_is_a_valid_plan_with_the_same_arms_and_tasks():
    plans = [quickstart_plan(size) for size in SIZES]
    assert len({tuple(p.arms) for p in plans}) == 1
    assert len({tuple(t.task for t in p.tasks.values()) for p in plans}) == 1
    assert list(plans[0].arms) == [
        "scratch",
        "CLIP on alt text",
        "CLIP on our own captions",
        "CLIP on quality captions",
    ]
    for p in plans:
        trained = [p.recipe(a, 0).model_dump(exclude={"name": True, "data": {"text"}}) for a in p.arms]
        assert all(t == trained[0] for t in trained)  # the arms differ in their text alone


def test_labels_and_tests_come_from_other_scenes_than_pretraining():
    for size in SIZES:
        p = quickstart_plan(size)
        seeds = {t.data.partition("seed=")[2] for t in p.tasks.values()}
        assert p.recaption.scenes.partition("seed=")[2].split(",")[0] not in seeds


def test_a_plan_with_an_unknown_arm_or_key_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(TINY | {"compare": ["captions", "no such"]}))
    with pytest.raises(ConfigError, match="no such"):
        load_plan(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(TINY | {"arm": {}}))
    with pytest.raises(ConfigError, match="did you mean 'arms'"):
        load_plan(tmp_path / "b.yaml")
    with pytest.raises(ConfigError, match="huge.*tiny, small, full"):
        quickstart_plan("huge")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": TINY["base"] | {"trian": {}}}, "in base.*unknown key 'trian': did you mean 'train'"),
        ({"tasks": {"Seg": {"task": "segment", "data": "d", "config": {"hed": "linear"}}}}, "tasks.Seg.*line.*unknown key 'hed': did you mean 'head'"),
        ({"arms": TINY["arms"] | {"alt-text": None}}, "arm 'alt-text'.*that of 'alt text'"),
        ({"tasks": {"model": TINY["tasks"]["seg"]}}, "task 'model'.*a run's own"),
        ({"recaption": {"scenes": "scenes:n=8", "write": {"top_k": 5}}}, "recaption.*in write.*unknown key 'top_k'"),
        ({"recaption": {"scenes": "scenes:n=8", "write": {"column": "x"}}}, "recaption.*'column' is not to be chosen"),
        ({"recaption": {"scenes": "scenes:n=8", "captioner": {"nope": 1}}}, "recaption.*in captioner.*unknown key 'nope'"),
        ({"recaption": {"scenes": "scenes:nn=8"}}, "recaption.*in scenes"),
        ({"seeds": [0, -1]}, "seeds.1.*greater than or equal to 0"),
    ],
)  # fmt: skip
def test_wrong_keys_and_names_in_a_plan_are_told_at_the_start(tmp_path, changes, message):
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(TINY | changes))
    with pytest.raises(ConfigError, match=message) as error:
        load_plan(tmp_path / "p.yaml")
    assert "pydantic" not in str(error.value)


def test_an_arm_replaces_the_columns_of_the_base():
    base = TINY["base"] | {"data": TINY["base"]["data"] | {"text": {"columns": {"alt": 1}}}}
    assert Plan.model_validate(TINY | {"base": base}).recipe("captions", 0).data.text.columns == {"captions": 1}


def test_an_override_of_the_base_merges_sections_and_replaces_columns(tmp_path):
    base = TINY["base"] | {"data": TINY["base"]["data"] | {"text": {"columns": {"captions": 1}}}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(TINY | {"base": base}))
    plan = load_plan(tmp_path / "p.yaml", ["base.data.text.columns={alt: 1}", "base.train={lr: 0.1}"])
    assert plan.base["data"] == base["data"] | {"text": {"columns": {"alt": 1}}}
    assert plan.base["train"] == base["train"] | {"lr": 0.1}


@pytest.mark.parametrize("arm", [{"towers.custom": {"embed_dim": 8}}, {"towers": {"custom": {"embed_dim": 8}}}])
def test_an_arm_replaces_the_towers_of_the_base(arm):
    assert Plan.model_validate(TINY | {"arms": TINY["arms"] | {"other": arm}}).recipe("other", 0).towers.custom == {
        "embed_dim": 8
    }


def test_classification_is_a_task_of_a_study(tmp_path):
    data = "scenes:n=240,size=48,seed=2,objects=24"
    task = {"task": "classify", "data": data, "config": {"head": "knn", "k": 3, "pictures": 20}}
    plan = Plan.model_validate(TINY | {"tasks": {"probe": task}})
    result = _transfer(plan, Cell("scratch", 1, "probe"), tmp_path, "scratch:vit-tiny-64")
    assert result.protocol.seed == 1
    found = results(plan, tmp_path)
    assert scores(plan, found, "probe", "scratch") == {1: pytest.approx(100 * result.metrics["top1"])}


def test_a_task_may_sweep_the_learning_rate_and_detection_is_one(tmp_path):
    scenes = {"data": "scenes:n=8,size=64,seed=2", "config": {"steps": 2, "batch": 2, "pictures": 2}}
    tasks = {"boxes": scenes | {"task": "detect"}, "swept": scenes | {"task": "depth", "sweep": [1e-3, 1e-4]}}
    plan = Plan.model_validate(TINY | {"tasks": tasks})
    for name in tasks:
        _transfer(plan, Cell("scratch", 0, name), tmp_path, "scratch:vit-tiny-64")
    found = results(plan, tmp_path)
    assert found[Cell("scratch", 0, "swept")].protocol.settings["lr"].startswith("best of 0.0001, 0.001 by a tenth")
    ap = found[Cell("scratch", 0, "boxes")].metrics["ap"]
    assert scores(plan, found, "boxes", "scratch") == {0: pytest.approx(100 * ap)}
    with pytest.raises(ValueError, match="sweep: retrieval trains nothing"):
        Plan.model_validate(TINY | {"tasks": {"r": TINY["tasks"]["retrieval"] | {"sweep": [1e-3]}}})


def test_differences_are_paired_over_seeds(plan):
    found = made({"captions": [0.50, 0.70, 0.61], "alt text": [0.40, 0.58, 0.50]})
    d = difference(plan, found, "seg", "captions", "alt text")
    assert d.mean == pytest.approx(11.0)
    assert d.spread == pytest.approx(1.0)  # of 10, 12 and 11
    assert d.verdict == "better"


def test_verdicts_follow_the_t_interval(plan):
    """Mean 2, standard deviation 1: with three seeds t · s/√n = 2.48 covers 0, with four 1.59 does not."""
    three = made({"captions": [0.51, 0.52, 0.53], "alt text": [0.5] * 3})
    four = made({"captions": [0.51, 0.52, 0.53, 0.52], "alt text": [0.5] * 4})
    assert difference(plan, three, "seg", "captions", "alt text").verdict == "no clear difference"
    assert difference(plan, four, "seg", "captions", "alt text").verdict == "better"


def test_many_seeds_are_judged_by_students_t_too(plan):
    """Mean 0.63 of twelve differences 1.63 and −0.37: 2.20 · s/√n = 0.66 covers 0, and 2 · s/√n would not."""
    found = made({"captions": [0.5163, 0.4963] * 6, "alt text": [0.5] * 12})
    assert difference(plan, found, "seg", "captions", "alt text").verdict == "no clear difference"


def test_a_difference_within_the_spread_is_called_none(plan):
    found = made({"captions": [0.50, 0.40], "alt text": [0.40, 0.48]})
    assert difference(plan, found, "seg", "captions", "alt text").verdict == "no clear difference"
    assert "no clear difference" in headline(plan, found)


def test_one_seed_needs_a_larger_difference(plan):
    small, large = made({"captions": [0.505], "alt text": [0.5]}), made({"captions": [0.4], "alt text": [0.5]})
    assert difference(plan, small, "seg", "captions", "alt text").verdict == "no clear difference"
    assert difference(plan, large, "seg", "captions", "alt text").verdict == "worse"
    assert difference(plan, large, "seg", "captions", "alt text").spread is None


def test_scores_of_other_protocols_never_share_a_column(plan):
    found = made({"captions": [0.5]}, crop=64) | made({"alt text": [0.5]}, crop=128)
    with pytest.raises(DataError, match="crop: 64 against 128"):
        difference(plan, found, "seg", "captions", "alt text")


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A small study run by its command, after it was killed twice at random moments."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "plan.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    for _ in range(2):
        child = start("-m", "cutline.cli", "study", "plan.yaml", "--out", "out", cwd=folder)
        time.sleep(random.uniform(2, 9))
        child.killed()
    done = run_cutline("study", "plan.yaml", "--out", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_a_killed_study_goes_on_and_finishes_every_cell(study):
    plan = load_plan(study / "plan.yaml")
    assert len(results(plan, study / "out")) == 4 * 2 * 3
    assert "difference" in (study / "stdout").read_text()


def test_a_finished_study_does_nothing_again(here, study, monkeypatch):
    monkeypatch.chdir(study)
    plan = load_plan(study / "plan.yaml")
    paths = [c.folder(study / "out") / "result.json" for c in results(plan, study / "out")]
    before = [p.stat().st_mtime_ns for p in paths]
    assert here("study", "plan.yaml", "--out", "out").returncode == 0
    assert [p.stat().st_mtime_ns for p in paths] == before


def test_runs_keep_the_whole_path_of_their_study_and_so_go_on_from_another_folder(study):
    recipe = load(Recipe, study / "out" / "captions" / "seed-0" / "recipe.yaml")
    assert recipe.data.pairs == str((study / "out" / "pairs.lance").resolve())


def test_the_report_stands_alone_and_shows_everything(study):
    page = (study / "out" / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert 'src="data:image/jpeg;base64,' in page
    for text in (
        "alt text",
        "captions",
        "scratch",
        "no clear difference",
        "How this was measured",
        "side by side",
        "8 pictures and 40 texts of scenes:n=8,size=48,seed=3, without training; chance",
        "<svg",
    ):
        assert text in page
    row = json.loads((study / "out" / "captions" / "seed-0" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["step"] == 1


def test_more_seeds_may_be_added_to_a_study(tmp_path, plan):
    (tmp_path / "study.yaml").write_text(dump(plan))
    check_folder(plan.model_copy(update={"seeds": [0, 1, 2]}), tmp_path)
    with pytest.raises(ConfigError, match="holds another study"):
        check_folder(plan.model_copy(update={"base": plan.base | {"seed": 3}}), tmp_path)


def test_an_untrained_encoder_is_there_only_when_it_is_whole(tmp_path, plan, monkeypatch):
    """A kill while it is written: the second start writes it again."""
    cell = Cell("scratch", 0)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        killed.setattr("cutline.towers.store.write_atomic", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        _pretrain(plan, cell, tmp_path, {})
    assert towers.load(_pretrain(plan, cell, tmp_path, {}))


def test_the_report_of_a_study_that_never_ran_says_so(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(TINY))
    done = here("study", "plan.yaml", "--report")
    assert done.returncode == 1
    assert "there is no study in" in done.stderr


def test_the_report_says_of_a_study_only_what_its_plan_says(plan):
    told = " ".join(_how(plan, {}))
    assert "scratch: no pretraining" in told
    assert "captions: data.text.columns = {'captions': 1}" in told
    assert "validation" not in told
    assert "validation" in " ".join(_how(quickstart_plan("tiny"), {}))


def test_curves_of_a_run_that_is_being_written(tmp_path, plan):
    folder = Cell("captions", 0).folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"samples": 8, "contrastive/text": 2.0}\n{"samples": 16, "lo')
    assert "<svg" in _curves(plan, tmp_path)
    (folder / "metrics.jsonl").write_text(
        '{"samples": 8, "loss": 2.0, "mae/pixels": 2.0, "contrastive/accuracy/text": 1}\n'
    )
    assert _curves(plan, tmp_path) is None  # no contrast, and no level to compare


def test_captions_stand_beside_their_own_pictures_in_a_filtered_study(tmp_path):
    write_pairs(parse_spec("scenes:n=8,size=48,seed=1"), tmp_path / "pairs.lance")
    where = "key >= 's1-00000004'"
    base = TINY["base"] | {"data": TINY["base"]["data"] | {"where": where}}
    card = cards(Plan.model_validate(TINY | {"base": base}), tmp_path, count=1)[0]
    row = Pairs.open(tmp_path / "pairs.lance", where).read([0], ["image", "alt"])[0]
    assert card["image"] == _picture(row["image"])
    assert card["texts"][0]["lines"] == [row["alt"]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["tasks.depth.data=folder:nowhere"], "nowhere"),
        (["tasks.retrieval.data=nowhere.lance"], "nowhere.lance"),
        (["base.data.pairs=nowhere.lance"], "nowhere.lance"),
        (["--only", "no such"], "'no such' names no cell"),
    ],
)
def test_a_wrong_start_leaves_the_folder_to_the_corrected_study(here, tmp_path, monkeypatch, wrong, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(TINY))
    done = here("study", "plan.yaml", "--out", "out", *wrong)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_arms_with_a_slash_in_their_name_can_be_chosen():
    plan = Plan.model_validate(TINY | {"arms": TINY["arms"] | {"CLIP w/ alt": {}}})
    assert _chosen(plan, "CLIP w/ alt") == (["CLIP w/ alt"], ["seg", "depth", "retrieval"])
    assert _chosen(plan, "CLIP w/ alt/depth") == (["CLIP w/ alt"], ["depth"])
    with pytest.raises(ConfigError, match="'CLIP w/ text' names no cell"):
        _chosen(plan, "CLIP w/ text")


def test_another_study_in_the_same_folder_is_refused(here, study, monkeypatch):
    monkeypatch.chdir(study)
    done = here("study", "plan.yaml", "--out", "out", "base.train.lr=0.5")
    assert done.returncode == 1
    assert "holds another study" in done.stderr
