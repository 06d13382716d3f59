"""Models as programs that run without Cutline: ONNX (`.onnx`) and torch.export (`.pt2`), each checked once it is written.

A program has one input, whose first axis may be of any length where the format can say so. What was written is read
back, run on random values of another length than it was traced with, and compared to the model.
"""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cutline.errors import CutlineError, DataError

Format = Literal["onnx", "torch_export"]
SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}
TOLERANCE = 1e-3  # of an output's largest value
AGREEING = 0.9  # least share of objects that a written detector finds as the model does
TRACED, CHECKED = 2, 3  # pictures
INLINE = 1_500_000_000  # bytes of weights that still fit into an ONNX file; with more they lie beside it
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Program:
    """What is written as the file `name`: `module`, of one tensor, to a tuple of tensors named by `outputs`.

    example: random input of a length, from a generator; reference: what the written program is compared to; batch:
    False for a program of one picture, whose outputs are as many as are found in it (ONNX only).
    """

    name: str
    module: nn.Module
    reference: nn.Module
    input: str
    example: Callable[[int, torch.Generator], Tensor]
    outputs: tuple[str, ...]
    batch: bool = True


class Pictures(nn.Module):
    """uint8 RGB (B, 3, H, W) → what `body` makes of it normalised, as a tuple."""

    mean: Tensor
    std: Tensor

    def __init__(self, body: Callable[[Tensor], Any], module: nn.Module, mean: Any, std: Any) -> None:
        super().__init__()
        self.module, self.body = module, body  # the module is named so that its weights are found
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1) * 255)

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        out = self.body((pictures.float() - self.mean) / self.std)
        return out if isinstance(out, tuple) else (out,)


def pictures_of(size: tuple[int, int]) -> Callable[[int, torch.Generator], Tensor]:
    """A maker of random uint8 pictures (B, 3, *size)."""
    return lambda n, g: torch.randint(0, 256, (n, 3, *size), generator=g, dtype=torch.uint8)


def need_packages(to: str) -> None:
    """Raise `CutlineError` where a package that writes or runs the format is missing."""
    lacking = [p for p in PACKAGES if importlib.util.find_spec(p) is None] if to == "onnx" else []
    if lacking:
        raise CutlineError(f"--to onnx needs {', '.join(lacking)}: pip install 'cutline[onnx]'.")


@torch.no_grad()
def write(program: Program, folder: Path, to: Format) -> dict[str, Any]:
    """Write and check a program; returns what `export.json` says of it. Raises `CutlineError` if it cannot be written,
    or gives other values than the model."""
    path = folder / f"{program.name}{SUFFIXES[to]}"
    g = torch.Generator().manual_seed(0)
    example = program.example(TRACED if program.batch else 1, g)
    x = program.example(CHECKED if program.batch else 1, g)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation for a whole block, which no format knows
    try:
        expected = program.reference(x)
        (_write_onnx if to == "onnx" else _write_torch)(program, example, path)
        found = _run(path, program.input, x, to)
    except Exception as e:  # the exporters raise errors of many kinds
        raise CutlineError(
            f"the {program.name} program cannot be written as {to}: {type(e).__name__}: {_reason(e)} "
            f"Try {'torch_export' if to == 'onnx' else 'onnx'}, or another --size."
        ) from e
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    length: Any = "batch" if program.batch else 1
    return {
        "input": {"name": program.input, "dtype": _dtype(x), "shape": [length, *x.shape[1:]]},
        "outputs": {
            name: {"dtype": _dtype(y), "shape": ["batch" if program.batch else "objects", *y.shape[1:]]}
            for name, y in zip(program.outputs, expected, strict=True)
        },
        "largest_difference": (compare if program.batch else compare_objects)(
            program.outputs, expected, found, path.name
        ),
        **({"opset": _opset(path)} if to == "onnx" else {}),
    }


