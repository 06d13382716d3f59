"""Build, load and save models, always through open_clip's classes and its on-disk format.

A model folder holds `open_clip_config.json` (the model config, activation included, and the preprocessing) and
`open_clip_model.safetensors`; `open_clip.create_model_and_transforms("local-dir:FOLDER")` reads it, and a folder that
open_clip or the Hub wrote is read here. Nothing is unpickled: weights are safetensors, or a state dict read with
`weights_only=True`.
"""

import copy
import difflib
import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.factory import _find_checkpoint_in_dir, load_checkpoint
from open_clip.pretrained import download_pretrained, download_pretrained_from_hf, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from safetensors.torch import save_file
from torch import nn

from cutline.errors import ConfigError, DataError
from cutline.record import write_atomic
from cutline.towers.config import TowerConfig
from cutline.towers.encoder import Encoder
from cutline.towers.encoder import wrap as wrap_encoder
from cutline.towers.model import ClipModel, CoCaModel, CustomTextModel, ImageModel, Model, fast
from cutline.towers.patches import add_second_class, set_patch_dropout
from cutline.towers.presets import PRESETS

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
SCRATCH = "scratch:"


def build(config: TowerConfig, device: str | torch.device = "cpu") -> Model:
    """A model for training: random weights (torch's global generator), or those that `config` names."""
    folder = model_folder(config.model) if config.model else None
    if folder is not None or (config.model or "").startswith("hf-hub:"):
        if config.pretrained:
            raise ConfigError(f"model {config.model!r} brings its own weights; leave pretrained out.")
        cfg, preprocess, weights = _read_folder(folder) if folder else _read_hub(str(config.model))
        _check_quick_gelu(config, cfg, f"the model {config.model!r}", bool(cfg.get("quick_gelu", False)))
    else:
        cfg, preprocess, weights = _architecture(config)
    model = _create(cfg, preprocess, weights, config)
    model.name = config.model or "custom"
    if config.patch_dropout:
        set_patch_dropout(model.visual, config.patch_dropout)
    if folder is not None and (folder / "tokenizer_config.json").exists():
        model.tokenizer_folder = str(folder)
    return fast(model.to(device))  # type: ignore[return-value]


def load(name: str, device: str | torch.device = "cpu") -> Model:
    """A model with its weights, in eval mode.

    name: a run directory (its `model/`), a folder in open_clip's format (with or without "local-dir:"), an open_clip
    "ARCHITECTURE:TAG", "hf-hub:ORG/NAME", a timm name (its pretrained weights, image only), or "scratch:NAME" for an
    open_clip architecture, preset or timm name with random weights (the baseline without pretraining).
    """
    bare, scratch = name.removeprefix(SCRATCH), name.startswith(SCRATCH)
    if not scratch and (name.startswith("hf-hub:") or model_folder(name) is not None):
        model = build(TowerConfig(model=name), device)
    elif _named(bare) is not None:
        if not scratch:
            tags = ", ".join(list_pretrained_tags_by_model(bare)) or "none"
            raise ConfigError(
                f"{name!r} names an architecture without weights. Say which, as '{name}:TAG' (tags: {tags}), "
                f"or '{SCRATCH}{name}' for random ones."
            )
        model = build(TowerConfig(model=bare), device)
    elif timm.is_model(bare.split(".")[0]):
        model = _load_timm(bare, pretrained=not scratch)
    elif ":" in bare and not scratch:
        architecture, tag = bare.split(":", 1)
        model = build(TowerConfig(model=architecture, pretrained=tag), device)
    else:
        raise _unknown(name)
    model.name = name
    return fast(model.to(device)).eval()  # type: ignore[return-value]


