"""The decoder loss of CoCa against a plain float64 version, open_clip's CoCaLoss, and two real processes."""

import json
import math

import pytest
import torch
from open_clip import CoCa
from open_clip.loss import CoCaLoss
from processes import LEAVE, on_two_processes
from torch import Tensor

from cutline import objectives, towers
from cutline.errors import ConfigError, DataError
from cutline.objectives.base import Batch, Features, Texts
from cutline.objectives.captioning import Config, Objective
from cutline.train.recipe import Recipe

START, END, CONTEXT = 49406, 49407, 12
TEXT = {"context_length": CONTEXT, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8, "output_tokens": True}
COCA = {
    "embed_dim": 16, "vision_cfg": VISION, "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": TEXT, "custom_text": True,
}  # fmt: skip
CAPTIONS = ["a red apple", "two cups on the grass!! of course", "", "a dog", "a cow behind an apple"]


@pytest.fixture(scope="module")
def model() -> towers.Model:
    torch.manual_seed(0)
    return towers.build(towers.TowerConfig(custom=COCA)).double()


@pytest.fixture
def pictures() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens_of(model, texts: list[str]) -> Tensor:
    return towers.Tokenizer(model)(texts)


def run(model, pictures, texts: dict[str, Texts], config: Config | None = None) -> tuple[dict[str, Tensor], Objective]:
    batch = Batch({"image": pictures}, texts)
    objective = Objective(config or Config(), model)
    return objective(batch, Features(model, batch)), objective


def gradients(model, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: g for n, g in zip(names, found, strict=True) if g is not None}


def plain(model, pictures: Tensor, tokens: Tensor, owners: list[int], ids: list[int] | None = None) -> Tensor:
    """The docstring's formula with loops, from the logits of open_clip's own forward pass."""
    logits = CoCa.forward(model, pictures[owners], tokens)["logits"]  # (M, T − 1, ids)
    terms = []
    for text, row in zip(tokens.tolist(), logits, strict=True):
        if text[2] == 0:
            continue  # start and end alone
        for place in range(1, len(text)):
            if text[place] and (ids is None or text[place] in ids):
                used = row[place - 1] if ids is None else row[place - 1, ids]
                at = text[place] if ids is None else ids.index(text[place])
                terms.append(-(used[at] - used.exp().sum().log()))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("owners", [[0, 1, 2, 3], [0, 0, 1, 1, 3]])
def test_equals_its_formula_in_value_and_gradient(model, pictures, owners):
    tokens = tokens_of(model, CAPTIONS[: len(owners)])
    trimmed = towers.Tokenizer(model).trimmed(tokens[:, :8])
    expected = plain(model, pictures, tokens, owners)
    for given in (tokens, trimmed) if tokens[:, 8:].any() == 0 else (tokens,):
        texts = Texts(given, torch.tensor(owners), paired=len(owners) == 4)
        terms, _ = run(model, pictures, {"text": texts})
        assert terms["text"].item() == pytest.approx(expected.item(), abs=1e-10)
        ours, theirs = gradients(model, terms["text"]), gradients(model, expected)
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-8, atol=1e-11)


def test_equals_the_loss_of_open_clip(model, pictures):
    tokens = tokens_of(model, ["a red apple", "two cups on the grass", "wow " * 20, "a dog"])
    terms, objective = run(model, pictures, {"text": Texts(tokens, torch.arange(4))})
    out = CoCa.forward(model, pictures, tokens)
    _, theirs = CoCaLoss(1.0, 0.0)(
        out["image_features"], out["text_features"], out["logits"], out["labels"], out["logit_scale"]
    )
    assert terms["text"].item() == pytest.approx(theirs.item(), abs=1e-10)
    labels, best = tokens[:, 1:], out["logits"].argmax(2)
    share = (best == labels)[labels != 0].double().mean()
    assert objective.logged["accuracy/text"].item() == pytest.approx(share.item())


def test_a_vocabulary_restricts_the_softmax_and_with_all_ids_changes_nothing(model, pictures, tmp_path):
    tokens = tokens_of(model, CAPTIONS[:2] + CAPTIONS[3:])
    texts = {"text": Texts(tokens, torch.arange(4))}
    whole = run(model, pictures, texts)[0]["text"]

    def with_ids(ids) -> tuple[Tensor, Tensor]:
        (tmp_path / "ids.json").write_text(json.dumps(list(ids)))
        terms, objective = run(model, pictures, texts, Config(vocabulary=str(tmp_path / "ids.json")))
        return terms["text"], objective.logged["outside/text"]

    all_ids, none_outside = with_ids(range(49408))
    assert all_ids.item() == pytest.approx(whole.item(), abs=1e-12)
    assert none_outside == 0
    seen = sorted(set(tokens.flatten().tolist()) - {0})
    few, _ = with_ids(reversed(seen))
    assert few.item() == pytest.approx(plain(model, pictures, tokens, [0, 1, 2, 3], seen).item(), abs=1e-10)
    assert few < whole - 1
    dog = tokens[2, 2].item()
    fewer, outside = with_ids(set(seen) - {dog})
    assert outside.item() == pytest.approx(1 / (tokens[:, 1:] != 0).sum().item())
    assert fewer.item() == pytest.approx(
        plain(model, pictures, tokens, [0, 1, 2, 3], sorted(set(seen) - {dog})).item(), abs=1e-10
    )


