"""What `silc` and `masked` share: loss, head, centre, EMA and collapse measures; both together, on one process and two."""

import math

import pytest
import torch
import torch.nn.functional as F
from objectives_made import recipe, rows_of, stopped_and_resumed
from processes import LEAVE, on_two_processes
from torch import Tensor, nn

from cutline import towers
from cutline.objectives import base, masked, silc, teacher
from cutline.train import loop
from cutline.train.optim import param_groups
from cutline.train.recipe import Recipe

SMALL = {"prototypes": 24, "hidden": 16, "bottleneck": 8, "momentum": 0.9}
BOTH = {"contrastive": {}, "silc": {**SMALL, "local_views": 2}, "masked": {**SMALL, "weight": 2}}


def model() -> towers.Model:
    torch.manual_seed(0)
    return towers.build(towers.TowerConfig.model_validate(recipe()["towers"]))


def config(**more: object) -> teacher.Config:
    return teacher.Config.model_validate(SMALL | more)


def test_loss_equals_the_reference_values():
    seen = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], dtype=torch.float64)
    said = torch.tensor([[0.7, 0.8], [0.9, 1.0], [1.1, 1.2]], dtype=torch.float64)
    target = teacher.assign(seen[:, None], torch.zeros(2, dtype=torch.float64), 0.04)
    one = teacher.cross_entropy(target, said[:, None] / 0.1).mean()
    assert one.item() == pytest.approx(0.389120, abs=1e-6)
    two = teacher.cross_entropy(target.repeat(1, 2, 1), said[:, None].repeat(1, 2, 1) / 0.1).mean()
    assert 4 * two.item() == pytest.approx(1.556479, abs=1e-6)


def plain_head(head: teacher.Head, x: Tensor) -> Tensor:
    """Cosines with the prototypes, written out."""
    first, second, third = (m for m in head.mlp if isinstance(m, nn.Linear))
    h = F.gelu(x @ first.weight.T + first.bias)
    h = F.gelu(h @ second.weight.T + second.bias)
    h = h @ third.weight.T + third.bias
    return torch.stack([(h @ w) / (h.square().sum().sqrt() * w.square().sum().sqrt()) for w in head.last.weight])


def plain_loss(p: teacher.Prototypes, seen: Tensor, said: Tensor) -> Tensor:
    """The docstring's formula with loops: the mean over rows and pairs of views."""
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for row in range(len(seen)):
        for g in seen[row]:
            z = (plain_head(p.teacher, g) - p.centre) / p.config.teacher_temperature
            target = (z.exp() / z.exp().sum()).detach()
            for view in said[row]:
                s = plain_head(p.student, view) / p.config.student_temperature
                total = total - (target * (s - s.exp().sum().log())).sum()
                pairs += 1
    return total / pairs


@pytest.mark.parametrize("at_once", [teacher.AT_ONCE, 24 * 5 * 2])
def test_value_and_gradients_equal_the_formula_in_one_piece_and_in_chunks(monkeypatch, at_once):
    monkeypatch.setattr(teacher, "AT_ONCE", at_once)  # the second: two rows at a time
    torch.manual_seed(1)
    prototypes = teacher.Prototypes(6, config()).double()
    prototypes.centre.copy_(torch.randn(24) / 10)
    with torch.no_grad():
        prototypes.teacher.last.weight.add_(0.1)
    seen, said = torch.randn(5, 2, 6).double(), torch.randn(5, 3, 6).double()
    found = []
    for loss in (lambda x: prototypes(seen, x)[0], lambda x: plain_loss(prototypes, seen, x)):
        x = said.clone().requires_grad_()
        prototypes.zero_grad()
        value = loss(x)
        (0.3 * value).backward()
        found.append([value.detach(), x.grad, *(p.grad for p in prototypes.student.parameters())])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in prototypes.teacher.parameters())


def test_entropies_and_centre_equal_their_formulas():
    torch.manual_seed(2)
    prototypes = teacher.Prototypes(6, config(centre_momentum=0.7)).double()
    prototypes.centre.copy_(torch.randn(24) / 10)
    before = prototypes.centre.clone()
    seen, said = torch.randn(5, 2, 6).double(), torch.randn(5, 3, 6).double()
    logged = prototypes(seen, said)[1]
    z = torch.stack([plain_head(prototypes.teacher, x) for x in seen.flatten(0, 1)])
    p = ((z - before) / 0.04).softmax(1)
    assert logged["entropy/mean"].item() == pytest.approx(-(p.mean(0) * p.mean(0).log()).sum().item())
    assert logged["entropy/each"].item() == pytest.approx(-(p * p.log()).sum(1).mean().item())
    prototypes.follow()
    torch.testing.assert_close(prototypes.centre, 0.7 * before + 0.3 * z.mean(0))


def test_teacher_follows_by_its_formula_with_the_statistics_of_batch_norms():
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    ours, student = net(), net()
    student(torch.randn(2, 3, 4, 4) + 3)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    teacher.move(ours, student, 0.9)
    for name, value in ours.state_dict().items():
        new = student.state_dict()[name]
        torch.testing.assert_close(value, new if name.endswith("tracked") else 0.9 * before[name] + 0.1 * new)
    assert ours[1].num_batches_tracked == 1


