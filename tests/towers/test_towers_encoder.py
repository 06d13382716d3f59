"""The Encoder contract for one tower of every kind: shapes, the library's values, gradients, layers, any size."""

import copy

import pytest
import timm
import torch
from torch.nn import functional as F

from cutline import towers
from cutline.errors import ConfigError, CutlineError
from cutline.towers.vit import even_taps


def is_hierarchical(kind):
    return kind.startswith(("resnet", "mci", "convnext", "poolformer", "swin"))


def pictures(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("height", "width"), [(70, 101), (20, 33)])
def test_maps_have_a_cell_for_every_stride_begun_at_any_size_and_aspect(kind, model_of, height, width):
    encoder = towers.load_encoder(model_of(kind))
    x = pictures(1, 3, height, width)
    with torch.no_grad():
        maps, last, pooled = encoder(x), encoder.last(x), encoder.pooled(x)
    shapes = [(1, c, -(-height // s), -(-width // s)) for c, s in zip(encoder.channels, encoder.strides, strict=True)]
    assert [tuple(m.shape) for m in maps] == shapes
    assert last.shape[-2:] == (-(-height // encoder.multiple), -(-width // encoder.multiple))
    assert pooled.shape == (1, encoder.width)
    assert all(bool(t.isfinite().all()) for t in [*maps, last, pooled])
    if is_hierarchical(kind):
        assert encoder.strides == (4, 8, 16, 32)
        assert encoder.patch is None
    else:
        assert encoder.strides == (encoder.patch,) * 4


def test_pooled_at_the_native_size_is_the_models_own_embedding(kind, model_of):
    model = model_of(kind)
    x = pictures(1, 3, *[model.visual.preprocess_cfg["size"]] * 2)
    with torch.no_grad():
        theirs = model.encode_image(x)
        encoder = towers.load_encoder(model)
        assert torch.equal(encoder.pooled(x), theirs)
        assert torch.equal(model.encode_image(x), theirs), "wrapping must not change the model"


def test_maps_at_the_native_size_are_the_librarys_intermediates(kind, model_of):
    model = model_of(kind)
    visual = copy.deepcopy(model.visual)
    encoder = towers.load_encoder(model)
    x = pictures(1, 3, encoder.size, encoder.size)
    with torch.no_grad():
        if hasattr(visual, "trunk"):
            at = encoder.indices if is_hierarchical(kind) else encoder.taps
            theirs = visual.trunk.forward_intermediates(x, indices=at, intermediates_only=True, norm=False)
        else:
            at = [1, 2, 3, 4] if kind == "resnet" else sorted(set(encoder.taps))
            theirs = visual.forward_intermediates(x, indices=at, intermediates_only=True)["image_intermediates"]
            if kind == "vit-two-blocks":
                assert encoder.taps == [0, 0, 1, 1]
                theirs = [theirs[0], theirs[0], theirs[1], theirs[1]]
        for ours, expected in zip(encoder(x), theirs, strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_class_tokens_are_those_beside_the_maps(kind, model_of):
    model = model_of(kind)
    encoder = towers.load_encoder(model)
    x = pictures(2, 3, encoder.size, encoder.size)
    trunk = getattr(encoder.visual, "trunk", None)
    if (trunk is not None and getattr(trunk, "cls_token", None) is None) or kind == "resnet":
        assert not encoder.class_token
        with pytest.raises(ConfigError, match="has no class token"):
            encoder.maps_and_classes(x)
        return
    with torch.no_grad():
        maps, classes = encoder.maps_and_classes(x)
        assert all(torch.equal(a, b) for a, b in zip(maps, encoder(x), strict=True))
        assert [c.shape for c in classes] == [(2, c) for c in encoder.channels]
        if trunk is not None:
            ours, expected = trunk.norm(classes[-1]), trunk.forward_features(x)[:, 0]
        else:
            ours, expected = classes[-1], encoder.visual.transformer(encoder.embed(x, dropout=False)[0])[:, 0]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_padding_is_zeros_on_the_right_and_at_the_bottom(model_of):
    encoder = towers.load_encoder(model_of("mci0-joint"))
    x = pictures(1, 3, 70, 101)
    padded = F.pad(x, (0, 128 - 101, 0, 96 - 70))
    with torch.no_grad():
        for m, p in zip(encoder(x), encoder(padded), strict=True):
            assert torch.equal(m, p[..., : m.shape[-2], : m.shape[-1]])
        assert torch.equal(encoder.pooled(x), encoder.pooled(padded))


@pytest.mark.parametrize("kind", ["vit", "vit-avg-scale"])
def test_openclip_positions_are_interpolated_bicubic_on_both_axes_but_not_the_class_tokens(kind, model_of):
    encoder = towers.load_encoder(model_of(kind))
    v = encoder.visual
    x = pictures(2, 3, 24, 56)  # a grid of 3 × 7 from one of 4 × 4
    own, grid = v.positional_embedding[:1], v.positional_embedding[1:]
    grid = grid.reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(3, 7), mode="bicubic", antialias=True, align_corners=False)
    tokens = F.conv2d(x, v.conv1.weight, stride=8).flatten(2).transpose(1, 2)
    tokens = torch.cat([v.class_embedding.expand(2, 1, -1), tokens], dim=1)
    expected = v.ln_pre(tokens + torch.cat([own, grid[0].flatten(1).T]))
    ours, size = encoder.embed(x, dropout=False)
    assert size == (3, 7)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_timm_positions_are_interpolated_like_a_plain_resize_of_the_weights(model_of):
    model = model_of("timm-vit")
    encoder = towers.load_encoder(model)
    x = pictures(1, 3, 64, 112)
    state = dict(model.visual.trunk.state_dict())
    grid = state["pos_embed"][:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(4, 7), mode="bicubic", antialias=True, align_corners=False)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    plain = timm.create_model("vit_tiny_patch16_224", img_size=(64, 112), num_classes=0).eval()
    plain.load_state_dict(state)
    with torch.no_grad():
        expected = plain.forward_intermediates(x, indices=encoder.taps, intermediates_only=True)
        for ours, theirs in zip(encoder(x), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        torch.testing.assert_close(encoder.pooled(x), plain(x), rtol=0, atol=1e-5)


AFTER_MAPS = ("ln_post", "proj", "attn_pool", "attnpool", "trunk.norm", "trunk.fc_norm", "trunk.head",
              "trunk.final_conv", "head")  # fmt: skip


def test_gradients_reach_every_parameter_before_the_maps_and_pooling_reaches_all(kind, model_of):
    encoder = towers.load_encoder(model_of(kind))
    x = pictures(2, 3, 40, 32)
    sum(m.square().mean() for m in encoder(x)).backward()
    for name, p in encoder.named_parameters():
        if p.requires_grad and not name.removeprefix("visual.").startswith(AFTER_MAPS):
            assert p.grad is not None, name
            assert bool(p.grad.isfinite().all()), name
    encoder.zero_grad()
    encoder.pooled(x).square().sum().backward()
    missing = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_eval_is_deterministic_and_does_not_depend_on_the_rest_of_the_batch(kind, model_of):
    encoder = towers.load_encoder(model_of(kind)).eval()
    x = pictures(2, 3, 32, 40)
    with torch.no_grad():
        first, again, alone = encoder(x), encoder(x), encoder(x[1:])
        for a, b, c in zip(first, again, alone, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a[1:], c, rtol=1e-4, atol=1e-5)


def test_layers_run_from_the_stem_to_the_last_block_without_a_gap(kind, model_of):
    encoder = towers.load_encoder(model_of(kind))
    layers = {n: encoder.layer_of(n) for n, _ in encoder.named_parameters()}
    assert set(layers.values()) == set(range(encoder.num_layers + 1))
    for name, layer in layers.items():
        short = name.removeprefix("visual.").removeprefix("trunk.")
        if short.startswith(("conv1", "patch_embed", "stem", "cls_token", "pos_embed", "positional_embedding")):
            assert layer == 0, name
        if short.startswith(("ln_post", "proj", "head", "fc_norm", "final_conv", "attnpool")):
            assert layer == encoder.num_layers, name
    blocks = {"vit": 4, "vit-two-blocks": 2, "timm-vit": 12, "mci0-joint": 20, "mci1": 40, "mci2": 44, "swin": 12}
    if kind in blocks:
        assert encoder.num_layers == blocks[kind]


def test_a_cell_of_the_last_map_projects_into_the_joint_space(model_of):
    kinds = ("vit", "vit-avg-scale", "vit-attention-pool", "timm-vit-joint", "mci0-joint", "resnet", "swin", "convnext")
    for kind in kinds:
        encoder = towers.load_encoder(model_of(kind))
        x = pictures(2, 3, 64, 64)
        with torch.no_grad():
            last = encoder.last(x)
            joint = encoder.project(last)
        assert joint.shape == (2, encoder.width, *last.shape[-2:]), kind
        if kind in ("mci0-joint", "swin"):  # pooled by averaging, then a linear layer: the two commute
            with torch.no_grad():
                torch.testing.assert_close(joint.mean((2, 3)), encoder.pooled(x), rtol=1e-4, atol=1e-4)
    encoder.visual.trunk.head = torch.nn.Flatten(2)
    with pytest.raises(CutlineError, match="pools by attention"):
        encoder.project(last)


@pytest.mark.parametrize("kind", ["vit", "timm-vit-joint", "mci0-joint"])
@torch.no_grad()
def test_one_pass_gives_the_embedding_and_the_map_of_any_picture(kind, model_of):
    encoder = towers.load_encoder(model_of(kind))
    for size in ((64, 96), (40, 70)):  # whole patches, and not
        x = pictures(1, 3, *size)
        pooled, last = encoder.pooled_and_last(x)
        torch.testing.assert_close(pooled, encoder.pooled(x))
        torch.testing.assert_close(last, encoder.last(x))


@pytest.mark.parametrize(
    "kind", ["vit-avg-scale", "vit-attention-pool", "timm-vit-joint", "timm-registers", "timm-rope"]
)
@torch.no_grad()
def test_what_is_replaced_is_hidden_and_the_rest_is_as_ever(kind, model_of):
    encoder = towers.load_encoder(model_of(kind))
    p, x = encoder.multiple, pictures(2, 3, encoder.size, encoder.size)
    pooled, patches = encoder.replaced(x, lambda tokens: tokens)
    torch.testing.assert_close(pooled, encoder.pooled(x))
    torch.testing.assert_close(patches, encoder(x)[-1].flatten(2).mT)
    hidden = (torch.arange(patches.shape[1]) == 2)[:, None]
    other = x.clone()
    other[:, :, :p, 2 * p : 3 * p] += 1
    one, two = (encoder.replaced(y, lambda tokens: torch.where(hidden, 0.1, tokens)) for y in (x, other))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.allclose(one[0], pooled)


def test_the_last_map_of_a_vit_is_the_tokens_that_open_clip_pools(model_of):
    model = model_of("vit")
    encoder, v = towers.load_encoder(model), model.visual
    x = pictures(2, 3, 32, 32)
    v.output_tokens = True
    with torch.no_grad():
        _, tokens = v(x)
        torch.testing.assert_close(encoder.last(x).flatten(2).transpose(1, 2), tokens, rtol=0, atol=1e-6)
        # the class token's own projection, as open_clip does it, on a token
        torch.testing.assert_close(encoder.project(encoder.last(x)).flatten(2).transpose(1, 2), tokens @ v.proj)


def test_an_encoder_shares_weights_with_its_model_and_a_deep_copy_does_not(model_of):
    model = model_of("vit")
    encoder = towers.load_encoder(model)
    teacher = copy.deepcopy(encoder)
    before = encoder.hash
    assert teacher.hash == before
    with torch.no_grad():
        model.visual.conv1.weight.add_(1)
    assert encoder.hash != before
    assert teacher.hash == before


def test_the_hash_tells_weights_and_not_their_memory_layout(model_of):
    encoder = towers.load_encoder(model_of("convnext"))
    before = encoder.hash
    assert encoder.to(memory_format=torch.channels_last).hash == before


def test_patch_dropout_is_for_the_pooled_embedding_and_never_for_maps(model_of):
    model = model_of("vit")
    from open_clip.transformer import PatchDropout

    model.visual.patch_dropout = PatchDropout(0.5)
    encoder = towers.load_encoder(model).train()
    x = pictures(2, 3, 32, 32)
    assert torch.equal(encoder(x)[3], encoder(x)[3])
    assert not torch.equal(encoder.pooled(x), encoder.pooled(x))
    trunk = timm.create_model("vit_tiny_patch16_224", patch_drop_rate=0.5, num_classes=0)
    other = model_of("timm-vit")
    other.visual.trunk = trunk
    encoder = towers.load_encoder(other).train()
    x = pictures(1, 3, 32, 64)
    assert [tuple(m.shape[-2:]) for m in encoder(x)] == [(2, 4)] * 4
    assert not torch.equal(encoder.pooled(x), encoder.pooled(x))


def test_taps_choose_blocks_or_strides_and_are_checked(model_of):
    assert even_taps(12, None) == [2, 5, 8, 11]
    assert even_taps(24, None) == [5, 11, 17, 23]
    encoder = towers.load_encoder(model_of("timm-vit"), taps=(3, 5, 7, 11))
    assert encoder.taps == [3, 5, 7, 11]
    encoder = towers.load_encoder(model_of("convnext"), taps=(8, 32))
    assert encoder.strides == (8, 32)
    assert [tuple(m.shape[1:]) for m in encoder(pictures(1, 3, 64, 96))] == [(80, 8, 12), (320, 2, 3)]
    for kind, taps in (("vit", (1, 4)), ("vit", (2, 1)), ("convnext", (2, 4))):
        with pytest.raises(ConfigError, match="rising"):
            towers.load_encoder(model_of(kind), taps=taps)


def test_a_tower_of_one_size_says_so(model_of):
    encoder = towers.load_encoder("scratch:vit_relpos_small_patch16_224")
    with torch.no_grad():
        assert encoder(pictures(1, 3, 224, 224))[0].shape[-2:] == (14, 14)
        with pytest.raises(CutlineError, match="takes pictures of 224×224 only"):
            encoder(pictures(1, 3, 192, 224))
        encoder = towers.load_encoder("scratch:levit_128s")
        assert encoder(pictures(1, 3, 224, 224))[-1].shape[-2:] == (7, 7)
        with pytest.raises(CutlineError, match=r"\(Levit.*\) cannot take 192×256 px: .* It is made for 224 px"):
            encoder.pooled(pictures(1, 3, 192, 224))


def test_a_tower_whose_patch_does_not_divide_its_size_pools_as_trained_and_maps_every_pixel():
    trunk = timm.create_model("vit_tiny_patch16_224", img_size=72, depth=2, num_classes=0).eval()  # 4 × 4, 8 px unseen
    model = towers.load("scratch:vit_tiny_patch16_224")
    model.visual.trunk, model.visual.preprocess_cfg["size"] = copy.deepcopy(trunk), 72
    encoder = towers.load_encoder(model)
    x = pictures(1, 3, 72, 72)
    with torch.no_grad():
        assert torch.equal(encoder.pooled(x), trunk(x))
        assert torch.equal(model.encode_image(x), trunk(x))
        assert encoder(x)[0].shape[-2:] == (5, 5)


@pytest.mark.parametrize("x", [torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8).byte()])
def test_what_is_no_batch_of_normalised_pictures_is_refused(model_of, x):
    with pytest.raises(CutlineError, match="normalised float pictures"):
        towers.load_encoder(model_of("vit"))(x)


@pytest.mark.parametrize("kind", ["vit", "vit-avg-scale", "timm-vit", "timm-rope", "mci0-joint", "convnext", "swin"])
def test_drop_path_grows_linearly_works_in_training_only_and_adds_no_parameter(kind, model_of):
    encoder = towers.load_encoder(model_of(kind))
    encoder.set_drop_path(0.0)
    keys, parameters = list(encoder.state_dict()), {id(p) for p in encoder.parameters()}
    x = pictures(4, 3, 32, 32)
    with torch.no_grad():
        plain = encoder.eval()(x)[-1]
        encoder.set_drop_path(0.5)
        assert list(encoder.state_dict()) == keys
        assert {id(p) for p in encoder.parameters()} == parameters
        assert torch.equal(encoder(x)[-1], plain)
    rates = [m.drop_prob if hasattr(m, "drop_prob") else m.rate
             for m in encoder.modules() if type(m).__name__ in ("DropPath", "DropPathScale")]  # fmt: skip
    assert max(rates) == 0.5
    assert rates == sorted(rates)
    steps = sorted(set(rates) - {0.0})
    torch.testing.assert_close(torch.tensor(steps), torch.linspace(0, 0.5, len(steps) + 1)[1:])
    freeze_batch_norm(encoder.train())
    torch.manual_seed(0)
    assert not torch.equal(encoder(x)[-1], encoder(x)[-1])
    encoder.set_drop_path(0.0)
    torch.testing.assert_close(encoder(x)[-1], plain)


def freeze_batch_norm(encoder):
    for m in encoder.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval()


def test_drop_path_drops_whole_branches_and_keeps_their_mean(model_of):
    encoder = towers.load_encoder(model_of("vit")).train()
    encoder.set_drop_path(0.5)
    block = encoder.visual.transformer.resblocks[-1]
    x = pictures(2000, 1, 64)
    branch = block.ls_1(x)
    dropped = (branch == 0).all(dim=(1, 2))
    assert 0.45 < dropped.float().mean() < 0.55
    torch.testing.assert_close(branch[~dropped], 2 * x[~dropped])


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_drop_path_that_is_no_rate_is_refused(model_of, rate):
    with pytest.raises(ConfigError, match=r"\[0, 1\)"):
        towers.load_encoder(model_of("vit")).set_drop_path(rate)


def test_a_tower_without_a_place_for_drop_path_takes_none(model_of):
    encoder = towers.load_encoder(model_of("resnet"))
    encoder.set_drop_path(0.0)
    with pytest.raises(ConfigError, match="no residual blocks for drop path; set it to 0"):
        encoder.set_drop_path(0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["vit", "convnext", "mci0-joint"])
def test_a_gpu_gives_the_values_of_the_cpu_and_convolutional_towers_are_channels_last_there(kind, model_of):
    encoder = towers.load_encoder(model_of(kind))
    x = pictures(2, 3, 70, 101)
    with torch.no_grad():
        expected = encoder(x)
        towers.fast(encoder.cuda())
        weight = next(p for n, p in encoder.named_parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[-1] > 1)
        assert weight.is_contiguous(memory_format=torch.channels_last) == is_hierarchical(kind)
        for ours, theirs in zip(encoder(x.cuda()), expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-2, atol=1e-2)
