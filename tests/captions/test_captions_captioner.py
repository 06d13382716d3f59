"""A captioner of our own: it learns, is judged on rows held out by their keys, stops early, and goes on after a kill."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import on_two_processes, run_cutline

from cutline import towers
from cutline.captions import captioner
from cutline.captions.captioner import Best, CaptionerConfig, HeldOut, Rows, split, train_captioner
from cutline.captions.coca import CocaWriter
from cutline.captions.engine import RunConfig, run
from cutline.config import load
from cutline.errors import ConfigError, DataError
from cutline.pairs import Pairs
from cutline.record import Result
from cutline.scenes import parse_spec
from cutline.scenes.write import write_pairs

FEW = ["image.samples=16", "train.samples=32", "train.batch=8", "image.batch=8", "train.save_every=2", "train.log_every=1",
       "image.save_every=1", "image.warmup=1", "train.warmup=1"]  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """40 scenes, of which every second one has good captions."""
    path = tmp_path_factory.mktemp("scenes") / "s.lance"
    write_pairs(parse_spec("scenes:n=40,size=64,seed=3,objects=24"), path)
    return Pairs.open(path).add_column(
        "caption_human", lambda rows: [r["captions"] if int(r["key"][-1]) % 2 else None for r in rows],
        columns=["key", "captions"], type="list<string>", show=False,
    )  # fmt: skip


def few(*overrides: str) -> CaptionerConfig:
    return load(CaptionerConfig, None, [*FEW, *overrides])


@pytest.mark.slow
def test_it_learns_eight_scenes_by_heart(tmp_path):
    write_pairs(parse_spec("scenes:n=10,size=64,seed=5,objects=24"), tmp_path / "s.lance")
    pairs = Pairs.open(tmp_path / "s.lance").add_column(
        "one", lambda rows: [r["captions"][0] for r in rows], columns=["captions"], show=False
    )
    config = load(CaptionerConfig, None, ["image=null", "train.samples=1920", "train.batch=8", "train.save_every=240",
                                          "augment.scale=[1,1]", "augment.ratio=[1,1]", "train.lr=3e-3"])  # fmt: skip
    result = train_captioner(pairs, "one", tmp_path / "cap", config, show=False)
    assert (result.metrics["pictures"], result.metrics["held_out"]) == (9, 1)
    learnt, _ = split(pairs, "one", config)
    written, _ = run(pairs, CocaWriter(str(tmp_path / "cap"), "ours"), "ours", RunConfig(), show=False)
    rows = written.read(learnt.rows, ["one", "ours"])
    right = [r["one"].lower().replace(" ", "") == r["ours"].replace(" ", "") for r in rows]
    assert sum(right) >= 8


def test_rows_are_held_out_by_their_keys_alone(scenes):
    learnt, held = split(scenes, "caption_human", few("held_out=0.2"))
    assert (len(learnt), len(held)) == (16, 4)
    assert not set(learnt.rows) & set(held.rows)
    assert all(r["caption_human"] for r in scenes.read([*learnt.rows, *held.rows], ["caption_human"]))
    some = scenes.where("key <> 's3-00000001'")
    again = {some.read([r], ["key"])[0]["key"] for r in split(some, "caption_human", few("held_out=0.2"))[1].rows}
    before = {r["key"] for r in scenes.read(held.rows, ["key"])}
    assert len(again & before) >= 3  # a row less moves at most one
    assert split(scenes, "caption_human", few("held_out=0.2", "seed=1"))[1].rows.tolist() != held.rows.tolist()


def test_the_image_run_sees_all_rows_and_good_ones_as_often_as_said(scenes):
    learnt, held = split(scenes, "caption_human", few())
    mixed = captioner._with_others(learnt, held, ["alt"], 0.75)
    good = [r for r in mixed.rows if r in set(learnt.rows)]
    assert len(good) / len(mixed.rows) == pytest.approx(0.75, abs=0.1)
    assert set(mixed.rows) == set(range(40)) - set(held.rows)
    assert captioner._with_others(learnt, held, [], 0.5) is learnt


def test_training_stops_when_captions_get_no_better_and_keeps_the_best(scenes, tmp_path, monkeypatch):
    scores = iter([0.3, 0.5, 0.4, 0.5, 0.2, 0.1])
    monkeypatch.setattr(HeldOut, "written", lambda *a: {"cider_d": next(scores, 0.0), "content_f1": 0.1})
    monkeypatch.setattr(HeldOut, "loss", lambda *a: 1.0)
    kept = []
    real = towers.save
    monkeypatch.setattr(captioner.towers, "save", lambda model, folder: kept.append(1) or real(model, folder))
    config = few("image=null", "train.samples=800", "patience=3")
    result = train_captioner(scenes, "caption_human", tmp_path / "c", config, show=False)
    assert result.metrics["steps"] == 4  # the second look; the fourth is as good, not better
    assert [float(v["cider_d"]) for v in json.loads((tmp_path / "c" / "held_out.json").read_text()).values()] == [
        0.3,
        0.5,
        0.4,
        0.5,
        0.2,
    ]
    assert len(kept) == 2


def test_resume_after_a_kill_gives_the_same_captioner(scenes, tmp_path, monkeypatch):
    whole = train_captioner(scenes, "caption_human", tmp_path / "whole", few(), show=False)
    real = Best.__call__

    def killed(self, run):
        stop = real(self, run)
        if run.step == 2:
            raise KeyboardInterrupt
        return stop

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        m.setattr(Best, "__call__", killed)
        train_captioner(scenes, "caption_human", tmp_path / "cut", few(), show=False)
    with pytest.raises(ConfigError, match="already holds a captioner"):
        train_captioner(scenes, "caption_human", tmp_path / "cut", few(), show=False)
    again = train_captioner(scenes, "caption_human", tmp_path / "cut", few(), resume=True, show=False)
    assert again.metrics == whole.metrics
    a, b = (torch.nn.utils.parameters_to_vector(towers.load(str(tmp_path / n)).parameters()) for n in ("whole", "cut"))
    assert torch.equal(a, b)
    assert train_captioner(scenes, "caption_human", tmp_path / "cut", few(), resume=True).seconds == again.seconds
    with pytest.raises(ConfigError, match=r"column: 'caption_human' then, 'captions' now; .*seed: 0 then, 1 now"):
        train_captioner(scenes, "captions", tmp_path / "cut", few("seed=1"), resume=True)


def test_a_refused_start_leaves_the_captioner_as_it_was(scenes, tmp_path):
    train_captioner(scenes, "caption_human", tmp_path / "c", few("image=null"), show=False)
    before = {p: p.read_bytes() for p in (tmp_path / "c").glob("*.json")}
    with pytest.raises(ConfigError, match="already holds a captioner"):
        train_captioner(scenes, "alt", tmp_path / "c", few("image=null"), show=False)
    assert {p: p.read_bytes() for p in (tmp_path / "c").glob("*.json")} == before


def test_where_cider_tells_nothing_words_and_then_the_loss_choose():
    best = Best(None, Path("."), 3)
    for step, words, loss in ((2, 0.0, 5.0), (4, 0.3, 4.0), (6, 0.3, 3.0), (8, 0.2, 2.0)):
        best.history[step] = {"cider_d": 0.0, "content_f1": words, "loss": loss}
    assert best.step == 6


def test_two_processes_train_one_captioner(scenes, tmp_path):
    code = f"""
