"""Configs of small models, and names of classes."""

from typing import Any

NAMES = ["red apple", "grass", "sky", "sand", "snow", "coal", "wine"]
VISION = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 16, "layers": 1, "heads": 1}
TIMM = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
# CLIP, and SigLIP's kinds of towers: timm's with attention pooling, texts without a causal mask, a bias beside the scale.
KINDS: dict[str, Any] = {
    "clip": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT},
    "siglip": {
        "embed_dim": 64, "init_logit_bias": -10, "custom_text": True, "vision_cfg": TIMM,
        "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}},
    },
}  # fmt: skip
