"""Heads: from pyramid levels to logits or depth, at the resolution the head works at.

UPerNet is segmentation-models-pytorch's decoder, Semantic FPN its blocks on torchvision's FPN; they want exact
halving between levels, which the pyramids give. The deconvolution head is MIM-Depth-Estimation's, the linear heads are
DINOv2's, and DPT is transformers'.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cutline.errors import ConfigError


class UPerHead(nn.Module):
    """UPerNet (1807.10221): pyramid pooling on the coarsest level, FPN, fusion, dropout, 1x1.

    The decoder begins with a layer norm of every level, which mmsegmentation has in Swin and not for plain ViTs.
    channels: of the decoder; 512 in mmsegmentation's base config, 768 in MAE's ViT-B recipe.
    """

    def __init__(self, widths: Sequence[int], channels: int, classes: int) -> None:
        super().__init__()
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        self.decoder = UPerNetDecoder([0, 0, *widths], encoder_depth=len(widths) + 1, decoder_channels=channels)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        out: Tensor = self.classifier(self.dropout(self.decoder([None, None, *levels])))
        return out


class FCNHead(nn.Module):
    """The auxiliary head of mmsegmentation's recipes (FCN, 1411.4038): 3x3-BN-ReLU, dropout, 1x1 on one level.

    level: 2, the third, of stride 16; channels: 256.
    """

    def __init__(self, widths: Sequence[int], classes: int, level: int = 2, channels: int = 256) -> None:
        super().__init__()
        self.level = level
        self.body = nn.Sequential(
            nn.Conv2d(widths[level], channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(channels, classes, 1),
        )

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        out: Tensor = self.body(levels[self.level])
        return out


class FPNHead(nn.Module):
    """Semantic FPN (1901.02446), the head of the mobile protocol.

    FPN with a 3x3 on every level (torchvision's), then per level 3x3-GN-ReLU and doublings until the finest stride,
    their sum, dropout, 1x1. channels: of the FPN, 256 in the paper; half as many after it.
    """

    def __init__(self, widths: Sequence[int], channels: int, classes: int) -> None:
        super().__init__()
        from segmentation_models_pytorch.decoders.fpn.decoder import SegmentationBlock
        from torchvision.ops import FeaturePyramidNetwork

        if channels % 64:
            raise ConfigError(f"head=fpn needs channels in multiples of 64 (group norm of 32 groups), not {channels}.")
        self.fpn = FeaturePyramidNetwork(list(widths), channels)
        self.blocks = nn.ModuleList(SegmentationBlock(channels, channels // 2, k) for k in range(len(widths)))
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(channels // 2, classes, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        fused = self.fpn({str(k): level for k, level in enumerate(levels)}).values()
        total = torch.stack([block(level) for block, level in zip(self.blocks, fused, strict=True)]).sum(0)
        out: Tensor = self.classifier(self.dropout(total))
        return out


class LinearHead(nn.Module):
    """Batch norm and a 1x1 convolution on the last map (DINOv2's linear segmentation probe, 2304.07193)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.classifier = _probe(width, classes)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        out: Tensor = self.classifier(self.norm(levels[-1]))
        return out


class DeconvHead(nn.Module):
    """The depth head of the MIM protocol (2205.13543): deconvolutions, 3x3, two bilinear doublings, 3x3, 3x3, sigmoid.

    Three deconvolutions of 32 filters there, from stride 32. From a finer stride the doublings become one bilinear step
    to the picture's own resolution, down or up. Weights start at torch's defaults: the source's normal(0, 0.001) left
    several times the error after 200 steps. Output (B, 1, H, W) in metres, in (0, max_depth).
    """

    def __init__(
        self, width: int, channels: int, filters: int, deconvolutions: int, stride: int, max_depth: float
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(deconvolutions):
            layers += [nn.ConvTranspose2d(width, filters, 2, stride=2, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
            width = filters
        layers += [nn.Conv2d(width, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        self.up = nn.Sequential(*layers)
        self.last = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 1, 3, padding=1)
        )
        self.stride, self.max_depth = stride, max_depth

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        x = levels[-1]
        size = (x.shape[2] * self.stride, x.shape[3] * self.stride)
        x = F.interpolate(self.up(x), size=size, mode="bilinear", align_corners=False)
        return self.max_depth * torch.sigmoid(self.last(x).float())


class DPTHead(nn.Module):
    """DPT's fusion and depth head (2103.13413): on each level a 3x3 to `channels`, RefineNet's fusion with residual
    convolution units from the coarsest on, 3x3, bilinear x2, 3x3, ReLU, 1x1.

    transformers' parts, without batch norm, as the paper has it for depth. Depth is max_depth · sigmoid, as for the
    deconvolution head, where DPT has a ReLU on inverse depth without a unit. Output (B, 1, 4 h, 4 w) in metres for a
    finest level of h x w.
    """

    def __init__(self, widths: Sequence[int], channels: int, max_depth: float) -> None:
        super().__init__()
        from transformers import DPTConfig
        from transformers.models.dpt.modeling_dpt import DPTDepthEstimationHead, DPTFeatureFusionStage

        config = DPTConfig(neck_hidden_sizes=list(widths), fusion_hidden_size=channels)
        self.convs = nn.ModuleList(nn.Conv2d(w, channels, 3, padding=1, bias=False) for w in widths)
        self.fusion = DPTFeatureFusionStage(config)
        self.fusion.layers[0].residual_layer1 = nn.Identity()  # the coarsest level is added to nothing, so never read
        self.last = DPTDepthEstimationHead(config).head[:-1]
        self.max_depth = max_depth

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        fused = self.fusion([conv(level) for conv, level in zip(self.convs, levels, strict=True)])[-1]
        out: Tensor = self.max_depth * torch.sigmoid(self.last(fused).float())
        return out


class BinsHead(nn.Module):
    """DINOv2's linear depth probe (2304.07193): batch norm and a 1x1 to `bins` depths spaced evenly over the range.

    Depth is the mean of the bins' centres weighted by relu(logit) + 0.1, normalised. Maps are concatenated at the size
    of the first. DINOv2 enlarges features by `upsample` 4 before the 1x1; enlarging logits gives the same and costs
    less. It has no batch norm here (DINOv3 has one as an option). Output (B, 1, upsample · h, upsample · w) in metres.
    """

    centres: Tensor

    def __init__(self, width: int, bins: int, min_depth: float, max_depth: float, upsample: int = 1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.classifier = _probe(width, bins)
        self.register_buffer("centres", torch.linspace(min_depth, max_depth, bins))
        self.upsample = upsample

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        first, *rest = levels
        rest = [F.interpolate(x, first.shape[2:], mode="bilinear", align_corners=False) for x in rest]
        logits = self.classifier(self.norm(torch.cat([first, *rest], 1))).float()
        if self.upsample > 1:
            logits = F.interpolate(logits, scale_factor=self.upsample, mode="bilinear", align_corners=False)
        weights = F.relu(logits) + 0.1
        return torch.einsum("bkhw,k->bhw", weights / weights.sum(1, keepdim=True), self.centres)[:, None]


def _probe(width: int, outputs: int) -> nn.Conv2d:
    """A 1x1 convolution that starts as DINOv2's probes do: normal weights of deviation 0.01, no bias."""
    layer = nn.Conv2d(width, outputs, 1)
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
