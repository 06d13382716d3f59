"""Our captioner on Flickr8k beside the caption of the nearest photo: `python benchmarks/captioner_flickr8k.py FOLDER`.

FOLDER holds Flickr8k as webdataset shards whose JSON members have the five `captions`. The captioner learns from scratch
from the first 3,000 photos, the next 300 choose its best step, and nothing of the last 500 is seen before they are
scored. The neighbour's caption is the first one of the photo among the 3,000 that is nearest by the cosine of (a) the
captioner's own image embedding, (b) a colour histogram (8 bins a channel); (c) is any photo, drawn with a seed. All are
scored with BLEU-4 and CIDEr-D against all five references.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cutline import towers
from cutline.captions.captioner import CaptionerConfig, train_captioner
from cutline.captions.coca import CocaWriter
from cutline.captions.engine import RunConfig, run
from cutline.captions.work import Failed, picture_of
from cutline.config import load
from cutline.metrics.captions import bleu_4, cider_d
from cutline.pairs import Pairs, Provenance, create
from cutline.towers.pictures import test_transform

LEARN, CHOOSE, TEST = 3000, 300, 500


def table(folder: Path, path: Path) -> Pairs:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        create(path, [f"{folder}/*.tar"], alt="txt", captions="json:captions")
    pairs = Pairs.open(path)
    if "caption_human" not in pairs.columns:
        good = {r["key"] for r in pairs.read(range(LEARN + CHOOSE), ["key"])}
        pairs = pairs.add_column(
            "caption_human", lambda rows: [r["captions"] if r["key"] in good else None for r in rows],
            columns=["key", "captions"], type="list<string>", provenance=Provenance(how="first photos", inputs=["captions"]),
        )  # fmt: skip
    return pairs


def vectors(pairs: Pairs, rows: range, model: Any) -> dict[str, torch.Tensor]:
    """L2-normalised image embeddings and colour histograms, (N, D) each."""
    transform = test_transform(model)
    found: dict[str, list[torch.Tensor]] = {"embedding": [], "histogram": []}
    for start in range(rows.start, rows.stop, 100):
        pictures = [picture_of(r) for r in pairs.read(range(start, min(start + 100, rows.stop)), ["key", "image"])]
        assert not any(isinstance(p, Failed) for p in pictures)
        with torch.no_grad():
            images = torch.stack([transform(p) for p in pictures])
            found["embedding"].append(model.encode_image(images, normalize=True))
        for p in pictures:
            flat = (np.asarray(p).reshape(-1, 3) // 32).astype(np.int64) @ [64, 8, 1]
            found["histogram"].append(torch.from_numpy(np.bincount(flat, minlength=512).astype(np.float32))[None])
    return {name: torch.nn.functional.normalize(torch.cat(parts), dim=1) for name, parts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/captioner-flickr8k"))
    parser.add_argument("overrides", nargs="*", help="of the captioner, key=value")
    options = parser.parse_intermixed_args()
    pairs = table(options.folder, options.out / "pairs.lance")
    # The alt text of these shards is one of the captions: it must not teach anything about the photos held back.
    config = load(CaptionerConfig, None, ["also=[]", f"held_out={CHOOSE / (LEARN + CHOOSE)}", *options.overrides])
    result = train_captioner(pairs, "caption_human", options.out / "captioner", config, resume=True)
    print(json.dumps(result.metrics, indent=2))
    writer = CocaWriter(str(options.out / "captioner"), "ours")
    if "ours" not in pairs.columns:
        pairs, _ = run(pairs, writer, "ours", RunConfig(batch=100))
    model = towers.load(str(options.out / "captioner")).eval()
    held = range(len(pairs) - TEST, len(pairs))
    tests = pairs.read(held, ["ours", "captions"])
    known = pairs.read(range(LEARN), ["captions"])
    references = [r["captions"] for r in tests]
    written = {"our captioner": [r["ours"] or "" for r in tests]}
    mine, theirs = vectors(pairs, held, model), vectors(pairs, range(LEARN), model)
    for name in mine:
        nearest = (mine[name] @ theirs[name].T).argmax(dim=1).tolist()
        written[f"nearest photo, {name}"] = [known[i]["captions"][0] for i in nearest]
    drawn = np.random.default_rng(0).integers(0, LEARN, TEST)
    written["any photo"] = [known[i]["captions"][0] for i in drawn]
    shown = Table("caption", "BLEU-4, %", "CIDEr-D", "different captions")
    for name, captions in written.items():
        scores = 100 * bleu_4(captions, references), cider_d(captions, references)
        shown.add_row(name, f"{scores[0]:.1f}", f"{scores[1]:.3f}", f"{len(set(captions))}")
    Console().print(shown)
    for row in range(0, TEST, TEST // 8):
        print("; ".join(f"{name}: {captions[row]}" for name, captions in written.items()))


if __name__ == "__main__":
    main()