def save(model: Model, folder: str | Path) -> Path:
    """Write `model` into `folder` in open_clip's format, the weights atomically; returns the folder."""
    if not model.model_cfg:
        raise DataError(f"{model.name!r} is a timm image tower and cannot be saved in open_clip's format.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    temporary = folder / f".{WEIGHTS_NAME}.{os.getpid()}.tmp"
    try:
        save_file(tensors, temporary)
        os.replace(temporary, folder / WEIGHTS_NAME)
    finally:
        temporary.unlink(missing_ok=True)
    content = {"model_cfg": model.model_cfg, "preprocess_cfg": preprocess_of(model)}
    write_atomic(folder / CONFIG_NAME, json.dumps(content, indent=2).encode())
    if model.tokenizer_folder or model.model_cfg["text_cfg"].get("hf_tokenizer_name"):
        from cutline.towers.tokenizer import Tokenizer

        Tokenizer(model).save(str(folder))  # open_clip looks for its files in the folder
    return folder


def load_encoder(source: str | Model, taps: tuple[int, ...] | None = None) -> Encoder:
    """The image tower of `source` (a name for `load`, or a model, whose weights it shares) as an `Encoder`."""
    return wrap_encoder(load(source) if isinstance(source, str) else source, taps)


def preprocess_of(model: Model) -> dict[str, Any]:
    """The pictures a model expects: size, mean, std, interpolation, resize_mode, … in open_clip's words."""
    return dict(model.visual.preprocess_cfg)  # type: ignore[arg-type]


def model_folder(name: str) -> Path | None:
    """The folder with a model's config that `name` (a run directory or a model folder) means, or None."""
    path = Path(name.removeprefix("local-dir:")).expanduser()
    for folder in (path / "model", path):
        if (folder / CONFIG_NAME).is_file():
            return folder
    if path.is_dir() and (name.startswith("local-dir:") or (path / "recipe.yaml").exists()):
        raise DataError(f"{name!r} holds no model ({CONFIG_NAME}) yet. Has the run written its first checkpoint?")
    return None


Source = tuple[dict[str, Any], dict[str, Any], str | None]  # model config, preprocessing, weights file


def _read_folder(folder: Path) -> Source:
    try:
        content = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        cfg, preprocess = content["model_cfg"], content.get("preprocess_cfg", {})
    except (OSError, ValueError, KeyError) as e:
        raise DataError(f"{str(folder / CONFIG_NAME)!r} is not an open_clip config: {e!r}") from e
    weights = _find_checkpoint_in_dir(folder)
    if weights is None:
        raise DataError(f"{str(folder)!r} holds a config but no weights (looked for {WEIGHTS_NAME}).")
    return cfg, preprocess, weights


def _read_hub(name: str) -> Source:
    hub = name.removeprefix("hf-hub:")
    try:
        path = download_pretrained_from_hf(hub, filename=CONFIG_NAME)
        weights = download_pretrained_from_hf(hub)
    except Exception as e:  # the hub client raises many kinds
        raise DataError(f"cannot fetch {name!r}: {e}. Check the name and the network.") from e
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    return content.get("model_cfg", content), content.get("preprocess_cfg", {}), weights


def _architecture(config: TowerConfig) -> Source:
    """The config of a named or inline architecture and the weights of its tag or file."""
    name = config.model or "custom"
    cfg = copy.deepcopy(config.custom) or _named(name)
    if cfg is None:
        raise _unknown(name)
    _check_custom(cfg)
    tag = config.pretrained
    tag_cfg = open_clip.get_pretrained_cfg(name.replace("/", "-"), tag) if tag else {}
    if config.quick_gelu is not None:
        cfg["quick_gelu"] = config.quick_gelu
    if tag_cfg:
        _check_quick_gelu(config, cfg, f"the pretrained tag {tag!r} of {name}", bool(tag_cfg.get("quick_gelu", False)))
        try:
            return cfg, tag_cfg, download_pretrained(tag_cfg)
        except Exception as e:
            raise DataError(f"cannot fetch the weights {tag!r} of {name}: {e}. Check the network.") from e
    if tag is None:
        return cfg, {}, None
    if not Path(tag).is_file():
        tags = ", ".join(list_pretrained_tags_by_model(name)) or "none"
        raise ConfigError(f"pretrained {tag!r} is neither a file nor a tag of {name} (tags: {tags}).")
    return cfg, _check_weights_file(config, cfg, Path(tag)), tag


def _named(name: str) -> dict[str, Any] | None:
    """The model config of a preset or of one of open_clip's architectures, or None."""
    clean = name.replace("/", "-")  # ViT-B/32, as OpenAI wrote it
    known = PRESETS.get(name) or (open_clip.get_model_config(clean) if clean in open_clip.list_models() else None)
    return copy.deepcopy(known)


def _check_weights_file(config: TowerConfig, cfg: dict[str, Any], path: Path) -> dict[str, Any]:
    """Preprocessing that belongs to a weights file; its activation must be known, since the weights do not tell."""
    beside = path.parent / CONFIG_NAME
    if beside.is_file():
        theirs, preprocess, _ = _read_folder(path.parent)
        _check_quick_gelu(config, cfg, f"the config beside {path.name}", bool(theirs.get("quick_gelu", False)))
        return preprocess
    if config.quick_gelu is None:
        raise ConfigError(
            f"{str(path)!r} does not say which activation it was trained with. Set quick_gelu: true (OpenAI's CLIP, "
            "early DFN and MetaCLIP) or quick_gelu: false (GELU: most others)."
        )
    return {}


def _check_quick_gelu(config: TowerConfig, cfg: dict[str, Any], source: str, trained: bool) -> None:
    asked = bool(cfg.get("quick_gelu", False)) if config.quick_gelu is None else config.quick_gelu
    if asked == trained:
        return
    was, would = ("QuickGELU", "GELU") if trained else ("GELU", "QuickGELU")
    fix = f"Set quick_gelu: {str(trained).lower()}"
    if config.model and open_clip.get_model_config(f"{config.model}-quickgelu") is not None and trained:
        fix += f", or name the model {config.model}-quickgelu"
    raise ConfigError(f"{source} was trained with {was}, and this config would run it with {would}. {fix}.")


def _create(cfg: dict[str, Any], preprocess: dict[str, Any], weights: str | None, config: TowerConfig) -> Model:
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    # The checkpoint's own size and context first; both are fitted below, or by open_clip while loading.
    context = config.context_length or text.get("context_length", 77)
    shorten = weights is not None and context < text.get("context_length", 77)
    if not shorten:
        text["context_length"] = context
    _set_image_size(vision, config.image_size)
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = weights is None
    arguments = {k: v for k, v in cfg.items() if k != "custom_text"}
    custom = cfg.get("custom_text", False) or "hf_model_name" in text
    kind = CoCaModel if "multimodal_cfg" in cfg else CustomTextModel if custom else ClipModel
    if config.class_tokens > 1 and kind is not ClipModel:
        raise ConfigError(
            "towers.class_tokens=2 needs a CLIP with open_clip's own ViT and text tower, such as ViT-B-16."
        )
    try:
        model: Model = kind(**copy.deepcopy(arguments))
    except (TypeError, RuntimeError, ValueError, AssertionError) as e:
        raise ConfigError(f"open_clip cannot build this model config: {e}") from e
    if weights is not None:
        try:
            load_checkpoint(model, weights, strict=True, weights_only=True)
        except Exception as e:  # unpickling errors, missing keys, shapes: all mean "not these weights"
            first = "; ".join(str(e).splitlines()[:4])
            raise DataError(f"the weights {weights!r} do not fit this architecture: {first}") from e
    if config.class_tokens > 1 and model.class_tokens == 1:
        add_second_class(model.visual)  # after the weights, which may be those of a CLIP with one
        cfg["class_tokens"] = config.class_tokens
    if shorten:
        _shorten_context(model, context)
        text["context_length"] = context
    pp = merge_preprocess_dict(asdict(PreprocessCfg()), preprocess)
    pp["mean"], pp["std"] = tuple(pp["mean"]), tuple(pp["std"])
    size: Any = config.image_size or model.visual.image_size
    pp["size"] = size[0] if isinstance(size, tuple) and size[0] == size[1] else size
    open_clip.set_model_preprocess_cfg(model, pp)
    model.model_cfg = cfg
    return model


def _set_image_size(vision: dict[str, Any], size: int | None) -> None:
    """Write the size the tower will have into its config; `ConfigError` for one that it cannot have."""
    name, patch = vision.get("timm_model_name"), vision.get("patch_size", 16)
    timm_cfg = timm.get_pretrained_cfg(name) if name else None
    own = vision.get("image_size") or (timm_cfg.input_size[-1] if timm_cfg else 224)
    vision["image_size"] = size = size or own
    if timm_cfg is not None and timm_cfg.fixed_input_size and size != own:
        raise ConfigError(
            f"the image tower {name} is made for {own} px, so image_size={size} cannot be kept in its checkpoint. "
            "Leave image_size out: an Encoder takes pictures of any size."
        )
    plain_vit = not name and isinstance(vision.get("layers", 12), int)
    if plain_vit and isinstance(size, int) and size % patch:
        near = max(patch, round(size / patch) * patch)
        raise ConfigError(f"image_size {size} is no multiple of the patch size {patch}. The nearest is {near}.")


def _shorten_context(model: Model, context: int) -> None:
    """Cut a text tower's positions and causal mask: captions that fit keep their embeddings."""
    tower: Any = model if isinstance(model, ClipModel) else getattr(model, "text", None)
    if not model.trimmable:
        raise ConfigError(f"context_length={context} would change this text tower's embeddings: it attends to padding.")
    if isinstance(model, CoCaModel):
        raise ConfigError(f"context_length={context}: the context of a trained CoCa cannot be cut. Leave it out.")
    tower.positional_embedding = nn.Parameter(tower.positional_embedding.detach()[:context].clone())
    tower.attn_mask = tower.attn_mask[:context, :context].clone()
    tower.num_pos = tower.context_length = context
    model.context_length = context  # type: ignore[assignment]


def _check_custom(cfg: dict[str, Any]) -> None:
    for part in ("embed_dim", "vision_cfg", "text_cfg"):
        if part not in cfg:
            raise ConfigError(f"custom needs embed_dim, vision_cfg and text_cfg; {part} is missing.")
    for part, known in (("vision_cfg", open_clip.CLIPVisionCfg), ("text_cfg", open_clip.CLIPTextCfg)):
        names = [f.name for f in fields(known)]
        if not isinstance(cfg[part], dict):
            raise ConfigError(f"{part} of custom is a mapping, and here it is {cfg[part]!r}.")
        for key in cfg[part]:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(names) + "."
                raise ConfigError(f"unknown key {key!r} in {part}: {hint}")


def _load_timm(name: str, pretrained: bool) -> Model:
    try:
        trunk = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as e:  # no weights under that name, no network, …
        why = str(e).rstrip(".")
        raise DataError(f"cannot load the timm model {name!r}: {why}. '{SCRATCH}{name}' has random weights.") from e
    model = ImageModel(trunk)
    data = timm.data.resolve_model_data_config(trunk)
    size = data["input_size"][-2:]
    pp = merge_preprocess_dict(asdict(PreprocessCfg()), {k: data[k] for k in ("mean", "std", "interpolation")})
    open_clip.set_model_preprocess_cfg(model, {**pp, "size": size[0] if size[0] == size[1] else size})
    return model


def _unknown(name: str) -> ConfigError:
    known = [*PRESETS, *open_clip.list_models()]
    near = difflib.get_close_matches(name, known + timm.list_models(), n=3, cutoff=0.5)
    hint = f"Near: {', '.join(near)}." if near else ""
    return ConfigError(
        f"{name!r} is no run directory, model folder, preset, open_clip architecture or timm model. {hint} "
        f"Presets: {', '.join(PRESETS)}."
    )
