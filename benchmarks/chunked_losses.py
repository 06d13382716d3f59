"""Memory and time of the losses over all pairs: in chunks of rows, in one piece, and open_clip's, value and gradient.

Each case runs in a process of its own, which makes the features (B, D), float32 and L2-normalised, and then does the loss
and its backward pass once. Memory is the peak of that process (on a GPU, of torch's allocations) beyond the one that only
makes the features (for `distill` also those of two teachers, each as wide as one and a half students); it includes their gradients,
2 · 4 · B · D bytes, without which there is nothing to go on with.

    python benchmarks/chunked_losses.py --batch 8192 32768 --most 8192

Prints GiB and seconds, and the ratios to chunks. --most: the largest batch for forms that hold a matrix of all pairs.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch import Tensor

from cutline.objectives import distill
from cutline.objectives.base import Batch, Features, Texts
from cutline.objectives.contrastive import paired_loss
from cutline.objectives.sigmoid import sigmoid_loss

FORMS = ("chunks", "one piece", "open_clip")


class Made(Features):
    """Features that are there."""

    def __init__(self, image: Tensor, text: Tensor) -> None:
        super().__init__(None, Batch({}, {}))
        self._cache = {("image", "image"): image, ("text", "text"): text}

    def logit_scale(self) -> Tensor:
        return self.image().new_tensor(1 / 0.07)


def taught(batch: int, width: int, device: str) -> dict[str, Any]:
    """What two teachers say of the batch, as `train.stream.replay` gives it."""
    torch.manual_seed(1)
    teachers = [SimpleNamespace(width=width * 3 // 2, logit_scale=100.0)] * 2
    said = [torch.empty(batch, 3 * width, device=device).normal_() for _ in range(2)]
    return {distill.IMAGE: said[0], f"{distill.TEXT}/text": said[1], distill.TEACHERS: teachers}


def losses(method: str, form: str, chunk: int, columns: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of pictures and texts (B, D), by method and form."""
    rows = chunk if form == "chunks" else None

    def sigmoid(image: Tensor, text: Tensor) -> Tensor:
        t, owners = image.new_tensor(10.0), torch.arange(len(image), device=image.device)
        if form == "open_clip":
            loss: Tensor = SigLipLoss()(image, text, t, -t)
            return loss
        return sigmoid_loss(image, text, owners, t, -t, True, rows)[0]

    def contrastive(image: Tensor, text: Tensor) -> Tensor:
        t = image.new_tensor(1 / 0.07)
        if form == "open_clip":
            loss: Tensor = ClipLoss()(image, text, t)
            return loss
        return paired_loss(image, text, t, None, rows)[0]

    def distilled(image: Tensor, text: Tensor) -> Tensor:
        n, t = len(image), image.new_tensor(1 / 0.07)
        given = {k: v if k == distill.TEACHERS else v[:n] for k, v in columns.items()}
        if form == "open_clip":  # which knows one teacher: both together are one
            told = [torch.nn.functional.normalize(given[k], dim=1) for k in (distill.IMAGE, f"{distill.TEXT}/text")]
            loss: Tensor = DistillClipLoss()(image, text, t, *told, 100.0)[1]
            return loss
        texts = Texts(text, torch.arange(n, device=image.device))
        objective = distill.Objective(distill.Config(chunk=rows), None)  # type: ignore[arg-type]
        return objective(Batch({}, {"text": texts}, given), Made(image, text))["text"]

    return {"sigmoid": sigmoid, "contrastive": contrastive, "distill": distilled}[method]


def case(batch: int, width: int, device: str, loss: Callable[[Tensor, Tensor], Tensor] | None) -> dict[str, float]:
    """Peak GiB of this process, seconds, and what to compare: the value and the norm of the gradient."""
    torch.manual_seed(0)
    features = [torch.empty(batch, width, device=device).normal_() for _ in range(2)]
    for x in features:
        x.div_(x.norm(dim=1, keepdim=True)).requires_grad_()
    small = [x.detach()[:64].clone().requires_grad_() for x in features]
    (loss or (lambda a, b: (a @ b.T).sum()))(*small).backward()  # what libraries take when first called
    found = {"value": 0.0, "gradient": 0.0}
    begun = time.perf_counter()
    if loss is not None:
        value = loss(*features)
        value.backward()
        found = {"value": value.item(), "gradient": float(features[0].grad.norm())}
    found["seconds"] = time.perf_counter() - begun
    gpu = device.startswith("cuda")
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found | {"gib": peak / 2**30}


def measure(options: argparse.Namespace, batch: int, method: str, form: str) -> dict[str, float]:
    """`case` in a process of its own."""
    arguments = [
        "--case",
        method,
        form,
        "--batch",
        str(batch),
        "--width",
        str(options.width),
        "--chunk",
        str(options.chunk),
    ]
    arguments += ["--threads", str(options.threads), "--device", options.device]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method}, {form}, batch {batch} failed: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--most", type=int, default=8192, help="the largest batch of forms that hold all pairs at once")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--method", nargs="+", default=["sigmoid", "contrastive", "distill"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case:
        method, form = options.case
        columns = taught(options.batch[0], options.width, options.device) if method == "distill" else {}
        loss = None if form == "features" else losses(method, form, options.chunk, columns)
        print(json.dumps(case(options.batch[0], options.width, options.device, loss)))
        return
    print(f"float32, D = {options.width}, chunks of {options.chunk} rows, {options.threads} threads, {options.device}")
    for batch in options.batch:
        for method in options.method:
            floor = measure(options, batch, method, "features")["gib"]
            forms = FORMS if batch <= options.most else FORMS[:1]
            found = {form: measure(options, batch, method, form) for form in forms}
            ours = found["chunks"]
            for form, f in found.items():
                gib = f["gib"] - floor
                print(f"  {method:12} B = {batch:6,}  {form:10} {gib:6.2f} GiB  {f['seconds']:7.2f} s   "
                      f"× {gib / (ours['gib'] - floor):5.2f} memory, × {f['seconds'] / ours['seconds']:4.2f} time   "
                      f"value {f['value']:.6f}  |gradient| {f['gradient']:.6e}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
