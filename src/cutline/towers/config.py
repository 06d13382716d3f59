"""Which towers a run trains: an open_clip architecture, a preset, an inline config, or a model to go on from."""

from typing import Any, Literal

from pydantic import Field, model_validator

from cutline.config import Config


class TowerConfig(Config):
    """One image tower and one text tower with a joint space.

    model: an open_clip architecture ("ViT-B-16", "MobileCLIP-S1"), a preset of `towers.presets` ("vit-tiny-64"), or a
    model with weights: a run directory, a folder in open_clip's format, "hf-hub:ORG/NAME". custom: an open_clip model
    config (embed_dim, vision_cfg, text_cfg, quick_gelu, …) instead of `model`. pretrained: an open_clip tag or a
    weights file (safetensors, or a state dict that torch loads without pickle). quick_gelu: None takes what the
    architecture says; a checkpoint that disagrees is refused. image_size, context_length: None for the architecture's
    own; positional embeddings of a checkpoint are fitted (images: bicubic; a shorter context: cut, with equal outputs).
    patch_dropout: share of its patches that a picture (or a crop) passes the tower without in training, as in FLIP;
    unmasked_tail: share of the run, at its end, in which it passes with all of them. (FLIP tunes so for 0.32 epochs at about
    1 % of the peak learning rate; a cosine is below 0.6 % in its last twentieth.) class_tokens: 2 adds TIPS's second one, for
    `objectives.contrastive.second`; it starts as the first, and such a model opens here alone, not in open_clip.
    """

    model: str | None = None
    custom: dict[str, Any] | None = None
    pretrained: str | None = None
    quick_gelu: bool | None = None
    image_size: int | None = Field(default=None, ge=8)
    context_length: int | None = Field(default=None, ge=3)
    patch_dropout: float = Field(default=0.0, ge=0, lt=1)
    unmasked_tail: float = Field(default=0.05, ge=0, le=1)
    class_tokens: Literal[1, 2] = 1

    @model_validator(mode="after")
    def _one_source(self) -> "TowerConfig":
        if (self.model is None) == (self.custom is None):
            raise ValueError("give exactly one of model (a name) and custom (an open_clip model config)")
        return self