from pathlib import Path
from cutline.captions.captioner import CaptionerConfig, train_captioner
from cutline.config import load
from cutline.pairs import Pairs
result = train_captioner(Pairs.open({scenes.path!r}), "caption_human", Path({str(tmp_path / "c")!r}), load(CaptionerConfig, None, {FEW!r}), show=False)
print(result.metrics["steps"], result.metrics["loss"])
"""
    one, two = on_two_processes(code, folder=tmp_path)
    assert one == two
    assert Result.read(tmp_path / "c").metrics["steps"] == float(one.split()[0])


def test_the_held_out_loss_is_the_objectives_own(scenes):
    """Over one batch it is the captioning loss of all references, in eval mode."""
    from cutline.objectives.base import Batch, Features, Texts
    from cutline.objectives.captioning import Config, Objective

    torch.manual_seed(0)
    model = towers.build(towers.TowerConfig(model="coca-tiny-64"))
    objective = Objective(Config(), model)
    _, held = split(scenes, "caption_human", few("held_out=0.2"))
    ((images, _, texts),) = HeldOut(held, "caption_human").batches(model)
    flat = [t for found in texts for t in found]
    owners = torch.tensor([i for i, found in enumerate(texts) for _ in found])
    batch = Batch({"image": images}, {"text": Texts(towers.Tokenizer(model)(flat), owners, paired=False)})
    with torch.no_grad():
        expected = objective(batch, Features(model.eval(), batch))["text"]
    assert HeldOut(held, "caption_human").loss(model, objective) == pytest.approx(float(expected), rel=1e-5)


def test_columns_without_captions_are_refused(scenes):
    with pytest.raises(DataError, match="no column 'caption_mine'"):
        train_captioner(scenes, "caption_mine", None, few())
    with pytest.raises(DataError, match=r"1 rows .* have a caption in 'caption_human'.*three at the very least"):
        split(scenes.where("key = 's3-00000001'"), "caption_human", few())
    with pytest.raises(DataError, match="'width' holds no text but 64"):
        split(scenes, "width", few())


def test_rows_read_as_the_table_does(scenes):
    rows = Rows(scenes, [7, 3], ["x"])
    assert rows.read([1, 0], ["key"]) == [{"key": "s3-00000003"}, {"key": "s3-00000007"}]
    assert rows.fingerprint != Rows(scenes, [7, 3], ["y"]).fingerprint


CHAIN = [
    ["caption", "train", "s.lance", "--from", "caption_human", "--out", "cap", *FEW],
    ["caption", "write", "s.lance", "--with", "cap", "--as", "caption_ours", "--num", "2", "top_p=0.8"],
    ["caption", "fuse", "s.lance", "--inputs", "alt,caption_ours", "--with", "rules", "--as", "caption_fused", "--max-bad", "1"],
    ["caption", "score", "s.lance", "--column", "caption_fused", "--with", "cap", "--truth", "--as", "score"],
    ["caption", "select", "s.lance", "--rule", "top-fraction", "--columns", "caption_fused", "--by", "score_clip", "--fraction", "0.5", "--as", "caption_train"],
    ["reinforce", "s.lance", "--teachers", "cap", "--texts", "alt,caption_fused", "--augmentations", "2", "--as", "dr"],
]  # fmt: skip


@pytest.fixture(scope="module")
def chained(scenes, tmp_path_factory):
    """The folder where the chain of the docs was run, as commands."""
    folder = tmp_path_factory.mktemp("chain")
    shutil.copytree(scenes.path, folder / "s.lance")
    for command in CHAIN:
        done = run_cutline(*command, cwd=folder)
        assert done.returncode == 0, (command, done.stderr)
        assert "Written:" in done.stdout
    return folder


def test_the_commands_train_write_fuse_score_and_select(chained):
    """The table ends with a chosen caption in the better half of the rows."""
    table = Pairs.open(chained / "s.lance")
    rows = table.read(range(40), ["caption_ours", "caption_fused", "caption_train", "score_clip", "score_object_f1"])
    assert all(1 <= len(r["caption_ours"]) <= 2 for r in rows)
    chosen = [r for r in rows if r["caption_train"]]
    assert len(chosen) == 20
    assert min(r["score_clip"] for r in chosen) >= max(r["score_clip"] for r in rows if not r["caption_train"])
    assert table.provenance("caption_ours").sampling["top_p"] == 0.8
    assert (chained / "s-score" / "scores.png").stat().st_size > 1000
    assert Result.read(chained / "cap").metrics["held_out"] == 2


def test_a_column_that_exists_is_refused_with_advice(here, chained, monkeypatch):
    monkeypatch.chdir(chained)
    again = here("caption", "write", "s.lance", "--with", "cap", "--as", "caption_ours")
    assert again.returncode == 1
    assert "has a column 'caption_ours' already" in again.stderr


@pytest.mark.timeout(900)
@pytest.mark.slow  # each command starts a Ray of its own
def test_every_command_gives_the_same_on_ray(scenes, chained, tmp_path):
    pytest.importorskip("ray")
    shutil.copytree(scenes.path, tmp_path / "s.lance")
    for command in CHAIN:
        done = run_cutline(*command, "--on", "ray", cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
    there, here = Pairs.open(tmp_path / "s.lance"), Pairs.open(chained / "s.lance")
    assert there.columns == here.columns
    texts = ["caption_ours", "caption_fused", "caption_train", "dr_augment"]
    assert there.read(range(40), texts) == here.read(range(40), texts)
    for a, b in zip(
        there.read(range(40), ["score_clip", "dr_image"]), here.read(range(40), ["score_clip", "dr_image"])
    ):
        assert a["score_clip"] == pytest.approx(b["score_clip"], abs=1e-3)
        assert torch.tensor(a["dr_image"]).allclose(torch.tensor(b["dr_image"]), atol=1e-3)