def test_a_teacher_is_made_once_for_objectives_that_agree_on_its_momentum():
    towers_ = model()
    one = masked.Objective(masked.Config.model_validate(SMALL), towers_)
    two = silc.Objective(silc.Config.model_validate(SMALL), towers_)
    other = silc.Objective(silc.Config.model_validate(SMALL | {"momentum": 0.5}), towers_)
    assert one.tower is two.tower
    assert other.tower is not one.tower
    assert any(k.startswith("teacher.") for k in one.state_dict())
    assert not any(k.startswith("teacher.") for k in two.state_dict())
    images, looks = torch.randn(2, 3, 48, 48), []
    one.tower.encoder.visual.transformer.register_forward_hook(lambda *_: looks.append(1))
    for _ in range(2):
        one.tower(images)
    assert len(looks) == 1
    with torch.no_grad():
        towers_.visual.proj += 1
    before = one.tower.encoder.visual.proj.clone()
    for follower in (one, two):
        follower.tower.follow(towers_, step=7)
    torch.testing.assert_close(one.tower.encoder.visual.proj, before + 0.1)
    one.tower(images)
    assert len(looks) == 2
    del one, two, follower
    assert teacher.teacher_of(towers_, 0.9)[1]  # nobody holds the first any more


def test_the_teacher_is_in_eval_mode_and_sees_what_open_clip_sees():
    towers_ = model()
    taught = teacher.Teacher(towers_, 0.9)
    taught.train()
    assert not taught.encoder.training
    images = torch.randn(2, 3, 48, 48)
    pooled, patches = taught(images)
    torch.testing.assert_close(pooled, towers_.eval().encode_image(images))
    torch.testing.assert_close(patches, taught.encoder.last(images).flatten(2).transpose(1, 2))
    assert not pooled.requires_grad


def batch(pictures: int = 8) -> base.Batch:
    torch.manual_seed(3)
    tokens = torch.randint(1, 400, (pictures, 9))
    tokens[:, -1] = 49407
    views = {"image": torch.randn(pictures, 3, 48, 48), silc.LOCAL: torch.randn(pictures * 2, 3, 32, 32)}
    return base.Batch(views, {"text": base.Texts(tokens, torch.arange(pictures))})


def test_the_teacher_is_not_trained_and_the_head_is():
    trainee = loop.Trainee(model(), Recipe.model_validate(recipe(**BOTH)))
    loss, _ = trainee(batch())
    loss.backward()
    trained = {n for g in param_groups(trainee, 1e-3, 0.2) for n in g["names"]}
    of_teacher = {n for n, _ in trainee.named_parameters() if ".teacher." in n}
    assert any("prototypes.teacher" in n for n in of_teacher)
    assert any("visual" in n for n in of_teacher)
    assert not trained & of_teacher
    assert all(p.grad is None for n, p in trainee.named_parameters() if n in of_teacher)
    assert all(p.grad is not None for n, p in trainee.named_parameters() if ".prototypes.student." in n)
    assert "objectives.silc.prototypes.centre" in trainee.state_dict()


@pytest.fixture
def objective() -> silc.Objective:
    return silc.Objective(silc.Config.model_validate(SMALL), model())


def test_a_collapsed_batch_is_measured_as_such_and_said(objective):
    student = model()

    def step(features: Tensor, number: int) -> None:
        objective.distil(features, features, features[:, 0])
        objective.after_step(student, number)

    same, other = torch.ones(6, 1, 16), torch.randn(6, 1, 16, generator=torch.Generator().manual_seed(0))
    step(same, 0)
    logged = {k: v.item() for k, v in objective.logged.items()}
    assert logged["entropy/mean"] == pytest.approx(logged["entropy/each"], abs=1e-5)
    assert logged["feature_std"] == pytest.approx(0, abs=1e-6)
    assert "has collapsed" in objective.collapse
    assert "Raise teacher_temperature" in objective.collapse  # one prototype takes all
    objective.prototypes.config.teacher_temperature = 10.0
    step(same, 1)
    assert "Lower teacher_temperature" in objective.collapse  # all are alike
    objective.prototypes.config.teacher_temperature = 0.04
    step(other, 2)
    assert objective.collapse == ""
    assert objective.logged["entropy/mean"] > objective.logged["entropy/each"] + 0.1
    assert objective.logged["feature_std"] > 0.5


def test_under_autocast_the_loss_is_float32(objective):
    torch.manual_seed(0)
    seen, said = torch.randn(6, 1, 16), torch.randn(6, 2, 16)
    whole = objective.distil(seen, said, seen[:, 0])
    with torch.autocast("cpu", torch.bfloat16):
        half = objective.distil(seen, said, seen[:, 0])
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(whole.item(), rel=0.05)


