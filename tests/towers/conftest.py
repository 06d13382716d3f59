"""Small random models, built once."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from cutline import towers

TEXT = {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 4, "head_width": 32}


def config(custom_text: bool = False, **vision: Any) -> dict[str, Any]:
    """An open_clip model config with a tiny text tower."""
    whole = vision if "timm_model_name" in vision else {**VISION, **vision}
    cfg: dict[str, Any] = {"embed_dim": 24, "vision_cfg": whole, "text_cfg": dict(TEXT)}
    return {**cfg, "custom_text": True} if custom_text else cfg


# One of every kind. A string is a name for `load`, a dict an open_clip model config.
KINDS: dict[str, Any] = {
    "vit": config(),
    "vit-avg-scale": config(pool_type="avg", ls_init_value=0.1, final_ln_after_pool=True, no_ln_pre=True),
    "vit-sincos": config(pos_embed_type="sin_cos_2d"),
    "vit-two-blocks": config(layers=2),
    "vit-attention-pool": config(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=4),
    "resnet": config(layers=[1, 1, 1, 1], width=16, image_size=64),
    "timm-vit": "scratch:vit_tiny_patch16_224",
    "timm-vit-joint": config(True, timm_model_name="vit_tiny_patch16_224", timm_pool="token", timm_proj="linear"),
    "timm-registers": "scratch:vit_pwee_patch16_reg1_gap_256",
    "timm-rope": "scratch:eva02_tiny_patch14_224",
    "mci0-joint": config(True, timm_model_name="fastvit_mci0", timm_pool="avg", timm_proj=None, image_size=256),
    "mci1": "scratch:fastvit_mci1",
    "mci2": "scratch:fastvit_mci2",
    "convnext": "scratch:convnext_atto",
    "poolformer": "scratch:poolformer_s12",
    "swin": "scratch:swin_tiny_patch4_window7_224",
}


@cache
def _model(kind: str) -> towers.Model:
    torch.manual_seed(0)
    what = KINDS[kind]
    if isinstance(what, str):
        return towers.load(what)
    return towers.build(towers.TowerConfig(custom=copy.deepcopy(what))).eval()


@pytest.fixture
def model_of() -> Callable[[str], towers.Model]:
    """A private copy of the model of a kind, in eval mode."""
    return lambda kind: copy.deepcopy(_model(kind))


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)
