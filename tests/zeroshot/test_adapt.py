"""MUST: every term by its formula, no label is read, sure of nothing, exact resume, two processes, what is saved."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import yaml
from classes_made import THINGS, encoded, pixels
from processes import LEAVE, on_two_processes
from torch.nn import functional as F

from cutline import towers, transfer
from cutline.config import check, load
from cutline.errors import ConfigError, CutlineError, DataError
from cutline.record import Result
from cutline.towers.config import TowerConfig
from cutline.transfer.data import DenseData, Split, open_data
from cutline.zeroshot import must
from cutline.zeroshot.adapt import Adapted, Unlabelled, adapt, fit, random_mask, random_square, without_labels
from cutline.zeroshot.must import AdaptConfig

RECIPES = Path(__file__).parents[2] / "recipes" / "adapt"
QUICK: dict[str, Any] = {"steps": 4, "batch": 4, "lr": 1e-3, "tau": 0.36, "prompts": "photo", "momentum_start": 0.9}
VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}


TIMM = {"timm_model_name": "test_vit", "timm_proj": "linear", "image_size": 160}
KINDS: dict[str, dict[str, Any]] = {
    "clip": VISION,
    "coca": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4},
    "siglip": {**TIMM, "timm_model_name": "test_vit3", "timm_pool": "map"},
    "timm-token": {**TIMM, "timm_pool": "token"},
    "timm-average": {**TIMM, "timm_pool": "avg"},
}


def build(**vision: Any) -> towers.Model:
    torch.manual_seed(0)
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "layers": 1, "heads": 1}
    whole = vision if "timm_model_name" in vision else {**VISION, **vision}
    custom = {"embed_dim": 32, "vision_cfg": whole, "text_cfg": text, "custom_text": whole is vision}
    model = towers.build(TowerConfig(custom=custom))
    if whole is vision:
        model.visual.trunk.blocks = model.visual.trunk.blocks[:2]
    return model


@pytest.fixture(scope="module")
def model() -> towers.Model:
    """A random CLIP of 32 pixels. Shared: adapting must not change it."""
    return build().eval()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for part, count in (("train", 4), ("val", 2)):
        for name in THINGS:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                (root / part / name / f"{i}.jpg").write_bytes(encoded(name, i + 100 * (part == "val")))
    return root


@pytest.fixture
def data(pictures: Path) -> DenseData:
    return without_labels(open_data(f"imagefolder:{pictures}", "classify"), AdaptConfig())


def adapted(model: towers.Model, **options: Any) -> Adapted:
    config = AdaptConfig(**{**QUICK, **options})
    torch.manual_seed(1)
    return Adapted(model, list(THINGS), [[n] for n in THINGS], config)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_every_term_equals_its_plain_formula() -> None:
    rng = np.random.default_rng(0)
    logits, labels, sure = rng.normal(size=(4, 5)) * 3, np.array([0, 3, 1, 4]), np.array([True, False, True, True])
    p = softmax(logits)
    found = must.self_training(*map(torch.from_numpy, (logits, labels, sure)))
    assert found.item() == pytest.approx(np.mean([-math.log(p[b, labels[b]]) for b in range(4) if sure[b]]))
    fair, mean = must.fairness(torch.from_numpy(logits), torch.full((5,), -torch.inf))
    assert fair.item() == pytest.approx(-np.mean(np.log(p.mean(0))))
    np.testing.assert_allclose(mean.exp(), p.mean(0))
    said, images, masked = rng.normal(size=(2, 3, 8, 8)), rng.normal(size=(2, 3, 8, 8)), rng.random((2, 4)) < 0.5
    masked[:, 0] = True
    errors = [abs(said[b, c, y, x] - images[b, c, y, x]) for b in range(2) for c in range(3) for y in range(8)
              for x in range(8) if masked[b, y // 4 * 2 + x // 4]]  # fmt: skip
    assert must.masked_pixels(*map(torch.from_numpy, (said, images, masked))).item() == pytest.approx(np.mean(errors))
    cells, pooled = rng.normal(size=(2, 4, 6)), rng.normal(size=(2, 6))
    apart = [np.sum((cells[b, i] / np.linalg.norm(cells[b, i]) - pooled[b] / np.linalg.norm(pooled[b])) ** 2)
             for b in range(2) for i in range(4) if masked[b, i]]  # fmt: skip
    assert must.alignment(*map(torch.from_numpy, (cells, pooled, masked))).item() == pytest.approx(np.mean(apart))


def test_with_many_classes_the_mean_runs_over_batches_and_the_last_alone_has_a_gradient() -> None:
    rng = np.random.default_rng(1)
    before, last = torch.full((600,), -torch.inf, dtype=torch.float64), None
    for step in range(3):
        logits = torch.from_numpy(rng.normal(size=(3, 600))).requires_grad_()
        p = logits.softmax(1).mean(0)
        mean = p if step == 0 else 0.5 * (last + p)
        expected = -mean.log().mean() / 0.5
        fair, before = must.fairness(logits, before)
        ours, theirs = (torch.autograd.grad(x, logits)[0] for x in (fair, expected))
        assert fair.item() == pytest.approx(expected.item())
        torch.testing.assert_close(ours, theirs)
        last = mean.detach()
        torch.testing.assert_close(before.exp(), last)


def test_a_class_whose_share_underflows_has_a_finite_term() -> None:
    logits = torch.tensor([[0.0, -300.0]], requires_grad=True)
    fair, _ = must.fairness(logits, torch.full((2,), -torch.inf))
    fair.backward()
    assert fair.item() == pytest.approx(150)
    assert logits.grad.tolist() == [[0.5, -0.5]]


def batch_of(data: DenseData, it: Adapted) -> must.Pictures:
    split, encoder = data.split("train"), it.encoder
    return Unlabelled(split, range(len(split)), it.config, encoder.size, encoder.multiple, it.square).make(0)


def plainly(it: Adapted, x: torch.Tensor, masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a tower says of normalised pictures with masked patches, step by step: their embeddings, h, and v."""
    visual = it.encoder.visual
    if hasattr(visual, "trunk"):
        trunk = visual.trunk
        first = trunk.reg_token if trunk.cls_token is None else trunk.cls_token
        x = torch.where(masked[..., None], it.token, trunk.patch_embed.proj(x).flatten(2).mT)
        x = torch.cat([first.expand(len(x), -1, -1), x], 1) + trunk.pos_embed
        x, pool = trunk.blocks(x), trunk.attn_pool
        pooled, h = trunk.norm(x), it.norm(x[:, 1:])
        v = h
        if pool is None:
            pooled = trunk.fc_norm(pooled[:, 0] if trunk.global_pool == "token" else pooled[:, 1:].mean(1))
        else:
            pooled = pool(pooled)
            v = h @ pool.kv.weight.chunk(2)[1].T + pool.kv.bias.chunk(2)[1]
            v = v @ pool.proj.weight.T + pool.proj.bias
            v = v + pool.mlp(pool.norm(v))
        return pooled @ visual.head.proj.weight.T, h, v @ visual.head.proj.weight.T
    x = torch.where(masked[..., None], it.token, visual.conv1(x).flatten(2).mT)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    x = visual.transformer(visual.ln_pre(x))
    h, pool = it.norm(x[:, 1:]), visual.attn_pool
    if pool is None:
        return visual.ln_post(x[:, 0]) @ visual.proj, h, h @ visual.proj
    v = h @ pool.attn.v_proj_weight.T + pool.attn.in_proj_bias.chunk(3)[2]
    v = visual.ln_post(pool.attn.out_proj(v))
    return visual.ln_post(pool(x))[:, 0] @ visual.proj, h, v @ visual.proj


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_weighted_sum_of_its_terms(kind: str, data: DenseData) -> None:
    """With what the tower says computed plainly, and the teacher's view by open_clip's own forward pass."""
    model = build(**KINDS[kind]).eval()
    it = adapted(model, fair=0.3, pixels=0.7, align=0.2, mask=0.4, tau=0.334)
    batch = batch_of(data, it)
    loss = it.loss(batch)
    strong, weak = it.normalise(batch.strong), it.normalise(batch.weak)
    scale, words = model.logit_scale.exp(), it.words["weight"]
    q = (scale * F.normalize(model.visual(weak), dim=1) @ words.T).softmax(1)
    share, labels = q.max(1)
    pooled, h, v = plainly(it, strong, batch.masked)
    logits = scale * F.normalize(pooled, dim=1) @ words.T
    p = logits.softmax(1)
    sure = share > 0.334
    assert sure.any()
    terms = {"pseudo": F.cross_entropy(logits[sure], labels[sure]), "fair": -p.mean(0).log().mean()}
    grid, patch = math.isqrt(h.shape[1]), it.encoder.multiple
    pixels_said = it.decoder[0](h.transpose(1, 2).reshape(4, -1, grid, grid))
    wide = batch.masked.view(4, 1, grid, grid).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    terms["pixels"] = ((F.pixel_shuffle(pixels_said, patch) - strong).abs() * wide).sum() / wide.sum() / 3
    apart = F.normalize(v, dim=-1) - F.normalize(pooled, dim=-1)[:, None]
    terms["align"] = apart.square().sum(-1)[batch.masked].mean()
    for name, value in terms.items():
        torch.testing.assert_close(it.logged[name], value, rtol=1e-4, atol=1e-5)
    weights = {"pseudo": 1, "fair": 0.3, "pixels": 0.7, "align": 0.2}
    torch.testing.assert_close(loss, sum(weights[n] * v for n, v in terms.items()), rtol=1e-4, atol=1e-5)
    assert it.logged["sure"] == sure.float().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_masked_patches_reaches_the_student(kind: str) -> None:
    model = build(**KINDS[kind]).eval()
    it = adapted(model)
    size, patch = it.encoder.size, it.encoder.multiple
    images, masked = torch.randn(2, 3, size, size), torch.zeros(2, (size // patch) ** 2, dtype=torch.bool)
    with torch.no_grad():
        whole, _ = it.look(images, masked)
        torch.testing.assert_close(whole, model.visual(images))  # of nothing masked
        masked[:, 1] = True
        other = images.clone()
        other[:, :, :patch, patch : 2 * patch] = 9.0
        for one, two in zip(it.look(images, masked), it.look(other, masked), strict=True):
            assert torch.equal(one, two)
        assert not torch.equal(it.look(images, masked)[0], whole)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_what_follows_the_last_block_has_the_full_rate(kind: str) -> None:
    it = adapted(build(**KINDS[kind]))
    blocks = it.num_layers
    for name in (n for n, p in it.named_parameters() if p.requires_grad):
        in_block = [int(part) for part in name.split(".") if part.isdigit()] if "blocks." in name else []
        stem = ("token", "conv1", "class_emb", "positional", "ln_pre", "patch_embed", "reg_token", "pos_embed")
        first = 0 if any(part in name for part in stem) else blocks + 1
        assert it.layer_of(name) == (in_block[0] + 1 if in_block else first), name


def test_a_patch_that_does_not_divide_the_size_leaves_the_last_pixels_out(data: DenseData) -> None:
    model = build(**KINDS["siglip"])
    model.visual.trunk.set_input_size((170, 170))  # as SigLIP's 384 in patches of 14
    open_clip.set_model_preprocess_cfg(model, {**model.visual.preprocess_cfg, "size": 170})
    it = adapted(model, mask_patch=80)
    batch = batch_of(data, it)
    assert (it.square, batch.strong.shape[2:], batch.masked.shape[1]) == (5, (170, 170), 100)
    assert it.loss(batch).isfinite()


def test_the_teacher_follows_by_a_momentum_that_rises_linearly(model: towers.Model) -> None:
    assert [must.momentum(i, 0.9, 1.0, 4) for i in (0, 1, 4, 9)] == pytest.approx([0.9, 0.925, 1, 1])
    it = adapted(model, momentum_start=0.5, momentum=1.0, momentum_steps=2)
    name = "visual.proj"
    with torch.no_grad():
        for m in (0.5, 0.75, 1.0):
            before = it.teacher[0].state_dict()[name].clone()
            it.encoder.visual.proj += 1
            it.after_step()
            torch.testing.assert_close(it.teacher[0].state_dict()[name], m * before + (1 - m) * it.encoder.visual.proj)
    assert not any(p.requires_grad for p in it.teacher.parameters())


def test_pictures_of_which_none_is_sure_are_counted_and_told(
    model: towers.Model, data: DenseData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    it = fit(model, data, AdaptConfig(**{**QUICK, "tau": 0.999}), tmp_path, False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["pseudo"] for line in lines] == [0.0, 0.0]
    assert [line["unsure"] for line in lines] == [1, 4]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert (int(it.unsure), int(it.sure), int(it.seen)) == (4, 0, 16)
    assert "never surer of a picture than tau=0.999" in capsys.readouterr().err


def test_labels_of_the_training_pictures_change_nothing(model: towers.Model, pictures: Path) -> None:
    data = open_data(f"imagefolder:{pictures}", "classify")
    split = data.split("train")

    def read(row: int) -> Any:
        return replace(split.read(row), target=np.array(10**9 + row))

    false = Split("train", split.keys, read, np.full(len(split), 2**40))
    wrong = replace(data, splits={**data.splits, "train": false})
    config = AdaptConfig(**QUICK)
    one, two = (fit(model, without_labels(d, config), config, None, False).state_dict() for d in (data, wrong))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert one["sure"]


def test_a_folder_of_pictures_stands_in_for_the_train_split(pictures: Path, tmp_path: Path) -> None:
    data = open_data(f"imagefolder:{pictures}", "classify")
    found = without_labels(data, AdaptConfig(unlabelled=str(pictures / "val")))
    assert (len(found.split("train")), found.split("train").labels) == (6, None)
    assert found.fingerprint != data.fingerprint
    assert found.split("train").read(0).image.shape == (40, 32, 3)
    with pytest.raises(DataError, match="no folder with pictures"):
        without_labels(data, AdaptConfig(unlabelled=str(tmp_path)))


def test_views_are_cut_at_random_and_masks_are_squares_of_the_asked_share() -> None:
    image = pixels("sea", 3, (40, 32))
    seen = {random_square(image, 32, np.random.default_rng(i)).numpy().tobytes() for i in range(60)}
    assert seen == {image[top : top + 32].transpose(2, 0, 1).tobytes() for top in range(9)}
    mask = random_mask(3, 2, 0.3, np.random.default_rng(0)).reshape(3, 2, 3, 2).transpose(0, 2, 1, 3).reshape(9, 4)
    assert sorted(mask.sum(1)) == [0] * 6 + [4] * 3  # ⌈2.7⌉


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_resume_after_a_kill_gives_the_same_weights(
    kind: str, data: DenseData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = build(**KINDS[kind] | {"image_size": 32}).eval(), AdaptConfig(**QUICK, save_every=2)
    whole = fit(model, data, config, tmp_path / "whole", False)
    original, left = torch.optim.AdamW.step, [3]

    def step(self: Any, *args: Any, **kw: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return original(self, *args, **kw)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(KeyboardInterrupt):
        fit(model, data, config, tmp_path / "half", False)
    resumed = fit(model, data, config, tmp_path / "half", True)
    assert [p.name for p in (tmp_path / "half" / "checkpoints").iterdir()] == ["step-00000004"]
    assert all(torch.equal(a, resumed.state_dict()[name]) for name, a in whole.state_dict().items())


TWO = """
import os
import test_adapt as here
here.torch.set_num_threads(1)
here.adapt(here.build().eval(), f"imagefolder:{sys.argv[1]}", here.PLAIN, here.Path(sys.argv[2]))
import torch.distributed as dist
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=int(os.environ["RANK"]), world_size=2)
leave()
"""
PLAIN = AdaptConfig(**QUICK)


def test_two_processes_adapt_as_one(model: towers.Model, pictures: Path, tmp_path: Path) -> None:
    alone = adapt(model, f"imagefolder:{pictures}", PLAIN, tmp_path / "one")
    here = Path(__file__).parent
    code = f"import sys; sys.path[:0] = {[str(here), str(here.parent)]!r}\n" + LEAVE + TWO
    on_two_processes(code, str(pictures), str(tmp_path / "two"), str(tmp_path / "store"), folder=tmp_path)
    joint = Result.read(tmp_path / "two")
    assert joint.metrics == pytest.approx(alone.metrics)
    assert 0 < alone.metrics["sure"] < 1
    assert joint.protocol.column() == alone.protocol.column()
    losses = [[json.loads(line)["loss"] for line in (tmp_path / x / "metrics.jsonl").read_text().splitlines()]
              for x in ("one", "two")]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    start, one, two = (m.state_dict() for m in (model, *(towers.load(str(tmp_path / x)) for x in ("one", "two"))))
    for name, a in one.items():  # biases of keys have no gradient but rounding, of which Adam makes steps
        assert (a - two[name]).norm() <= 0.05 * (a - start[name]).norm(), name


def test_the_command_adapts_and_what_it_saves_is_used_again(
    model: towers.Model, pictures: Path, tmp_path: Path, here: Callable[..., Any]
) -> None:
    towers.save(model, tmp_path / "clip")
    names = tmp_path / "names.txt"
    names.write_text("\n".join(open_data(f"imagefolder:{pictures}", "classify").classes))
    command = ["zeroshot", "adapt", "--model", str(tmp_path / "clip"), "--data", f"imagefolder:{pictures}", f"names={names}",
               "--out", str(tmp_path / "run"), "steps=3", "batch=4", "lr=1e-3", "tau=0.36", "prompts=photo"]  # fmt: skip
    done = here(*command)
    assert done.returncode == 0, done.stderr
    assert "zeroshot_top1" in done.stdout
    assert {"samples.png", "curve.png", "result.json", "metrics.jsonl"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    result = Result.read(tmp_path / "run")
    assert result.protocol.settings["words"]["prompts"] == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
    split = open_data(f"imagefolder:{pictures}", "classify").split("val")
    shown, true = zip(*[(split.read(i).image, int(split.read(i).target)) for i in range(6)])
    classifier = transfer.load(tmp_path / "run")
    shares = classifier.probabilities(shown)
    assert np.mean(shares.argmax(1) == true) == pytest.approx(result.metrics["top1"])
    again = towers.load(str(tmp_path / "run"))
    opened, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'run' / 'model'}")
    views = classifier.normalise(torch.stack([torch.from_numpy(classifier.square(x)).permute(2, 0, 1) for x in shown]))
    with torch.no_grad():
        ours = again.encode_image(views, normalize=True)
        torch.testing.assert_close(opened.eval().encode_image(views, normalize=True), ours)
        logits = classifier.head.scale * ours @ classifier.head.weight.T
    torch.testing.assert_close(logits.softmax(1).numpy(), torch.from_numpy(shares).numpy(), rtol=1e-4, atol=1e-5)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, again.state_dict()[k])}
    assert moved
    assert all(k.startswith("visual.") for k in moved)  # the text tower and its temperature are as they were
    assert here(*command, "--resume").returncode == 0
    assert "another config" in here(*command, "fair=0.5", "--resume").stderr
    names.write_text("a\nb\nc")
    assert "other names or prompts" in here(*command, "--resume").stderr
    assert here("export", str(tmp_path / "run"), str(tmp_path / "clip-again"), "--to", "open_clip").returncode == 0


@pytest.mark.parametrize("name", ["imagenet", "sun397", "food101", "gtsrb", "dtd", "ucf101", "scenes", "scene-crops"])
def test_recipes_are_configs_and_say_what_the_paper_does(name: str) -> None:
    config = load(AdaptConfig, RECIPES / f"{name}.yaml")
    for key, value in yaml.safe_load((RECIPES / f"{name}.yaml").read_text()).items():
        assert getattr(config, key) == (tuple(value) if key == "scale" else value), key
    paper = {"imagenet": (0.3, 0.2, 1, 0.7, 2e-5, 30), "sun397": (0.1, 1, 0.2, 0.4, 1e-4, 20),
             "food101": (0.1, 0.1, 1, 0.7, 2e-5, 40), "gtsrb": (0.5, 0.5, 1, 0.3, 2e-5, 20),
             "dtd": (0.1, 0.2, 1, 0.4, 2e-5, 60), "ucf101": (0.1, 0.5, 1, 0.5, 1e-5, 60)}  # fmt: skip
    if name in paper:
        found = (config.mask, config.align, config.fair, config.tau, config.lr * 256 / config.batch, config.epochs)
        assert found == pytest.approx(paper[name])


def test_towers_that_cannot_be_masked_learn_without_and_options_without_a_use_are_told(data: DenseData) -> None:
    config = AdaptConfig(**QUICK)
    with pytest.raises(CutlineError, match="without a text tower"):
        adapt("scratch:resnet18", data, config)
    stem = {"timm_model_name": "vit_tiny_r_s16_p8_224", "timm_pool": "token", "timm_proj": "linear"}
    for vision in ({"layers": [1, 1, 1, 1], "width": 8}, stem):
        with pytest.raises(ConfigError, match="vision transformers of open_clip and timm with a patch embedding"):
            fit(build(**vision), data, config, None, False)
        learnt = fit(build(**vision), data, config.model_copy(update={"mask": 0.0}), None, False)
        pixels = batch_of(data, learnt).strong / 255
        assert not torch.allclose(learnt.start[0].pooled(pixels), learnt.encoder.eval().pooled(pixels), atol=1e-4)
    places = build(**KINDS["siglip"])
    places.visual.trunk.attn_pool.pos_embed = torch.nn.Parameter(torch.zeros(101, 96))
    with pytest.raises(ConfigError, match="pools by attention with positions.* say align=0"):
        adapted(places)
    it = adapted(places, align=0)
    assert it.loss(batch_of(data, it)).isfinite()
    with pytest.raises(ConfigError, match="mask_patch=12 must be a multiple"):
        fit(build(), data, config.model_copy(update={"mask_patch": 12}), None, False)
    with pytest.raises(ConfigError, match="names has 2 classes, and .* has 3"):
        fit(build(), data, config.model_copy(update={"names": "a; b"}), None, False)
    for wrong in ({"labels": 3}, {"frozen": True}, {"ema": 0.9}):
        with pytest.raises(ConfigError, match="reads no label"):
            check(AdaptConfig, wrong)
    with pytest.raises(ConfigError, match="mask=0 masks nothing"):
        check(AdaptConfig, {"mask": 0, "mask_patch": 16})