def compare(names: tuple[str, ...], expected: Any, found: Any, what: str) -> float:
    """The largest difference of outputs, as a share of the largest value of each; `CutlineError` above `TOLERANCE`."""
    worst = 0.0
    for name, a, b in zip(names, expected, found, strict=True):
        if a.shape != b.shape:
            raise CutlineError(f"{what} gives {name} of shape {tuple(b.shape)}, and the model {tuple(a.shape)}.")
        a, b = a.double(), b.double()
        apart = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(float("inf"))  # the log of no vote is -inf in both
        finite = a[a.isfinite()].abs()
        share = apart.amax().item() / max(finite.amax().item() if len(finite) else 1.0, 1e-12) if len(apart) else 0.0
        if not share <= TOLERANCE:
            raise CutlineError(
                f"{what} gives another {name} than the model: the difference is {share:.2g} of the largest value, and "
                f"may be {TOLERANCE:g}. Nothing was written. Try another format or --size."
            )
        worst = max(worst, share)
    return worst


def compare_objects(names: tuple[str, ...], expected: Any, found: Any, what: str) -> float:
    """As `compare`, of boxes, labels, scores and masks, for the objects that both have.

    Suppression is a comparison, so two boxes that overlap by just its threshold may fall either way with the last bit:
    `AGREEING` of the objects, both ways, must have their like.
    """
    (boxes, labels, scores), (boxes2, labels2, scores2) = expected[:3], found[:3]
    near = (
        (scores[:, None] - scores2).abs() + (boxes[:, None] - boxes2).abs().amax(-1) / boxes.amax().clamp_min(1)
        if len(boxes)
        else scores[:, None] - scores2
    )
    near[labels[:, None] != labels2] = float("inf")
    rows, columns = (near < TOLERANCE).nonzero().T
    seen = min(len(rows.unique()) / max(len(boxes), 1), len(columns.unique()) / max(len(boxes2), 1))
    if len(boxes) + len(boxes2) and seen < AGREEING:
        raise CutlineError(
            f"{what} finds {seen:.0%} of the objects that the model finds, and should find {AGREEING:.0%}. Nothing was "
            "written. Try another --size."
        )
    best = near[rows].argmin(1) if len(rows) else columns
    return compare(names, [a[rows] for a in expected], [b[best] for b in found], what)


def _write_torch(program: Program, example: Tensor, path: Path) -> None:
    torch.export.save(_exported(program, example), path)


def _exported(program: Program, example: Tensor) -> Any:
    return torch.export.export(program.module, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


def _write_onnx(program: Program, example: Tensor, path: Path) -> None:
    names: dict[str, Any] = {"input_names": [program.input], "output_names": list(program.outputs)}
    if not program.batch:
        # torch.export cannot follow torchvision's suppression of boxes, whose number the picture decides; tracing can.
        axes = {name: {0: "objects"} for name in program.outputs}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what tracing might have fixed is what the check looks for
            torch.onnx.export(
                program.module, (example,), path, dynamo=False, dynamic_axes=axes, opset_version=18, **names
            )
        return
    outside = sum(t.nbytes for t in program.module.state_dict().values()) > INLINE
    exported = _exported(program, example)
    shapes = ({0: "batch"},)
    torch.onnx.export(
        exported, (example,), path, dynamo=True, external_data=outside, verbose=False, dynamic_shapes=shapes, **names
    )


def _run(path: Path, name: str, x: Tensor, to: Format) -> list[Tensor]:
    if to == "torch_export":
        return list(torch.export.load(path).module()(x))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # traced masks are told one by one
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(np.asarray(y)) for y in session.run(None, {name: x.numpy()})]


def _opset(path: Path) -> int:
    import onnx

    return int(onnx.load(path, load_external_data=False).opset_import[0].version)


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _reason(error: Exception) -> str:
    """The innermost cause in one line: exporters wrap it in advice to their own developers."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][:300].rstrip(".") + "."


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "224" or "480x640" (height x width). Raises `DataError`."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(s.isdecimal() and int(s) > 0 for s in sides):
        raise DataError(f"--size {text!r} is no size: write 224, or height x width as 480x640.")
    return int(sides[0]), int(sides[-1])
