"""Pyramids and heads: strides, any picture size, equality with the library parts they are built from."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import DPTConfig, DPTForDepthEstimation, UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetHead

from cutline.config import load
from cutline.errors import ConfigError
from cutline.towers.store import load_encoder
from cutline.transfer import heads, pyramid
from cutline.transfer.depth import DepthConfig, DepthEstimator
from cutline.transfer.segment import SegmentConfig, Segmenter


class Patches(nn.Module):
    """The least that an encoder can be: maps of given strides and channels by pooling and a 1x1."""

    def __init__(self, strides: tuple[int, ...], channels: tuple[int, ...], patch: int | None) -> None:
        super().__init__()
        self.strides, self.channels, self.patch = strides, channels, patch
        self.num_layers, self.name, self.hash = 1, "patches", "0"
        self.mean = self.std = (0.5, 0.5, 0.5)
        self.lift = nn.ModuleList(nn.Conv2d(3, c, 1) for c in channels)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [lift(F.avg_pool2d(x, s, ceil_mode=True)) for lift, s in zip(self.lift, self.strides, strict=True)]


def plain(patch: int) -> Patches:
    return Patches((patch,) * 4, (32,) * 4, patch)


STAGES = Patches((4, 8, 16, 32), (16, 24, 32, 64), None)


@pytest.mark.parametrize(
    ("patch", "powers"), [(8, (1, 0, -1, -2)), (14, (2, 1, 0, -1)), (16, (2, 1, 0, -1)), (32, (3, 2, 1, 0))]
)
def test_levels_have_strides_nearest_to_4_8_16_32(patch: int, powers: tuple[int, ...]) -> None:
    assert pyramid.exponents(patch) == powers
    for kind in (pyramid.SimplePyramid((patch,), (32,), 16), pyramid.TapPyramid((patch,) * 4, (32,) * 4)):
        side = 2 * kind.multiple
        maps = [torch.randn(2, 32, side // patch, side // patch) for _ in kind.uses]
        levels = kind(maps)
        assert [tuple(x.shape) for x in levels] == [
            (2, c, round(side / patch * 2.0**k), round(side / patch * 2.0**k))
            for c, k in zip(kind.channels, powers, strict=True)
        ]


def test_the_pyramid_of_patch_16_has_the_layers_of_the_paper() -> None:
    """detectron2's SimpleFeaturePyramid: deconv-LN-GELU-deconv | deconv | nothing | max-pool, then 1x1-LN-3x3-LN."""
    p = pyramid.SimplePyramid((16,), (768,), 256)
    kinds = [[type(m).__name__ for m in level[0].modules() if not isinstance(m, nn.Sequential)] for level in p.levels]
    assert kinds == [
        ["ConvTranspose2d", "LayerNorm2d", "GELU", "ConvTranspose2d"],
        ["ConvTranspose2d"],
        [],
        ["MaxPool2d"],
    ]
    neck = 256 * 256 * 9 + 2 * 2 * 256
    expected = (
        (768 * 384 * 4 + 384 + 2 * 384 + 384 * 192 * 4 + 192 + 192 * 256)
        + (768 * 384 * 4 + 384 + 384 * 256)
        + 2 * (768 * 256)
        + 4 * neck
    )
    assert sum(x.numel() for x in p.parameters()) == expected


