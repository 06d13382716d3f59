"""Patch dropout with its unmasked tail, and the second class token."""

import open_clip
import pytest
import torch
from timm.layers import PatchDropout
from torch.nn import functional as F

from cutline import towers
from cutline.errors import ConfigError
from cutline.objectives import base, contrastive
from cutline.objectives.mae import Config as MaeConfig
from cutline.objectives.mae import Objective as Mae
from cutline.objectives.masked import Config as MaskedConfig
from cutline.objectives.masked import Objective as Masked
from cutline.train import loop
from cutline.train.recipe import Recipe

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 48, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "layers": 1, "heads": 1},
}
TIMM = TINY | {
    "custom_text": True,
    "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": None},
}


def built(custom: dict = TINY, **options: object) -> towers.Model:
    torch.manual_seed(0)
    return towers.build(towers.TowerConfig(custom=custom, **options))


def tokens_of(model: towers.Model) -> list[int]:
    """How many tokens the blocks of the image tower have seen in each pass so far."""
    seen: list[int] = []
    visual = model.visual
    blocks = visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks
    blocks[0].register_forward_hook(lambda _, x, __: seen.append(x[0].shape[1]))
    return seen


@pytest.mark.parametrize(("custom", "patches"), [(TINY, 36), (TIMM, 196)])
def test_patches_are_dropped_in_training_alone(custom, patches):
    model = built(custom, patch_dropout=0.5)
    seen = tokens_of(model)
    side = towers.load_encoder(model).size
    x = torch.randn(2, 3, side, side)
    model.train().encode_image(x)
    model.eval().encode_image(x)
    towers.load_encoder(model)(x)
    assert seen == [1 + patches // 2, 1 + patches, 1 + patches]
    assert torch.equal(built(custom).eval().encode_image(x), model.encode_image(x))  # it is the same tower


def test_towers_that_cannot_leave_patches_out_are_refused():
    for name in ("mci0-128", "RN50"):
        with pytest.raises(ConfigError, match="patch_dropout=0.5.*cannot leave patches out"):
            towers.build(towers.TowerConfig(model=name, patch_dropout=0.5))


def recipe(**options: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "t",
            "data": {"pairs": "scenes:n=16,size=48,seed=1", "threads": 1, "text": {"columns": {"alt": 1, "captions": 1}, "rule": "sum"}},
            "towers": {"custom": TINY, **options},
            "objectives": {"contrastive": {"second": ["captions"]} if options.get("class_tokens") == 2 else {}},
            "train": {"batch": 8, "samples": 80, "warmup": 1, "log_every": 1, "save_every": 5},
        }
    )  # fmt: skip


def test_the_second_class_token_is_not_dropped_with_the_patches():
    vision = TINY["vision_cfg"] | {"patch_dropout": 0.5}
    for options in ({}, {"patch_dropout": 0.5}, {"patch_dropout": 0.25}):
        model = built(TINY | {"vision_cfg": vision}, class_tokens=2, **options).train()
        seen: list[torch.Tensor] = []
        model.visual.ln_pre.register_forward_hook(lambda _, x, __, seen=seen: seen.append(x[0][:, 1]))
        model.encode_classes(torch.randn(8, 3, 48, 48))
        torch.testing.assert_close(seen[0], model.visual.second_class.expand(8, -1))


def test_patch_dropout_that_would_do_nothing_is_refused(tmp_path):
    values = recipe(patch_dropout=0.5).model_dump(exclude_none=True)
    values["objectives"] = {"mae": {"width": 16, "depth": 1, "heads": 2}}
    with pytest.raises(ConfigError, match="patch_dropout=0.5 would do nothing.*which mae does not read"):
        loop.prepare(Recipe.model_validate(values), tmp_path / "run", resume=False)


def test_the_tail_of_a_run_sees_all_patches(tmp_path, monkeypatch):
    seen: list[int] = []
    real = loop.train_step

    def looked_at(run: loop.Run, batch: base.Batch) -> dict[str, float]:
        if run.step == 0:
            seen.extend([0])
            run.trainee.model.visual.transformer.resblocks[0].register_forward_hook(
                lambda _, x, __: seen.append(x[0].shape[1])
            )
        return real(run, batch)

    monkeypatch.setattr(loop, "train_step", looked_at)
    run = loop.train(recipe(patch_dropout=0.75, unmasked_tail=0.3), tmp_path / "run", show=False)
    assert seen[1:] == [10] * 7 + [37] * 3
    assert not isinstance(towers.load(str(run)).visual.patch_dropout, PatchDropout)  # nor does what it leaves


