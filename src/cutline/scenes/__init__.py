"""The embedded world: rendered scenes with captions, alt text, masks, boxes and depth, without a download."""

from cutline.scenes.alt import MIXES
from cutline.scenes.objects import CLASSES
from cutline.scenes.source import COLUMNS, SceneConfig, Scenes, parse_spec, render

__all__ = ["CLASSES", "COLUMNS", "MIXES", "SceneConfig", "Scenes", "parse_spec", "render"]
