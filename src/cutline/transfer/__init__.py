"""Moving an encoder to a task: classification, segmentation, depth or detection, on your own data or a benchmark's.

    from cutline import transfer
    model = transfer.load("runs/mine/segment-camvid")
    masks = model.predict([picture])                          # uint8 (H, W, 3)

`classify.classify`, `segment.segment`, `depth.depth` and `detect.detect` are the whole task in one call, fine-tuned or
frozen; `fit` and `score` beside them are its halves; `predict.predict` writes predictions of files.
Names are imported when first used, because torch is slow to import and the command line reads this package for its help.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cutline.transfer.classify import Classifier, ClassifyConfig
    from cutline.transfer.data import DenseData, open_data
    from cutline.transfer.depth import DepthConfig, DepthEstimator
    from cutline.transfer.detect import DetectConfig
    from cutline.transfer.detector import Detector
    from cutline.transfer.segment import SegmentConfig, Segmenter
    from cutline.transfer.store import load, save

_HOME = {
    "Classifier": "classify", "ClassifyConfig": "classify", "DenseData": "data", "DepthConfig": "depth",
    "DepthEstimator": "depth", "DetectConfig": "detect", "Detector": "detector", "SegmentConfig": "segment",
    "Segmenter": "segment", "load": "store", "open_data": "data", "save": "store",
}  # fmt: skip
# Functions of the name of their file (segment, predict, …) are not here: the file would take the function's place.
__all__ = [
    "Classifier", "ClassifyConfig", "DenseData", "DepthConfig", "DepthEstimator", "DetectConfig", "Detector",
    "SegmentConfig", "Segmenter", "load", "open_data", "save",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
