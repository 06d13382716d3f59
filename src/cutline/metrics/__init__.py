"""Metrics that no library has as we need them; the rest is torchmetrics and faster-coco-eval."""
