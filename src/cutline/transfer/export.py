"""Any model for other programs: a pretrained one (`towers.export`), or a transferred one as ONNX or torch.export.

    export("runs/mine/segment-camvid", "segmenter", "onnx")

A transferred model becomes one program, from uint8 RGB pictures (B, 3, H, W) of one size to its output: logits
(B, K, H, W) of a segmenter, metres (B, H, W), logits (B, K) of a classifier (logs of the votes of neighbours), or the
objects of a detector (of one picture, ONNX only). It looks at a picture once: windows, mirror images and several scales
are a loop around it.
"""

import copy
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from cutline.errors import CutlineError, DataError
from cutline.towers import export as towers
from cutline.towers.pictures import weights_hash
from cutline.towers.programs import Format, Pictures, Program, pictures_of, write
from cutline.towers.store import CONFIG_NAME
from cutline.transfer.classify import Classifier
from cutline.transfer.depth import DepthEstimator
from cutline.transfer.detector import Detector
from cutline.transfer.store import TASKS, folder_of, load


def export(run: str | Path, out: str | Path, to: str, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Write a pretrained model's name or folder, or a transferred model's folder; returns what `export.json` says.

    size: height and width of the pictures of a program, by default the tower's own or the config's. Raises
    `CutlineError`.
    """
    try:
        adapted = (folder_of(run) / CONFIG_NAME).exists()  # a CLIP beside its classifier (`zeroshot.adapt`)
    except DataError:
        return towers.export(str(run), out, to, size)
    if adapted and to not in ("onnx", "torch_export"):
        return towers.export(str(run), out, to, size)
    towers.check_format(to, size)
    if to not in ("onnx", "torch_export"):
        raise CutlineError(
            f"{str(run)!r} is a transferred model, which {to} has no place for: use --to onnx or --to torch_export, or "
            f"export the encoder it began with (--to {to})."
        )
    model: Any = load(run)
    size = size or _size(model)
    if isinstance(model, Detector) and to != "onnx":
        raise CutlineError(
            f"{str(run)!r} is a detector: how many boxes are left depends on the picture, and torch.export cannot follow "
            "torchvision's suppression of the others. Use --to onnx."
        )
    with towers.staged(Path(out)) as folder:
        said: dict[str, Any] = {
            "source": str(run),
            "source_hash": weights_hash(model),
            "task": TASKS[type(model).__name__],
        }
        said |= {"size": list(size), "mean": model.encoder.mean, "std": model.encoder.std}
        said["classes"] = getattr(model, "classes", [])
        if isinstance(model, Detector):  # first with all it finds, since the noise it is checked on holds no objects
            write(_program(model, size, 0.0), folder, cast(Format, to))
        said["model"] = write(_program(model, size), folder, cast(Format, to))
        return towers.write_record(folder, to, said)


def _size(model: Any) -> tuple[int, int]:
    config = model.config
    side = config.size if isinstance(model, Classifier | Detector) else model.encoder.size
    crop: tuple[int, int] | None = getattr(config, "crop", None)
    return crop or (side, side)


def _program(model: Any, size: tuple[int, int], least: float | None = None) -> Program:
    """least: score of a detector's objects, by default the config's."""
    fitted = copy.deepcopy(model).requires_grad_(False).eval()
    fitted.encoder, fitted.frozen = (
        towers.at_size(model.encoder, _padded(model, size)),
        False,
    )  # no_grad is no operation
    if isinstance(model, Detector):
        names = ("boxes", "labels", "scores", *(("masks",) if model.masks else ()))
        both = [_Objects(m, m.config.min_score if least is None else least) for m in (fitted, copy.deepcopy(model))]
        return Program("model", both[0], both[1], "pictures", pictures_of(size), names, batch=False)
    name = "metres" if isinstance(model, DepthEstimator) else "logits"
    written, plain = (Pictures(_body(m), m, m.encoder.mean, m.encoder.std).eval() for m in (fitted, model))
    return Program("model", written, plain, "pictures", pictures_of(size), (name,))


def _padded(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    """The size at which the encoder sees pictures of `size`."""
    if isinstance(model, Classifier):
        return size
    scale = model.config.size / max(size) if isinstance(model, Detector) else 1.0
    m = model.pyramid.multiple
    return (-(-int(size[0] * scale) // m) * m, -(-int(size[1] * scale) // m) * m)


def _body(model: Any) -> Any:
    return (lambda x: model.clamp(model(x))[:, 0]) if isinstance(model, DepthEstimator) else model


class _Objects(nn.Module):
    """uint8 (1, 3, H, W) → boxes (N, 4), labels (N,) from 0 on, scores (N,), and masks (N, H, W) in 0 … 1.

    least: score of an object. It is compared in the end, which leaves the same ones, because no object suppresses a
    better one; so what is traced always has objects.
    """

    def __init__(self, detector: Detector, least: float) -> None:
        super().__init__()
        self.detector, self.least = detector.eval(), least
        self.detector.roi_heads.score_thresh = 0.0

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        found = self.detector([pictures[0].float() / 255])[0]
        kept = found["scores"] > self.least
        plain = (found["boxes"], found["labels"] - 1, found["scores"])
        return tuple(x[kept] for x in ((*plain, found["masks"][:, 0]) if "masks" in found else plain))
