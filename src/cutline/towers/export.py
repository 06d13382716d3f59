"""A pretrained model for other programs: open_clip's and timm's folders, ONNX and torch.export.

    export("runs/mine", "mine-onnx", "onnx", size=(256, 256))

open_clip and timm read their folder with "local-dir:FOLDER". The programs (`programs`) take uint8 RGB pictures
(B, 3, H, W) of one size and normalise them themselves. In every format `export.json` says what came out, and nothing is
left behind that does not give the model's own values.
"""

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast, get_args

import open_clip
import timm
import torch
from open_clip.transformer import VisionTransformer
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from cutline.errors import ConfigError, CutlineError
from cutline.record import version, write_atomic
from cutline.towers.encoder import Encoder, wrap
from cutline.towers.model import Model
from cutline.towers.pictures import weights_hash
from cutline.towers.programs import CHECKED, Format, Pictures, Program, compare, need_packages, pictures_of, write
from cutline.towers.store import load, preprocess_of, save
from cutline.towers.vit import NativeViT, TimmViT

FORMATS = ("timm", "open_clip", *get_args(Format))
RECORD = "export.json"
CLIP_VIT = "vit_base_patch16_clip_224"  # timm's CLIP image tower, made to measure by its arguments
NEAR = "--to onnx and --to torch_export can hold it."


