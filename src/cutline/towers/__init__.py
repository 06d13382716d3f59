"""Image and text towers (open_clip, timm), their tokeniser, and the Encoder contract.

Names are imported when first used, so that importing this package costs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cutline.towers.config import TowerConfig
    from cutline.towers.encoder import Encoder
    from cutline.towers.model import Model, fast
    from cutline.towers.presets import PRESETS
    from cutline.towers.store import build, load, load_encoder, save
    from cutline.towers.tokenizer import Tokenizer, trim

__all__ = [
    "PRESETS", "Encoder", "Model", "Tokenizer", "TowerConfig", "build", "fast", "load", "load_encoder", "save", "trim",
]  # fmt: skip

_HOME = {
    "PRESETS": "presets", "Encoder": "encoder", "Model": "model", "Tokenizer": "tokenizer", "TowerConfig": "config",
    "build": "store", "fast": "model", "load": "store", "load_encoder": "store", "save": "store", "trim": "tokenizer",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
