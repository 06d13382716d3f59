"""The detector: encoder → pyramid → torchvision's region proposals and heads, as in ViTDet (2203.16527).

Faster R-CNN, with a mask head Mask R-CNN, and Cascade (1712.00726) of three stages. Heads are ViTDet's: two
convolutions before the proposals, four with layer norm and one fully connected layer before boxes and classes, four
with layer norm before masks. What differs from detectron2's is torchvision's: RoIAlign with two samples a bin and
without the half-pixel shift, smooth L1 (β = 1/9) in place of L1 for boxes. Weights of the heads have torchvision's
names, so `rpn` and `roi_heads` load into its `MaskRCNN`.

Shapes: B pictures, N objects or predictions of one, K classes and background, c channels of the pyramid.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from cutline.transfer import pyramid
from cutline.transfer.cascade import CascadeHeads
from cutline.transfer.model import Pyramidal
from cutline.transfer.options import autocast
from cutline.transfer.windows import use_relative, use_windows

LEVELS = ("0", "1", "2", "3")  # of the pyramid that heads read; proposals also read "pool", half the last
RATIOS = (0.5, 1.0, 2.0)  # height / width of anchors
POSITIVE = 0.25  # share of objects among the regions that the heads learn from


class Anchors(AnchorGenerator):  # type: ignore[misc]
    """torchvision's anchors at known strides, which it would guess from the sizes of maps and round to whole pixels."""

    def __init__(self, strides: Sequence[float], size: float) -> None:
        super().__init__(tuple((size * s,) for s in strides), (RATIOS,) * len(strides))
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        first = feature_maps[0]
        self.set_cell_anchors(torch.float32, first.device)
        steps = [[torch.tensor(s, device=first.device)] * 2 for s in self.strides]
        grids = self.grid_anchors([list(m.shape[-2:]) for m in feature_maps], steps)
        return [torch.cat(grids)] * len(image_list.image_sizes)