def export(model: str | Model, out: str | Path, to: str, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Write `model` (or what `load` takes) into the folder `out`; returns what `export.json` says.

    size: height and width of the pictures of a program, by default the tower's own. Raises `CutlineError` for a model
    that the format cannot hold, saying which can.
    """
    check_format(to, size)
    model = load(model) if isinstance(model, str) else model.eval()
    with staged(Path(out)) as folder:
        if to == "open_clip":
            said = _open_clip(model, folder)
        elif to == "timm":
            said = _timm(model, folder)
        else:
            said = _programs(model, folder, cast(Format, to), size)
        return write_record(folder, to, {"source": model.name, "source_hash": weights_hash(model), **said})


def check_format(to: str, size: tuple[int, int] | None) -> None:
    """Raise `CutlineError` for a format that there is not, that lacks a package, or that has no size to choose."""
    if to not in FORMATS:
        raise ConfigError(f"--to {to!r} is none of {', '.join(FORMATS)}.")
    if size is not None and to not in get_args(Format):
        raise ConfigError(f"--size is for onnx and torch_export; {to} keeps the size of the model. Leave it out.")
    need_packages(to)


def write_record(folder: Path, to: str, said: dict[str, Any]) -> dict[str, Any]:
    """Write and return `export.json`."""
    record = {"format": to, **said, "version": version(), "torch": torch.__version__}
    write_atomic(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False).encode())
    return record


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into: its files move to `out` in the end, or go if something is raised."""
    folder = out.parent / f".{out.name}.{os.getpid()}.tmp"
    folder.mkdir(parents=True)
    try:
        yield folder
        out.mkdir(exist_ok=True)
        for path in folder.iterdir():
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def at_size(encoder: Encoder, size: tuple[int, int]) -> Encoder:
    """A copy whose positions are made for pictures of `size`, so that a program need not interpolate them.

    For sizes that no padding changes; towers that keep no positions come as they are.
    """
    encoder = copy.deepcopy(encoder).requires_grad_(False).eval()
    if any(side % encoder.multiple for side in size):
        return encoder
    if isinstance(encoder, NativeViT):
        v, grid = encoder.visual, [side // encoder.multiple for side in size]
        positions = resample_abs_pos_embed(v.positional_embedding[None], grid, v.grid_size, num_prefix_tokens=1)
        v.positional_embedding, v.grid_size = nn.Parameter(positions[0], requires_grad=False), tuple(grid)
    elif isinstance(encoder, TimmViT) and encoder.any_size:
        encoder.visual.trunk.set_input_size(img_size=size)
    return encoder


class _Texts(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        return (self.model.encode_text(tokens),)


def _programs(model: Model, folder: Path, to: Format, size: tuple[int, int] | None) -> dict[str, Any]:
    encoder = wrap(model)
    size = size or (encoder.size, encoder.size)
    fitted = at_size(encoder, size)
    towers = [Pictures(e.pooled_and_last, e, encoder.mean, encoder.std).eval() for e in (fitted, encoder)]
    programs = [Program("image", towers[0], towers[1], "pictures", pictures_of(size), ("image_embedding", "map"))]
    text = model.model_cfg.get("text_cfg")
    if text:
        context, words = int(text.get("context_length", 77)), int(text.get("vocab_size", 1000))
        texts = _Texts(copy.deepcopy(model).requires_grad_(False)).eval()
        example = lambda n, g: torch.randint(1, words, (n, context), generator=g)  # noqa: E731
        programs.append(Program("text", texts, texts, "tokens", example, ("text_embedding",)))
    said: dict[str, Any] = {p.name: write(p, folder, to) for p in programs}
    said |= {"size": list(size), "mean": encoder.mean, "std": encoder.std}
    if text:
        bias = model.logit_bias
        said |= {"logit_scale": model.logit_scale.exp().item(), "logit_bias": None if bias is None else bias.item()}
    return said


def _open_clip(model: Model, folder: Path) -> dict[str, Any]:
    ours = _ours(model)
    if not model.model_cfg:
        raise CutlineError(f"{model.name} is an image tower without a joint space; --to timm, {NEAR}")
    if ours:
        raise CutlineError(f"{model.name} has {ours[0]}, which open_clip does not know and cannot load; {NEAR}")
    save(model, folder)
    theirs = open_clip.create_model_and_transforms(f"local-dir:{folder}")[0].eval()
    g = torch.Generator().manual_seed(0)
    context = int(model.model_cfg["text_cfg"].get("context_length", 77))
    tokens = torch.randint(1, 1000, (CHECKED, context), generator=g)
    with torch.no_grad():
        x = _normalised(model, g)
        ours_, found = ((m.encode_image(x), m.encode_text(tokens)) for m in (model, theirs))
    return {"largest_difference": compare(("image embedding", "text embedding"), ours_, found, str(folder.name))}


def _ours(model: Model) -> list[str]:
    """What of the model open_clip does not have."""
    return [key for key in ("class_tokens", "conv_stem") if model.model_cfg.get(key)]


def _instead(model: Model) -> str:
    return NEAR if _ours(model) else f"--to open_clip, {NEAR}"


def _normalised(model: Model, g: torch.Generator) -> Tensor:
    size = preprocess_of(model)["size"]
    return torch.randn(CHECKED, 3, *((size, size) if isinstance(size, int) else size), generator=g)


def _timm(model: Model, folder: Path) -> dict[str, Any]:
    """timm's hub layout; `timm.create_model("local-dir:FOLDER", pretrained=True)` gives `encode_image`'s values."""
    trunk = _trunk(model)
    said = preprocess_of(model)
    size = said["size"]
    sides = (size, size) if isinstance(size, int) else tuple(size)
    mode = "squash" if said["resize_mode"] == "squash" else "border" if said["resize_mode"] == "longest" else "center"
    trunk.pretrained_cfg = {
        **trunk.pretrained_cfg, "mean": tuple(said["mean"]), "std": tuple(said["std"]), "input_size": (3, *sides),
        "interpolation": said["interpolation"], "crop_pct": 1.0, "crop_mode": mode,
    }  # fmt: skip
    timm.models.save_for_hf(trunk, folder, model_args=getattr(trunk, "made_with", None), safe_serialization=True)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = _normalised(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = compare(("embedding",), [model.encode_image(x)], [theirs(x)], "timm's model")
    return {"largest_difference": difference, "timm": timm.__version__}


def _trunk(model: Model) -> Any:
    """A copy of the image tower as a timm model, its last projection as the classifier."""
    visual: Any = model.visual
    if type(visual) is VisionTransformer:
        return _converted(model, visual)
    if not hasattr(visual, "trunk"):
        raise CutlineError(f"{model.name}: timm has no {type(visual).__name__}; {_instead(model)}")
    trunk = copy.deepcopy(visual.trunk)
    behind = [m for m in getattr(visual, "head", nn.Identity()).modules() if next(m.parameters(recurse=False), None) is not None]  # fmt: skip
    if not behind:
        return trunk
    if len(behind) > 1 or not isinstance(behind[0], nn.Linear):
        raise CutlineError(f"{model.name} has {len(behind)} layers behind timm's trunk; {_instead(model)}")
    trunk.reset_classifier(behind[0].out_features)
    last = trunk.get_classifier()
    with torch.no_grad():
        last.weight.copy_(behind[0].weight)
        last.bias.zero_() if behind[0].bias is None else last.bias.copy_(behind[0].bias)
    return trunk


def _converted(model: Model, v: Any) -> Any:
    """timm's ViT with the weights of open_clip's, by timm's own conversion."""
    blocks: Any = v.transformer.resblocks
    if len(blocks) and v.attn_pool is None and v.pool_type in ("tok", "avg") and not v.final_ln_after_pool:
        block, width = blocks[0], int(v.transformer.width)
        made: dict[str, Any] = {
            "img_size": list(v.image_size), "patch_size": int(v.patch_size[0]), "embed_dim": width,
            "depth": len(blocks), "num_heads": int(block.attn.num_heads),
            "mlp_ratio": block.mlp.c_fc.out_features / width, "global_pool": {"tok": "token", "avg": "avg"}[v.pool_type],
            "fc_norm": False, "act_layer": "quick_gelu" if model.model_cfg.get("quick_gelu") else "gelu",
        }  # fmt: skip
        trunk = timm.create_model(CLIP_VIT, num_classes=0 if v.proj is None else v.proj.shape[1], **made)
        weights = {f"visual.{k}": t for k, t in v.state_dict().items()}
        try:
            trunk.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(weights, trunk))
            trunk.made_with = made
            return trunk.eval()
        except RuntimeError:  # layer scale, no first norm, a stem of convolutions
            pass
    raise CutlineError(
        f"{model.name} differs from the plain CLIP tower (pooling, norms, layer scale or stem), which is all that timm's "
        f"conversion knows; {_instead(model)}"
    )