def test_beside_contrastive_each_tower_runs_once_and_a_source_has_its_weight(model, pictures):
    alt, caption = tokens_of(model, CAPTIONS[:4]), tokens_of(model, CAPTIONS[1:])[:, :11]
    texts = {"alt": Texts(alt, torch.arange(4)), "caption": Texts(caption, torch.arange(4), weight=0.5)}
    batch = Batch({"image": pictures}, texts)
    features, calls = Features(model, batch), []
    hooks = [m.register_forward_hook(lambda m, *_: calls.append(type(m).__name__)) for m in (model.visual, model.text)]
    losses = {}
    for name in ("contrastive", "captioning"):
        losses[name] = objectives.build(name, objectives.config_class(name)(), model)(batch, features)
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == ["TextTower", "VisionTransformer"]
    for source, weight in (("alt", 1.0), ("caption", 0.5)):
        alone, _ = run(model, pictures, {"text": Texts(texts[source].tokens, torch.arange(4))})
        assert losses["captioning"][source].item() == pytest.approx(weight * alone["text"].item(), abs=1e-10)
    torch.testing.assert_close(features.image(), model.encode_image(pictures, normalize=True))
    torch.testing.assert_close(features.text("caption"), model.encode_text(caption, normalize=True))


def test_a_batch_without_captions_has_no_loss(model, pictures):
    terms, objective = run(model, pictures, {"text": Texts(tokens_of(model, [""] * 4), torch.arange(4))})
    assert terms["text"].item() == 0
    assert objective.logged["accuracy/text"].item() == 0


def test_an_untrained_decoder_knows_nothing(model, pictures):
    """open_clip leaves the output layer uninitialised; a sound start gives about the logarithm of the vocabulary."""
    terms, _ = run(model, pictures, {"text": Texts(tokens_of(model, CAPTIONS[:4]), torch.arange(4))})
    assert terms["text"].item() == pytest.approx(math.log(49408) + 0.5, abs=0.5)


TWO = (
    LEAVE
    + """
import json, sys, torch, torch.distributed as dist
from cutline import towers
from cutline.objectives.base import Batch, Features, Texts
from cutline.objectives.captioning import Config, Objective
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = towers.build(towers.TowerConfig(custom=json.loads(sys.argv[1]))).double()
pictures = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
mine = slice(2 * rank, 2 * rank + 2)
tokens = towers.Tokenizer(model)([["a red apple", "two cups on the grass of course"], ["a dog", ""]][rank])
batch = Batch({"image": pictures[mine]}, {"text": Texts(tokens, torch.arange(2))})
loss = Objective(Config(), model)(batch, Features(model, batch))["text"]
loss.backward()
found = {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
for value in found.values():
    dist.all_reduce(value)
torch.save({n: v / 2 for n, v in found.items()}, f"{sys.argv[2]}/{rank}.pt")
leave()
"""
)


def test_two_processes_average_to_the_joined_batch(model, pictures, tmp_path):
    tokens = tokens_of(model, ["a red apple", "two cups on the grass of course", "a dog", ""])
    terms, _ = run(model, pictures, {"text": Texts(tokens, torch.arange(4))})
    whole = {"loss": terms["text"].detach()} | gradients(model, terms["text"])
    on_two_processes(TWO, json.dumps(COCA), str(tmp_path), folder=tmp_path)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert got.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_towers_without_a_decoder_and_broken_vocabularies_are_refused(model, tmp_path):
    clip = towers.build(towers.TowerConfig(model="vit-tiny-64"))
    with pytest.raises(ConfigError, match=r"no.*decoder|none: take a CoCa.*coca-tiny-64"):
        Objective(Config(), clip)
    for text in ("{}", "[]", "[1, 49408]", '["a"]', "[1"):
        (tmp_path / "v.json").write_text(text)
        with pytest.raises(DataError, match="vocabulary"):
            Objective(Config(vocabulary=str(tmp_path / "v.json")), model)


def test_a_recipe_takes_it():
    recipe = Recipe.model_validate({
        "name": "x", "data": {"pairs": "scenes:n=8"}, "towers": {"model": "coca-tiny-64"},
        "objectives": {"contrastive": {}, "captioning": {"weight": 2.0}},
    })  # fmt: skip
    assert recipe.objective_configs()["captioning"].weight == 2
