"""Pictures a second of transfer, training and prediction, beside the bare model on batches at hand: what reading, cutting and
bookkeeping cost.

    python benchmarks/transfer_speed.py [--encoder scratch:vit-tiny-112] [--size 224] [--steps 12] [--tasks segment,depth,…]

Every task trains `--steps` steps of 8 scenes of `--size` pixels, and predicts as many pictures, in turns with the bare model:
the same model and loss and optimiser on one batch made beforehand, and its forward pass on one stack of pictures. Turns are taken
`--rounds` times and the medians told. 1.10 is a tenth slower than the bare model.
"""

import argparse
import statistics
import time
from typing import Any

import torch

from cutline.towers.store import load_encoder
from cutline.transfer import classify, depth, detect, loop, segment
from cutline.transfer.data import open_data

BATCH = 8
TASKS: dict[str, Any] = {
    "segment": (segment, segment.SegmentConfig, {"scale": (0.5, 2.0)}),
    "depth": (depth, depth.DepthConfig, {"scale": (0.8, 1.5)}),
    "classify": (classify, classify.ClassifyConfig, {}),
    "detect": (detect, detect.DetectConfig, {}),
}


class Timed:
    """Seconds of the steps of a training after the first, as they come, or all on the batch of the second."""

    def __init__(self, bare: bool) -> None:
        self.bare, self.times = bare, []
        self.step, self.train = loop._Run.step, loop.train

    def __enter__(self) -> "Timed":
        timed = self

        def train(model: Any, prepared: Any, batches: Any, *rest: Any) -> None:
            def again(start: int, stop: int) -> Any:
                batch = next(iter(batches(start, start + 1)))
                return iter([batch] * (stop - start))

            timed.train(model, prepared, again if timed.bare else batches, *rest)

        def step(run: Any, *arguments: Any) -> float:
            loss = timed.step(run, *arguments)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            timed.times.append(time.perf_counter())
            return loss

        loop._Run.step = step  # type: ignore[method-assign]
        for module in (loop, detect):
            module.train = train  # type: ignore[attr-defined]
        from cutline.transfer import finetune

        finetune.train = train  # type: ignore[attr-defined]
        return self

    def __exit__(self, *_: object) -> None:
        from cutline.transfer import finetune

        loop._Run.step = self.step  # type: ignore[method-assign]
        for module in (loop, detect, finetune):
            module.train = self.train  # type: ignore[attr-defined]

    def seconds(self) -> float:
        """Of one step: from the end of the first on, so that what is made ahead is not free."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def bare_prediction(module: Any, model: Any, images: list[Any]) -> float:
    """Seconds a picture of the model itself, on pictures that are at hand on its device."""
    device = next(model.parameters()).device
    stack = torch.stack([torch.from_numpy(i) for i in images]).permute(0, 3, 1, 2).contiguous().to(device)
    model.eval()
    begun = time.perf_counter()
    with torch.inference_mode():
        if module is detect:
            model(list(stack.float() / 255))
        elif module is classify:
            model.logits(stack)
        else:
            model.look()(model, stack) if module is segment else depth.look(model.config)(model, stack)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / len(images)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--encoder", default="scratch:vit-tiny-112")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", default=",".join(TASKS))
    args = parser.parse_args()
    encoder, pictures = load_encoder(args.encoder), args.steps * BATCH
    for name in args.tasks.split(","):
        module, kind, options = TASKS[name]
        data = open_data(f"scenes:n={max(240, 2 * pictures)},size={args.size},seed=1,objects=24", name)
        config = kind(**options, batch=BATCH, steps=args.steps, split="val", pictures=pictures)
        train = data.split("train")
        for row in range(len(train)):
            train.read(row)  # in memory, as after the first epoch: how long scenes take to draw is not the question
        seconds: dict[str, list[float]] = {"train": [], "bare step": [], "predict": [], "bare forward": []}
        for _ in range(args.rounds):
            for bare in (False, True):
                with Timed(bare) as timed:
                    model = module.fit(encoder, data, config)
                seconds["bare step" if bare else "train"].append(timed.seconds() / BATCH)
            module.score(model, data)  # in memory now, too
            begun = time.perf_counter()
            module.score(model, data)
            seconds["predict"].append((time.perf_counter() - begun) / pictures)
            split = data.split("val")
            images = [split.read(i).image for i in range(BATCH)]
            seconds["bare forward"].append(
                statistics.fmean(bare_prediction(module, model, images) for _ in range(args.steps))
            )
        middle = {what: statistics.median(values) for what, values in seconds.items()}
        print(
            f"{name}: training {1 / middle['train']:.1f} pictures/s, {middle['train'] / middle['bare step']:.2f} × the bare step; "
            f"scoring {1 / middle['predict']:.1f} pictures/s, {middle['predict'] / middle['bare forward']:.2f} × the bare forward",
            flush=True,
        )


if __name__ == "__main__":
    main()
