"""How long zero-shot classification takes: ImageNet's 1,000 classes in 80 prompts, the first time and the second, beside
open_clip's `build_zero_shot_classifier` and a loop over a DataLoader.

    python benchmarks/zeroshot_classify.py [--model vit-tiny-64] [--classes 1000] [--pictures 1000]

The model is random, the pictures are JPEGs of noise (300 × 400 pixels) in folders of classes. Prints seconds and processor seconds
of each, ratios of the latter (a shared machine's clock says little), how far the top-1 of open_clip's loop lies from ours, and
the most memory used.
"""

import argparse
import os
import resource
import tempfile
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from cutline import towers
from cutline.towers.pictures import test_transform
from cutline.zeroshot.classify import ClassifyConfig, classify
from cutline.zeroshot.prompts import class_names, prompts


def spent() -> np.ndarray:
    """Seconds on the clock, and of processors in this process and those it has waited for."""
    times = os.times()
    return np.array([times.elapsed, times.user + times.system + times.children_user + times.children_system])


def write(root: Path, classes: int, pictures: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(max(classes, pictures)):
        folder = root / "test" / f"n{i % classes:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        if i < pictures:
            small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
            small.resize((400, 300)).save(folder / f"{i}.jpg", quality=90)


@torch.no_grad()
def theirs(model: towers.Model, root: Path, names: list[str], batch: int) -> tuple[np.ndarray, np.ndarray, float]:
    """What the classifier and the pictures took, and top-1, as open_clip's own zero-shot evaluation does it."""
    begun = spent()
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    weights = open_clip.build_zero_shot_classifier(
        model, tokenizer, names, open_clip.OPENAI_IMAGENET_TEMPLATES, device=next(model.parameters()).device
    )
    ready = spent()
    hits = count = 0
    data = ImageFolder(str(root / "test"), test_transform(model), allow_empty=True)
    for images, truth in DataLoader(data, batch, num_workers=min(8, os.cpu_count() or 1)):
        x = model.encode_image(images.to(weights.device), normalize=True)
        hits += int(((100 * x @ weights).argmax(1).cpu() == truth).sum())
        count += len(truth)
    return ready - begun, spent() - ready, hits / count


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="vit-tiny-64")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = towers.load(f"scratch:{args.model}", args.device)
    names = [name for name, *_ in class_names("imagenet")[: args.classes]]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        write(root, args.classes, args.pictures)
        os.environ["CUTLINE_CACHE"] = str(Path(folder) / "cache")
        chosen = "imagenet" if args.classes == 1000 else names
        config = ClassifyConfig(names=chosen, prompts="openai", batch=args.batch, device=args.device)
        seconds, top1 = [], 0.0
        for _ in range(2):
            begun = spent()
            top1 = classify(model, f"imagefolder:{root}", config).metrics["top1"]
            seconds.append(spent() - begun)
        texts, pictures, other = theirs(model, root, names, args.batch)
    print(
        f"{args.model} on {args.device}: {args.classes} classes × {len(prompts('openai'))} prompts, {args.pictures} pictures"
    )
    whole = texts + pictures
    for name, (clock, processor) in {
        "cutline, first": seconds[0], "cutline, second": seconds[1], "open_clip, classifier": texts,
        "open_clip, pictures": pictures, "open_clip": whole,
    }.items():  # fmt: skip
        print(f"{name}: {clock:.1f} s, {processor:.1f} s of processors ({processor / whole[1]:.3f} of open_clip's)")
    print(
        f"top-1 differs by {abs(top1 - other):.1e}; at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB"
    )


if __name__ == "__main__":
    main()
