"""Small towers for laptops and for the embedded scenes, as open_clip model configs.

The vocabulary embedding (49,408 rows) outweighs the rest of a small text tower; it is looked up and not multiplied, so
it costs memory and hardly any time. A context of 40 holds 38 word pieces, more than any caption of the scenes has.
"""

from typing import Any


def _vit(size: int, patch: int, width: int, layers: int, text_width: int, text_layers: int) -> dict[str, Any]:
    vision = {"image_size": size, "patch_size": patch, "width": width, "layers": layers}
    text = {"context_length": 40, "vocab_size": 49408, "width": text_width, "layers": text_layers}
    return {
        "embed_dim": text_width,
        "quick_gelu": False,
        "vision_cfg": {**vision, "head_width": 32 if width < 384 else 64},
        "text_cfg": {**text, "heads": text_width // 32},
    }


def _timm(name: str, size: int, text_width: int, text_layers: int) -> dict[str, Any]:
    return {
        **_vit(size, 16, 128, 1, text_width, text_layers),
        "vision_cfg": {"timm_model_name": name, "timm_pool": "avg", "timm_proj": None, "image_size": size},
        "custom_text": True,
    }


def coca(
    size: int, patch: int, width: int, layers: int, text_layers: int, stem: tuple[int, ...] = ()
) -> dict[str, Any]:
    """A CoCa: half of the text layers before the picture comes in, half behind (Yu et al., 2205.01917, section 3.2).

    The decoder looks at all patches: pooling them first, as the paper does, saves nothing where there are so few.
    """
    base = _vit(size, patch, width, layers, width, text_layers)
    text = base["text_cfg"]
    return {
        **base,
        "vision_cfg": {**base["vision_cfg"], "output_tokens": True, **({"pool_type": "avg"} if stem else {})},
        "text_cfg": {**text, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": text,
        "custom_text": True,
        **({"conv_stem": list(stem)} if stem else {}),
    }


PRESETS: dict[str, dict[str, Any]] = {
    "vit-tiny-64": _vit(64, 8, 128, 4, 128, 3),  # 64 tokens, 0.8 M image parameters
    "vit-tiny-112": _vit(112, 16, 192, 6, 192, 4),  # 49 tokens, 2.8 M
    "vit-small-112": _vit(112, 8, 384, 8, 256, 6),  # 196 tokens, 14.4 M: one GPU
    "coca-vit-tiny-64": coca(64, 8, 128, 4, 3),  # vit-tiny-64's image tower, and a decoder
    # Convolutions alone: with few pictures each transformer layer behind them made captions worse.
    "coca-tiny-64": coca(64, 8, 128, 0, 2, (32, 64, 128)),
    "coca-tiny-112": coca(112, 16, 192, 0, 2, (32, 64, 128, 192)),
    "mci0-128": _timm("fastvit_mci0", 128, 192, 4),  # MobileCLIP's smallest image tower, 11 M, stages at 4/8/16/32
}
