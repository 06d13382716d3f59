"""Zero-shot segmentation beside the bare forwards of its windows, which is what cannot be saved.

    python benchmarks/zeroshot_segment.py [--model scratch:ViT-B-16] [--methods sclip,surgery,…] [--height 336] [--width 448]

Times one picture after the other, its windows in one batch, in turns with the tower's own forward of the same windows in one
batch, `--rounds` times, and tells the fastest of both and their ratio; on the CPU in processor time, which other processes do not
change. Weights are random: the cost does not depend on them. The text
classifier is made before, as it is kept on disk.
"""

import argparse
import time

import numpy as np
import torch

from cutline import towers
from cutline.train.device import device_of
from cutline.transfer.targets import class_names
from cutline.zeroshot.readable import readable
from cutline.zeroshot.segment import SegmentConfig, WordSegmenter


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="scratch:ViT-B-16")
    parser.add_argument("--methods", default="plain,maskclip,sclip,surgery,naclip,clearclip")
    parser.add_argument("--classes", default="voc", help="a public data set: voc, context, cocostuff, ade20k")
    parser.add_argument("--height", type=int, default=336)
    parser.add_argument("--width", type=int, default=448)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = device_of("auto")
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    model, names = towers.load(args.model, device).eval(), readable(class_names(args.classes))
    image = np.random.default_rng(0).integers(0, 256, (args.height, args.width, 3), dtype=np.uint8)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for method in args.methods.split(","):
        words = WordSegmenter(model, names, SegmentConfig(method=method, prompts="name", batch=64))
        rows, columns = words._starts(torch.empty(words._size(torch.empty(3, args.height, args.width))))
        windows = len(rows) * len(columns)
        size = words.config.window or 0
        batch = torch.randn(windows, 3, size, size, device=device)
        seconds: dict[str, list[float]] = {"segment": [], "bare": []}
        for turn in range(args.rounds + 1):
            begun = clock()
            words.predict([image])
            wait()
            middle = clock()
            with torch.inference_mode():
                model.visual(batch)
            wait()
            if turn:  # the first warms up
                seconds["segment"].append(middle - begun)
                seconds["bare"].append(clock() - middle)
        ours, bare = (min(seconds[k]) for k in ("segment", "bare"))
        print(
            f"{method}: {ours * 1000:.1f} ms a picture of {args.height}×{args.width} in {windows} windows, {len(words.words.owners)} "
            f"names; the windows alone {bare * 1000:.1f} ms; {ours / bare:.3f} ×",
            flush=True,
        )


if __name__ == "__main__":
    main()
