"""One training step of ours beside open_clip's own, in turns, with equal weights, pictures and captions.

Theirs is the step of `open_clip_train`: the model on pictures and captions padded to the context, `ClipLoss`, backward,
`AdamW` with its defaults, clamp of the logit scale. Ours is what `cutline train` does: captions trimmed to the longest
in multiples of 8 where the text tower allows it, the last block of open_clip's own transformers finished for the pooled
token alone, the contrastive objective, and the fused AdamW. The step of `cutline train` also clips gradients, which
`open_clip_train` does only when asked; neither does here.

    python benchmarks/train_step.py --model ViT-B-32 --batch 32 --steps 5

Prints seconds a step, the ratio, where our time and theirs go, and how far the text embeddings are apart at the start.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import open_clip
import torch
from torch import Tensor, nn

from cutline import towers
from cutline.objectives import build as build_objective
from cutline.objectives import config_class
from cutline.objectives.base import Batch, Features, Texts
from cutline.train.optim import param_groups

WORDS = ("brown", "dog", "beach", "two", "small", "red", "ball", "near", "tall", "green", "tree", "wet")


def captions(n: int, tokens: int) -> list[str]:
    """Captions of `tokens` tokens each, start and end included (each word is one)."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (n, tokens - 2), generator=generator)
    return [" ".join(WORDS[i] for i in row) for row in picks]


class Theirs:
    """The step of open_clip_train (train_one_epoch, single process, no gradient clipping)."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.model, self.loss = model.train(), open_clip.ClipLoss()
        plain = [p for n, p in model.named_parameters() if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n]
        plain_ids = {id(p) for p in plain}
        rest = [p for p in model.parameters() if id(p) not in plain_ids]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.2}]
        self.optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6)

    def image(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images, normalize=True)

    def text(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens, normalize=True)

    def contrast(self, image: Tensor, text: Tensor) -> Tensor:
        return self.loss(image, text, self.model.logit_scale.exp())

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        image, text, scale, *_ = self.model(images, tokens)
        return self.loss(image, text, scale)

    def update(self) -> None:
        self.optimiser.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, 4.6052)
        self.optimiser.zero_grad()


class Ours(Theirs):
    """The step of `cutline train`."""

    def __init__(self, model: towers.Model, lr: float) -> None:
        self.model = model.train()
        self.trim = towers.Tokenizer(model).trimmed
        self.objective = build_objective("contrastive", config_class("contrastive")(), model)
        groups = param_groups(model, lr, weight_decay=0.2)
        self.optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def text(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(self.trim(tokens), normalize=True)

    def contrast(self, image: Tensor, text: Tensor) -> Tensor:
        n = len(image)
        batch = Batch({"image": image}, {"text": Texts(torch.zeros(n, 1), torch.arange(n))})
        features = Features(self.model, batch)
        features._cache = {("image", "image"): image, ("text", "text"): text}
        return sum(self.objective(batch, features).values())

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        batch = Batch({"image": images}, {"text": Texts(self.trim(tokens), torch.arange(len(images)))})
        return sum(self.objective(batch, Features(self.model, batch)).values())


def whole(step: Theirs, images: Tensor, tokens: Tensor) -> float:
    """Seconds of one step."""
    begun = time.perf_counter()
    step.forward(images, tokens).backward()
    step.update()
    return time.perf_counter() - begun


def parts(step: Theirs, images: Tensor, tokens: Tensor) -> dict[str, float]:
    """Seconds of one step by part, each with its own backward pass."""
    spent: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Tensor | None]) -> Tensor | None:
        begun = time.perf_counter()
        result = call()
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - begun
        return result

    image = timed("image tower", lambda: step.image(images))
    text = timed("text tower", lambda: step.text(tokens))
    heads = [image.detach().requires_grad_(), text.detach().requires_grad_()]
    timed("loss", lambda: step.contrast(*heads).backward())
    timed("image tower", lambda: image.backward(heads[0].grad))
    timed("text tower", lambda: text.backward(heads[1].grad))
    timed("optimiser", step.update)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip architecture")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each; one more warms up")
    parser.add_argument("--tokens", type=int, default=15, help="of each caption, start and end included")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ours = towers.build(towers.TowerConfig(model=options.model))
    theirs = open_clip.create_model(options.model)
    theirs.load_state_dict({k: v.clone() for k, v in copy.deepcopy(ours.state_dict()).items()})
    size = ours.visual.preprocess_cfg["size"]
    images = torch.randn(options.batch, 3, size, size)
    tokenizer = towers.Tokenizer(ours)
    tokens = tokenizer(captions(options.batch, options.tokens))
    with torch.no_grad():
        a = ours.eval().encode_text(tokenizer.trimmed(tokens), normalize=True)
        b = theirs.eval().encode_text(tokens, normalize=True)
    steps = {"ours": Ours(ours, 1e-5), "open_clip": Theirs(theirs, 1e-5)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(options.steps + 1):
        for name, step in steps.items():
            taken = whole(step, images, tokens)
            if i:
                seconds[name].append(taken)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    width = tuple(tokenizer.trimmed(tokens).shape)[1]
    print(f"{options.model}, batch {options.batch}, {size} px, fp32, {torch.get_num_threads()} threads, captions of "
          f"{options.tokens} tokens in {tokens.shape[1]} (ours: {width}), median of {options.steps} steps")  # fmt: skip
    for name, median in medians.items():
        spent = parts(steps[name], images, tokens)
        print(f"  {name:10} {median:7.3f} s   " + "  ".join(f"{k} {v:.3f}" for k, v in spent.items()))
    print(f"  ratio      {medians['open_clip'] / medians['ours']:7.2f}")
    print(f"  text embeddings differ by at most {float((a - b).abs().max()):.1e}")


if __name__ == "__main__":
    main()