class Detector(Pyramidal):
    """Objects in pictures of any size; see `forward`. `config` must have nothing left open (`detect.PreparedDetect`)."""

    def __init__(self, encoder: Any, config: Any, classes: Sequence[str], masks: bool) -> None:
        built = pyramid.build("vitdet", encoder.patch, encoder.strides, encoder.channels, config.channels)
        super().__init__(encoder, built, config.frozen)
        self.config, self.classes, self.masks = config, list(classes), masks
        if config.window:
            use_windows(self.encoder, config.window)
        if config.relative:
            use_relative(self.encoder, -(-config.size // (encoder.patch or 1)), config.window)
        native = encoder.patch is None
        self.fpn = FeaturePyramidNetwork(list(built.channels), config.channels) if native else nn.Identity()
        # Exact strides of the levels; those of a ViT of patch 14 are 3.5, 7, 14 and 28.
        first = encoder.strides[built.uses[0]] / (1 if native else 2 ** pyramid.exponents(encoder.strides[-1])[0])
        strides = [first * 2**k for k in range(len(LEVELS) + 1)]
        anchors = Anchors(strides, config.anchors)
        self.rpn = _proposals(anchors, config)
        self.roi_heads = _heads(strides, config, len(classes) + 1, masks)
        # Training pictures come as large-scale jitter cut them; test pictures are resized to the long side `size`.
        self.transform = GeneralizedRCNNTransform(
            config.size, config.size, list(encoder.mean), list(encoder.std), built.multiple, _skip_resize=True
        )
        self.train()

    def forward(self, images: Sequence[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Pictures (3, H, W) in 0 … 1, of any sizes, to losses by name in training mode, which needs `targets` as
        `jitter.ObjectBatch` has them, and else to a dict for each picture: boxes (N, 4), labels (N,) from 1 on, scores
        (N,), highest first, and masks (N, 1, H, W) in 0 … 1."""
        sizes = [(i.shape[1], i.shape[2]) for i in images]
        batch, targets = self.transform(list(images), targets)
        with autocast(self.config)():  # not the heads: boxes in bfloat16 would be whole pixels off
            levels = self.levels(batch.tensors)
        proposals, losses = self.rpn(batch, levels, targets)
        found, more = self.roi_heads(levels, proposals, batch.image_sizes, targets)
        return {**more, **losses} if self.training else self.transform.postprocess(found, batch.image_sizes, sizes)

    @torch.inference_mode()
    def predict(self, images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> list[dict[str, NDArray[Any]]]:
        """Objects in each uint8 (H, W, 3) picture, best first.

        boxes (N, 4) float32, x0 y0 x1 y1 in pixels; labels (N,) int64, places in `classes`; scores (N,) float32; and
        masks (N, H, W) bool if the model has them.
        """
        self.eval()
        device, found = next(self.parameters()).device, []
        for first in range(0, len(images), self.config.batch):
            part = [torch.from_numpy(np.ascontiguousarray(i)) for i in images[first : first + self.config.batch]]
            for one in self([i.to(device).permute(2, 0, 1).float() / 255 for i in part]):
                named = {"boxes": one["boxes"], "labels": one["labels"] - 1, "scores": one["scores"]}
                if "masks" in one:
                    named["masks"] = one["masks"][:, 0] > 0.5
                found.append({k: v.cpu().numpy() for k, v in named.items()})
        return found

    def levels(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Normalised pictures (B, 3, H, W) to five maps (B, c, h, w) float32, the last a max-pooling of the fourth."""
        maps = OrderedDict(zip(LEVELS, self.pyramid(self.features(images))))
        maps = OrderedDict((name, m.float()) for name, m in self.fpn(maps).items())
        maps["pool"] = F.max_pool2d(maps[LEVELS[-1]], 1, 2)
        return maps


def _proposals(anchors: Anchors, config: Any) -> RegionProposalNetwork:
    """Numbers are detectron2's, in test at rois=512; with fewer, fewer proposals are worth the heads' time.

    In training all are kept: drawing from four times `rois` cost a fifth of AP50 after 120 steps on eight pictures.
    """
    kept = min(1000, 4 * config.rois)
    return RegionProposalNetwork(
        anchors,
        RPNHead(config.channels, len(RATIOS), conv_depth=2),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 1000, "testing": kept},
        nms_thresh=0.7,
    )


def _heads(strides: Sequence[float], config: Any, classes: int, masks: bool) -> RoIHeads:
    c = config.channels
    cascade = config.head == "cascade"

    def box_head() -> Any:
        return FastRCNNConvFCHead((c, 7, 7), [c] * 4, [config.hidden], norm_layer=LayerNorm2d)

    heads: RoIHeads = (CascadeHeads if cascade else RoIHeads)(
        box_roi_pool=_pool(strides, 7),
        box_head=nn.ModuleList(box_head() for _ in range(3)) if cascade else box_head(),
        box_predictor=nn.ModuleList(_predictor(config.hidden, classes, boxes=1) for _ in range(3))
        if cascade
        else _predictor(config.hidden, classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=config.rois,
        positive_fraction=POSITIVE,
        bbox_reg_weights=None,
        score_thresh=config.min_score,
        nms_thresh=0.5,
        detections_per_img=config.detections,
        **(
            {
                "mask_roi_pool": _pool(strides, 14),
                "mask_head": MaskRCNNHeads(c, [c] * 4, 1, norm_layer=LayerNorm2d),
                "mask_predictor": MaskRCNNPredictor(c, c, classes),
            }
            if masks
            else {}
        ),
    )
    return heads


def _predictor(hidden: int, classes: int, boxes: int | None = None) -> FastRCNNPredictor:
    """torchvision's layers with detectron2's small weights, and the background as likely as it is among the samples.

    With torchvision's own start the first steps teach the head that all is background, after which all regions looked the
    same to it: after 90 steps on scenes the loss of classes was 1.26, and 0.98 from this start. boxes: of a region, by default
    one a class.
    """
    predictor = FastRCNNPredictor(hidden, classes)
    if boxes is not None:
        predictor.bbox_pred = nn.Linear(hidden, 4 * boxes)
    for layer, deviation in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
    nn.init.constant_(predictor.cls_score.bias[:1], math.log((classes - 1) * (1 - POSITIVE) / POSITIVE))
    return predictor


def _pool(strides: Sequence[float], side: int) -> MultiScaleRoIAlign:
    """RoIAlign at exact strides, which torchvision would round to powers of two; levels by 1612.03144, equation 1."""
    pool = MultiScaleRoIAlign(list(LEVELS), side, sampling_ratio=2)
    pool.scales = [1 / s for s in strides[: len(LEVELS)]]
    lowest = round(math.log2(strides[0]))
    pool.map_levels = initLevelMapper(
        lowest, lowest + len(LEVELS) - 1, canonical_scale=pool.canonical_scale, canonical_level=pool.canonical_level
    )
    return pool