STEP = """
import torch
from cutline import towers
from cutline.objectives import masked
from cutline.train.loop import Trainee
from cutline.train.recipe import Recipe

def made(values):
    torch.manual_seed(0)
    recipe = Recipe.model_validate(values)
    return Trainee(towers.build(recipe.towers), recipe).double()

def one_step(trainee, batch, first):
    # the masks of a picture depend on its place in the joined batch
    def drawn(pictures, patches, hidden, device):
        draws = [torch.Generator().manual_seed(first + i) for i in range(pictures)]
        return torch.stack([torch.randperm(patches, generator=g)[:hidden] for g in draws])
    masked.random_patches = drawn
    loss, log = trainee(batch)
    loss.backward()
    return loss, log
"""

TWO = (
    LEAVE
    + STEP
    + """
import sys, torch.distributed as dist
from cutline.objectives.base import Batch, Texts
dist.init_process_group("gloo")
rank = dist.get_rank()
data = torch.load(sys.argv[1], weights_only=True)
views = {k: v.chunk(2)[rank] for k, v in data["views"].items()}
trainee = made(data["recipe"])
loss, log = one_step(trainee, Batch(views, {"text": Texts(data["tokens"].chunk(2)[rank], torch.arange(4))}), 4 * rank)
grads = {}
for name, p in trainee.named_parameters():
    if p.grad is not None:
        dist.all_reduce(p.grad)
        grads[name] = p.grad / 2
for o in trainee.methods().values():
    o.after_step(trainee.model, 0)
torch.save({"loss": loss.detach(), "log": log, "grads": grads, "state": trainee.state_dict()}, sys.argv[2] + str(rank))
leave()
"""
)


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    """Value, gradient of every parameter, entropies, and the centre after the step."""
    whole = batch()
    views = {k: v.double() for k, v in whole.views.items()}
    values = recipe(**BOTH)
    torch.save({"views": views, "tokens": whole.texts["text"].tokens, "recipe": values}, tmp_path / "data.pt")
    on_two_processes(TWO, str(tmp_path / "data.pt"), str(tmp_path / "out"), folder=tmp_path)
    ranks = [torch.load(tmp_path / f"out{r}", weights_only=True) for r in range(2)]
    space: dict = {}
    exec(STEP, space)
    drawn = masked.random_patches
    try:
        trainee = space["made"](values)
        loss, log = space["one_step"](trainee, base.Batch(views, whole.texts), 0)
    finally:
        masked.random_patches = drawn
    for o in trainee.methods().values():
        o.after_step(trainee.model, 0)
    assert sum(r["loss"].item() for r in ranks) / 2 == pytest.approx(loss.item(), rel=1e-10)
    grads = {n: p.grad for n, p in trainee.named_parameters() if p.grad is not None}
    assert "objectives.masked.token" in grads
    for r in ranks:
        assert r["grads"].keys() == grads.keys()
        for name, grad in grads.items():
            exact = "positional_embedding" not in name  # which is interpolated to the size of a crop in float32
            torch.testing.assert_close(r["grads"][name], grad, rtol=1e-8, atol=1e-12 if exact else 1e-7)
        for name in ("silc/entropy/mean", "silc/entropy/each", "masked/entropy/mean"):
            assert r["log"][name].item() == pytest.approx(log[name].item(), rel=1e-10)
        for name, value in trainee.state_dict().items():
            torch.testing.assert_close(r["state"][name], value, rtol=1e-10, atol=1e-13)
    assert trainee.state_dict()["objectives.silc.prototypes.centre"].abs().max() > 0


def test_a_run_of_all_three_resumes_exactly_with_teacher_and_centre(tmp_path):
    values = recipe(**BOTH)
    values["train"] |= {"samples": 80, "save_every": 4}
    whole = loop.train(Recipe.model_validate(values), tmp_path / "whole", show=False)
    again = stopped_and_resumed(values, tmp_path / "again", 6)
    assert [r["loss"] for r in rows_of(again)] == [r["loss"] for r in rows_of(whole)]
    ends = [loop.prepare(Recipe.model_validate(values), run, resume=True).trainee for run in (whole, again)]
    states = [end.state_dict() for end in ends]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    held, student = ends[0].objectives["masked"].tower.encoder.visual.proj, ends[0].model.visual.proj
    assert not torch.equal(held, student)


def test_a_step_that_is_not_finite_leaves_teacher_and_centre(tmp_path):
    run = loop.prepare(Recipe.model_validate(recipe(**BOTH)), tmp_path / "run", resume=False)
    batches = run.stream.batches()
    loop.train_step(run, next(batches))
    before = {k: v.clone() for k, v in run.trainee.state_dict().items()}
    bad = next(batches)
    bad.views["image"] = bad.views["image"] * math.nan
    loop.train_step(run, bad)
    assert run.bad == 1
    assert all(torch.equal(v, before[k]) for k, v in run.trainee.state_dict().items())
    run.step += 1
    loop.train_step(run, next(batches))
    centre = "objectives.silc.prototypes.centre"
    assert torch.isfinite(run.trainee.state_dict()[centre]).all()
    assert not torch.equal(run.trainee.state_dict()[centre], before[centre])
