"""Tiny experts of transformers with random weights, saved as real ones are, and a table of pictures of several shapes."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from reinforce_made import rows

from cutline.pairs import Pairs, create_from_rows

NAMES = {0: "wall", 1: "floor", 2: "tree", 3: "car", 4: "sky"}
STAGES: dict[str, Any] = {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2],
                          "decoder_hidden_size": 16, "initializer_range": 0.3}  # fmt: skip


def segformer(folder: Path) -> Path:
    config = hf.SegformerConfig(**STAGES, id2label=NAMES)
    eye = hf.SegformerImageProcessor(size={"height": 64, "width": 64}, do_reduce_labels=True)
    return _saved(hf.SegformerForSemanticSegmentation, config, eye, folder)


def glpn(folder: Path) -> Path:
    """Depth in metres, from pictures of their own size rounded to 32 pixels."""
    return _saved(hf.GLPNForDepthEstimation, hf.GLPNConfig(**STAGES, max_depth=10), hf.GLPNImageProcessor(), folder)


def dpt(folder: Path) -> Path:
    """Relative depth."""
    config = hf.DPTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8, initializer_range=0.3,
    )  # fmt: skip
    return _saved(hf.DPTForDepthEstimation, config, hf.DPTImageProcessor(size={"height": 32, "width": 32}), folder)


def maskformer(folder: Path) -> Path:
    swin = hf.SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, image_size=64,
                         out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    detr = hf.DetrConfig(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                         encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=6)  # fmt: skip
    config = hf.MaskFormerConfig(
        backbone_config=swin, decoder_config=detr, fpn_feature_size=32, mask_feature_size=32, id2label=NAMES
    )
    eye = hf.MaskFormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    return _saved(hf.MaskFormerForInstanceSegmentation, config, eye, folder)


def _saved(kind: Any, config: Any, processor: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def table(path: Path, n: int = 12) -> Pairs:
    """Landscape, portrait, JPEG and PNG; the JPEG of row 7 is cut off."""
    made = rows(n)
    made[7]["image"] = made[7]["image"][: len(made[7]["image"]) // 2]
    create_from_rows(path, made)
    return Pairs.open(path)
