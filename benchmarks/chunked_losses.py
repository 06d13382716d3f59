"""Memory and time of the losses over all pairs: in chunks of rows, in one piece, and open_clip's, value and gradient.

Each case runs in a process of its own, which makes the features (B, D), float32 and L2-normalised, and then does the loss
and its backward pass once. Memory is the peak of that process (on a GPU, of torch's allocations) beyond the one that only
makes the features; it includes their gradients, 2 · 4 · B · D bytes, without which there is nothing to go on with.

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

import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from cutline.objectives.contrastive import paired_loss
from cutline.objectives.sigmoid import sigmoid_loss

FORMS = ("chunks", "one piece", "open_clip")


def losses(method: str, form: str, chunk: int) -> Callable[[Tensor, Tensor], Tensor]:
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

    return {"sigmoid": sigmoid, "contrastive": contrastive}[method]


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
    parser.add_argument("--method", nargs="+", default=["sigmoid", "contrastive"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case:
        method, form = options.case
        loss = None if form == "features" else losses(method, form, options.chunk)
        print(json.dumps(case(options.batch[0], options.width, options.device, loss)))
        return
    print(f"float32, D = {options.width}, chunks of {options.chunk} rows, {options.threads} threads, {options.device}")
    for batch in options.batch:
        floor = measure(options, batch, options.method[0], "features")["gib"]
        for method in options.method:
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