@pytest.mark.parametrize("size", [(64, 64), (50, 75), (33, 97)])
@pytest.mark.parametrize(
    "encoder", [plain(8), plain(14), plain(16), plain(32), STAGES], ids=["8", "14", "16", "32", "stages"]
)
@pytest.mark.parametrize("head", ["upernet", "fpn", "linear"])
def test_logits_have_the_picture_size(encoder: Any, head: str, size: tuple[int, int]) -> None:
    model = Segmenter(encoder, SegmentConfig(head=head), ["a", "b", "c"]).eval()
    assert model(torch.randn(1, 3, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize("encoder", [plain(14), plain(32), STAGES], ids=["14", "32", "stages"])
@pytest.mark.parametrize("head", [{"head": "deconv"}, {"head": "dpt"}, {"head": "linear", "layers": 4, "upsample": 4}])
def test_depth_has_the_picture_size_and_its_range(encoder: Any, head: Any) -> None:
    model = DepthEstimator(encoder, DepthConfig(**head, max_depth=7)).eval()
    depth = model(10 * torch.randn(2, 3, 45, 70))
    assert depth.shape == (2, 1, 45, 70)
    assert depth.min() > 0
    assert depth.max() < 7


def test_taps_need_four_maps() -> None:
    with pytest.raises(ConfigError, match="pyramid=vitdet"):
        pyramid.TapPyramid((16, 16), (32, 32))


def test_heads_equal_the_library_parts_with_the_same_weights() -> None:
    from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

    widths = (16, 24, 32, 64)
    levels = [torch.randn(2, c, 64 // s, 64 // s) for c, s in zip(widths, (4, 8, 16, 32), strict=True)]
    uper = heads.UPerHead(widths, 32, 5).eval()
    theirs = UPerNetDecoder((3, 3, *widths), encoder_depth=5, decoder_channels=32).eval()
    theirs.load_state_dict(uper.decoder.state_dict())
    pictures = [torch.empty(2, 3, 64, 64), torch.empty(2, 3, 32, 32)]
    assert torch.equal(uper(levels), uper.classifier(theirs([*pictures, *levels])))
    fpn = heads.FPNHead(widths, 64, 5).eval()
    # The library's decoder is the same but for the 3x3 on each level, so let those pass everything through.
    for conv in fpn.fpn.layer_blocks:
        nn.init.dirac_(conv[0].weight)
        nn.init.zeros_(conv[0].bias)
    theirs = FPNDecoder([3, 3, *widths], pyramid_channels=64, segmentation_channels=32).eval()
    weights = {f"seg_blocks.{3 - int(k[0])}{k[1:]}": v for k, v in fpn.blocks.state_dict().items()}
    for i, name in enumerate(("p2.skip_conv", "p3.skip_conv", "p4.skip_conv", "p5")):
        weights |= {f"{name}.{k}": v for k, v in fpn.fpn.inner_blocks[i][0].state_dict().items()}
    theirs.load_state_dict(weights)
    assert torch.allclose(fpn(levels), fpn.classifier(theirs([*pictures, *levels])), atol=1e-5)


def test_upernet_equals_transformers_on_normalised_levels_with_the_same_weights() -> None:
    """In value and in gradient; the layer norm of every level is the decoder's own, mmsegmentation has it in its towers."""
    widths = (16, 24, 32, 64)
    torch.manual_seed(0)
    ours = heads.UPerHead(widths, 32, 5).eval()
    theirs = UperNetHead(UperNetConfig(hidden_size=32, num_labels=5), widths).eval()
    weights: dict[str, torch.Tensor] = {f"classifier.{k}": v for k, v in ours.classifier.state_dict().items()}
    names = {f"psp.blocks.{i}.1": f"psp_modules.{i}.1" for i in range(4)}
    names |= {f"fpn_lateral_blocks.{2 - i}.conv_norm_relu": f"lateral_convs.{i}" for i in range(3)}
    names |= {f"fpn_conv_blocks.{2 - i}": f"fpn_convs.{i}" for i in range(3)}
    names |= {"psp.out_conv": "bottleneck", "fusion_block": "fpn_bottleneck"}
    for mine, other in names.items():
        part = ours.decoder.get_submodule(mine)
        for child, name in ((part[0], "conv"), (part[1], "batch_norm")):
            weights |= {f"{other}.{name}.{k}": v for k, v in child.state_dict().items()}
    theirs.load_state_dict(weights)
    levels = [torch.randn(2, c, 64 // s, 96 // s, requires_grad=True) for c, s in zip(widths, (4, 8, 16, 32))]
    a = ours(levels)
    b = theirs([norm(x) for norm, x in zip(ours.decoder.feature_norms, levels, strict=True)])
    assert torch.allclose(a, b, atol=1e-5)
    for g, h in zip(*(torch.autograd.grad(x.square().sum(), levels) for x in (a, b)), strict=True):
        assert torch.allclose(g, h, rtol=1e-3, atol=1e-5)


def test_the_deconvolution_head_from_stride_32_is_the_published_one() -> None:
    """Three deconvolutions to stride 4, then a factor 4 that equals neither more nor less than two doublings' size."""
    head = heads.DeconvHead(64, 128, 32, 3, 32, 10.0).eval()
    x = torch.randn(1, 64, 2, 3)
    assert head.up(x).shape == (1, 128, 16, 24)
    assert head([x]).shape == (1, 1, 64, 96)
    assert [m.kernel_size for m in head.up if isinstance(m, nn.ConvTranspose2d)] == [(2, 2)] * 3


@pytest.mark.parametrize("readout", ["ignore", "project"])
def test_dpt_equals_transformers_own_neck_and_head_with_the_same_weights(readout: str) -> None:
    """Of a picture that is not square, in value and in gradient; depth is compared before the sigmoid, after a ReLU."""
    config = DPTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
                       neck_hidden_sizes=[4, 8, 16, 32], fusion_hidden_size=16, readout_type=readout, initializer_range=0.1)  # fmt: skip
    torch.manual_seed(0)
    peer = DPTForDepthEstimation(config)
    levels = pyramid.Reassemble(16, (16,) * 4, (32,) * 4, class_token=readout == "project")
    head = heads.DPTHead((4, 8, 16, 32), 16, 10.0)
    stage = peer.neck.reassemble_stage
    levels.levels.load_state_dict(stage.layers.state_dict())
    if readout == "project":
        state = stage.readout_projects.state_dict()
        levels.readouts.load_state_dict({k: v[..., None, None] if v.ndim > 1 else v for k, v in state.items()})
    head.convs.load_state_dict(peer.neck.convs.state_dict())
    unread = "layers.0.residual_layer1."
    head.fusion.load_state_dict(
        {k: v for k, v in peer.neck.fusion_stage.state_dict().items() if not k.startswith(unread)}
    )
    head.last.load_state_dict(peer.head.head.state_dict())
    maps = [torch.randn(2, 32, 2, 4, requires_grad=True) for _ in range(4)]
    classes = [torch.randn(2, 32, 1, 1) for _ in maps]
    ours = F.relu(torch.logit(head(levels([*maps, *(classes if readout == "project" else [])])) / 10))[:, 0]
    assert ours.shape == (2, 32, 64)
    tokens = [torch.cat([c.flatten(1)[:, None], m.flatten(2).transpose(1, 2)], 1) for c, m in zip(classes, maps)]
    theirs = peer.head(peer.neck(tokens, 2, 4))
    assert 0.1 < (theirs > 0).float().mean() <= 1
    assert torch.allclose(ours, theirs, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), maps) for x in (ours, theirs)), strict=True):
        assert a.abs().max() > 1e-4
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * a.abs().max().item())


def test_every_parameter_of_the_dpt_head_learns() -> None:
    model = DepthEstimator(plain(16), DepthConfig(head="dpt", channels=16))
    model(torch.randn(2, 3, 64, 96)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_linear_probe_enlarges_logits_as_dinov2_does_features() -> None:
    """lin. 4: four maps concatenated, enlarged four times, a linear layer, bins."""
    head = heads.BinsHead(32, 16, 0.1, 10.0, upsample=4).eval()
    nn.init.normal_(head.classifier.weight)
    maps = [torch.randn(2, 8, 3, 5) for _ in range(4)]
    features = F.interpolate(torch.cat(maps, 1), scale_factor=4, mode="bilinear")
    logits = head.classifier(features / (1 + head.norm.eps) ** 0.5)
    weights = F.relu(logits) + 0.1
    expected = (weights * torch.linspace(0.1, 10, 16)[:, None, None]).sum(1) / weights.sum(1)
    assert torch.allclose(head(maps)[:, 0], expected, atol=1e-4)


def test_the_linear_probe_has_the_class_token_beside_every_cell(encoder: Any) -> None:
    """As DINOv2's BNHead: [map, token] of each layer, in that order."""
    config = DepthConfig(head="linear", layers=4, upsample=2, class_token=True, bins=8, max_depth=5, frozen=True)
    model, x = DepthEstimator(encoder, config).eval(), torch.randn(2, 3, 24, 40)
    nn.init.normal_(model.head.classifier.weight)
    maps, tokens = encoder.maps_and_classes(x)
    each = [torch.cat([m, t[:, :, None, None].expand_as(m)], 1) for m, t in zip(maps, tokens, strict=True)]
    expected = F.interpolate(model.head(each), (24, 40), mode="bilinear")
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-5)


def test_a_class_token_that_is_not_there_or_not_read_is_told(encoder: Any) -> None:
    tower = load_encoder("scratch:fastvit_t8")
    with pytest.raises(ConfigError, match="scratch:fastvit_t8 has no class token. Leave class_token out"):
        DepthEstimator(tower, DepthConfig(head="dpt", class_token=True))
    with pytest.raises(ConfigError, match="head=deconv has no such option: leave class_token out"):
        load(DepthConfig, None, ["class_token=true"])


def test_layers_need_as_many_maps_and_the_linear_head() -> None:
    with pytest.raises(ConfigError, match="layers=4 needs as many maps"):
        pyramid.LastMap((16, 32), (8, 8), 4)
    with pytest.raises(ConfigError, match="head=dpt has no such option: leave layers out"):
        load(DepthConfig, None, ["head=dpt", "layers=4"])


def test_bins_with_equal_logits_give_the_middle_of_the_range() -> None:
    head = heads.BinsHead(8, 256, 0.0, 10.0).eval()
    nn.init.zeros_(head.classifier.weight)
    assert torch.allclose(head([torch.randn(1, 8, 2, 2)]), torch.full((1, 1, 2, 2), 5.0))
