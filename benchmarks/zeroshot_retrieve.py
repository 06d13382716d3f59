"""How long recall takes beyond the embeddings: 25,000 texts of 5,000 pictures, beside two plain ways.

    python benchmarks/zeroshot_retrieve.py [--pictures 5000] [--texts 5] [--width 512]

Embeddings are made up. "whole matrix" keeps all similarities and which of them are right, and sorts out the ten best of each
row and column; "one-hot" is how CLIP_benchmark counts (the matrix of all similarities, and one-hot vectors of the ten best, 64
rows at a time). Each runs in a process of its own. Prints processor seconds, the most memory beyond the embeddings, and what
they are of ours; and the largest difference of a recall.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cutline.zeroshot.retrieve import KS, recall

Way = Callable[[Tensor, Tensor, Tensor], dict[str, float]]


def whole_matrix(image: Tensor, text: Tensor, owners: Tensor) -> dict[str, float]:
    similarity, right = image @ text.T, owners[None] == torch.arange(len(image))[:, None]
    out = {}
    for way, scores, truth in (("i2t", similarity, right), ("t2i", similarity.T, right.T)):
        hits = truth.gather(1, scores.topk(max(KS), dim=1).indices)
        out |= {f"{way}_r{k}": hits[:, :k].any(1).double().mean().item() for k in KS}
    return out


def one_hot(image: Tensor, text: Tensor, owners: Tensor) -> dict[str, float]:
    similarity, right = text @ image.T, owners[:, None] == torch.arange(len(image))[None]
    out = {}
    for way, scores, truth in (("i2t", similarity.T, right.T), ("t2i", similarity, right)):
        for k in KS:
            hits = []
            for s, t in zip(scores.split(64), truth.split(64)):
                best = F.one_hot(s.topk(k, dim=1).indices, s.shape[1])
                hits.append((t[:, None] * best).sum((1, 2)) > 0)
            out[f"{way}_r{k}"] = torch.cat(hits).double().mean().item()
    return out


def measured(
    way: Way, args: argparse.Namespace, results: "multiprocessing.Queue[tuple[float, float, dict[str, float]]]"
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    image = F.normalize(torch.randn(args.pictures, args.width), dim=1)
    owners = torch.arange(args.pictures).repeat_interleave(args.texts)
    text = F.normalize(image[owners] + 0.35 * torch.randn(len(owners), args.width), dim=1)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = way(image, text, owners)
    seconds = time.process_time() - begun
    results.put((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, found))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--texts", type=int, default=5)
    parser.add_argument("--width", type=int, default=512)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found: dict[str, tuple[float, float, dict[str, float]]] = {}
    for name, way in (("cutline", recall), ("whole matrix", whole_matrix), ("one-hot", one_hot)):
        results = context.Queue()
        process = context.Process(target=measured, args=(way, args, results))
        process.start()
        found[name] = results.get()
        process.join()
    ours = found["cutline"]
    print(f"{args.pictures} pictures with {args.texts} texts each, {args.width} numbers")
    for name, (seconds, memory, _) in found.items():
        print(f"{name}: {seconds:.1f} s ({seconds / ours[0]:.2f} of ours), {memory:.0f} MB")
    difference = max(abs(r[k] - ours[2][k]) for _, _, r in found.values() for k in ours[2])
    print(
        f"largest difference of a recall {difference:.1e}; ours: {', '.join(f'{k} {v:.3f}' for k, v in ours[2].items())}"
    )


if __name__ == "__main__":
    main()
