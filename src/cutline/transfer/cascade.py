"""Cascade R-CNN's heads (Cai and Vasconcelos, 1712.00726) on torchvision's `RoIHeads`, with detectron2's settings.

Three stages, each with a head of its own. A stage learns from the boxes that the one before made of its proposals,
matched at a higher IoU (0.5, 0.6, 0.7), and moves them for all classes alike. In test the class scores are the mean of
the three. The mask head is that of Mask R-CNN and learns from the first stage's proposals.
"""

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import clip_boxes_to_image

IOUS = (0.5, 0.6, 0.7)
WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))  # of box offsets
Boxes = list[Tensor]
Targets = list[dict[str, Tensor]]


class CascadeHeads(RoIHeads):  # type: ignore[misc]
    """`box_head` and `box_predictor` are lists of three, the predictors' boxes class-agnostic."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.coders = [BoxCoder(w) for w in WEIGHTS]
        self.matchers = [Matcher(iou, iou, allow_low_quality_matches=False) for iou in IOUS]

    def forward(
        self, features: dict[str, Tensor], proposals: Boxes, image_shapes: list[tuple[int, int]], targets: Any = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As `RoIHeads.forward`."""
        if not self.training:
            found = self._detect(features, proposals, image_shapes)
            if self.has_mask():
                logits = self._masks(features, [f["boxes"] for f in found], image_shapes)
                for one, masks in zip(found, maskrcnn_inference(logits, [f["labels"] for f in found])):
                    one["masks"] = masks
            return found, {}
        proposals, matched, labels, _ = self.select_training_samples(proposals, targets)
        losses = self._box_losses(features, proposals, labels, matched, image_shapes, targets)
        if self.has_mask():
            positive = [torch.where(one > 0)[0] for one in labels]
            boxes = [p[i] for p, i in zip(proposals, positive)]
            logits = self._masks(features, boxes, image_shapes)
            of = [m[i] for m, i in zip(matched, positive)]
            losses["loss_mask"] = maskrcnn_loss(
                logits, boxes, [t["masks"] for t in targets], [t["labels"] for t in targets], of
            )
        return [], losses

    def _stage(self, k: int, features: Any, boxes: Boxes, shapes: Any) -> tuple[Tensor, Tensor, Boxes]:
        """Class logits (R, K), box offsets (R, 4) and the moved boxes, which pass no gradient on."""
        pooled = self.box_roi_pool(features, boxes, shapes)
        if self.training:  # a third of the gradient from each stage, as the original has it
            pooled = pooled / len(IOUS) + pooled.detach() * (1 - 1 / len(IOUS))
        logits, offsets = self.box_predictor[k](self.box_head[k](pooled))
        moved = (
            self.coders[k].decode(offsets.detach(), boxes)[:, 0].split([b.shape[0] for b in boxes])
        )  # which tracing follows, and not len
        return logits, offsets, [clip_boxes_to_image(b, shape) for b, shape in zip(moved, shapes)]

    def _box_losses(
        self, features: Any, boxes: Boxes, labels: Boxes, matched: Boxes, shapes: Any, targets: Targets
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        truth = [t["boxes"].to(boxes[0].dtype) for t in targets]
        for k, coder in enumerate(self.coders):
            if k:
                boxes = [b[((b[:, 2:] - b[:, :2]) > 0).all(1)] for b in boxes]
                self.proposal_matcher = self.matchers[k]
                matched, labels = self.assign_targets_to_proposals(boxes, truth, [t["labels"] for t in targets])
                self.proposal_matcher = self.matchers[0]
            goals = [t[m] if len(t) else torch.zeros_like(b) for t, m, b in zip(truth, matched, boxes)]
            wanted = coder.encode(goals, boxes)
            logits, offsets, moved = self._stage(k, features, boxes, shapes)
            # The loss looks up the offsets of each box's class: here they are all the same.
            classes, box = fastrcnn_loss(logits, offsets.repeat(1, logits.shape[1]), labels, wanted)
            losses |= {f"loss_classifier_{k}": classes, f"loss_box_reg_{k}": box}
            boxes = moved
        return losses

    def _detect(self, features: Any, boxes: Boxes, shapes: Any) -> list[dict[str, Tensor]]:
        scores = []
        for k in range(len(IOUS)):
            logits, _, boxes = self._stage(k, features, boxes, shapes)
            scores.append(logits.softmax(1))
        mean = torch.stack(scores).mean(0)
        # torchvision's own last step, with the mean as logits and boxes that stay where they are.
        still = mean.new_zeros(mean.shape[0], 4 * mean.shape[1])
        found = self.postprocess_detections(mean.log(), still, boxes, shapes)
        return [{"boxes": b, "scores": s, "labels": n} for b, s, n in zip(*found)]

    def _masks(self, features: Any, boxes: Boxes, shapes: Any) -> Tensor:
        logits: Tensor = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, shapes)))
        return logits