def test_two_class_tokens_are_the_plain_tower_with_one_more_token():
    model = built(class_tokens=2).eval()
    x, v = torch.randn(3, 3, 48, 48), model.visual
    patches = v.conv1(x).flatten(2).transpose(1, 2) + v.positional_embedding[1:]
    first = (v.class_embedding + v.positional_embedding[0]).expand(3, 1, -1)
    tokens = v.ln_post(v.transformer(v.ln_pre(torch.cat([first, v.second_class.expand(3, 1, -1), patches], 1))))
    both = model.encode_classes(x)
    torch.testing.assert_close(both, tokens[:, :2] @ v.proj)
    torch.testing.assert_close(model.encode_image(x), both[:, 0])
    torch.testing.assert_close(model.train().encode_image(x), both[:, 0])  # finished for the first token alone
    torch.testing.assert_close(model.encode_classes(x), both)  # and for both alone
    encoder = towers.load_encoder(model)
    torch.testing.assert_close(encoder.pooled(x), both[:, 0])
    expected = tokens[:, 2:].transpose(1, 2).reshape(3, 32, 6, 6)
    torch.testing.assert_close(encoder.last(x), expected)
    torch.testing.assert_close(encoder.pooled_and_last(x)[1], expected)
    for found, right in zip(encoder.classes_and_last(x), (both, expected), strict=True):
        torch.testing.assert_close(found, right)
    assert [m.shape for m in encoder(torch.randn(1, 3, 40, 64))] == [(1, 32, 5, 8)] * 4
    assert encoder.layer_of("visual.second_class") == 0


def test_each_text_is_compared_with_its_own_class_token():
    model = built(class_tokens=2).train()
    texts = {s: base.Texts(torch.randint(1, 400, (4, 24)), torch.arange(4), weight=w) for s, w in (("alt", 0.5), ("captions", 2.0))}  # fmt: skip
    batch = base.Batch({"image": torch.randn(4, 3, 48, 48)}, texts)
    objective = contrastive.Objective(contrastive.Config(second=["captions"]), model)
    terms = objective(batch, base.Features(model, batch))
    both = model.encode_classes(batch.views["image"], normalize=True)
    for i, (source, given) in enumerate(texts.items()):
        logits = model.logit_scale.exp() * both[:, i] @ model.encode_text(given.tokens, normalize=True).T
        plain = (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2
        torch.testing.assert_close(terms[source], given.weight * plain)
    terms["captions"].backward()
    assert model.visual.second_class.grad.abs().max() > 0


def test_other_objectives_of_tips_take_two_class_tokens():
    model = built(class_tokens=2).train()
    batch = base.Batch({"image": torch.randn(4, 3, 48, 48)}, {})
    features = base.Features(model, batch, towers.load_encoder(model))
    masked = Masked(MaskedConfig(prototypes=8, hidden=8, bottleneck=4), model)
    assert masked(batch, features)["patches"].isfinite()
    assert Mae(MaeConfig(width=16, depth=1, heads=2), model)(batch, features)["pixels"].isfinite()
    assert features.dense().shape == (4, 32, 6, 6)
    assert features.image(second=True).shape == (4, 16)


def test_a_run_with_two_class_tokens_keeps_them(tmp_path):
    run = loop.train(recipe(class_tokens=2), tmp_path / "run", show=False)
    model = towers.load(str(run))
    assert model.class_tokens == 2
    assert model.visual.second_class.shape == (32,)
    with pytest.raises(Exception, match="class_tokens"):  # ours alone
        open_clip.create_model(f"local-dir:{run}/model")


def test_a_trained_clip_goes_on_with_two_class_tokens_that_start_alike(tmp_path):
    one = built().eval()
    towers.save(one, tmp_path / "one")
    two = towers.build(towers.TowerConfig(model=str(tmp_path / "one"), class_tokens=2)).eval()
    both = two.encode_classes(torch.randn(2, 3, 48, 48))
    torch.testing.assert_close(both[:, 0], both[:, 1])
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
    assert towers.load(str(towers.save(two, tmp_path / "two"))).class_tokens == 2


def test_a_second_class_token_where_there_can_be_none_is_refused():
    with pytest.raises(ConfigError, match="class_tokens=2 needs a CLIP"):
        towers.build(towers.TowerConfig(model="mci0-128", class_tokens=2))
    with pytest.raises(ConfigError, match="class_tokens=2 needs a plain ViT"):
        built(TINY | {"vision_cfg": TINY["vision_cfg"] | {"pool_type": "avg"}}, class_tokens=2)
    model = built(class_tokens=2)
    batch = base.Batch({"image": torch.randn(2, 3, 48, 48)}, {"text": base.Texts(torch.ones(2, 24, dtype=torch.long), torch.arange(2))})  # fmt: skip
    with pytest.raises(ConfigError, match=r"second=\['text'\] names every text source"):
        contrastive.Objective(contrastive.Config(second=["text"]), model)(batch, base.Features(model, batch))
    with pytest.raises(ConfigError, match=r"second=\['captions'\] needs towers with a second class token"):
        contrastive.Objective(contrastive.Config(second=["captions"]), built())
