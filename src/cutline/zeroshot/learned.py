"""A learned prompt: vectors in place of words before every class name, through the frozen text tower.

    text of a class = tower([start] v_1 … v_16 [name] . [end]);   loss = CE(softmax(100 · cos(crop, text)), class)

CoOp (2109.01134) on regions, as ZSSeg has it (2112.14757, section 3.3): crops are of the seen classes' own masks in the
training pictures, SGD trains the vectors alone, and unseen names go behind the same vectors.
"""

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from cutline import towers
from cutline.config import Config
from cutline.errors import ConfigError
from cutline.progress import progress
from cutline.train.optim import schedule, set_lr
from cutline.transfer.data import Split
from cutline.zeroshot.embedded import embedding_of, encode_with, first_place
from cutline.zeroshot.regions import SCALE, Regions

MOMENTUM, POWER = 0.9, 0.9
STD = 0.02  # of the vectors at the start


class LearnConfig(Config):
    """tokens: vectors before each name; steps, batch (crops), lr, weight_decay: of SGD, whose rate falls to 0."""

    tokens: int = Field(16, ge=1)
    steps: int = Field(10_000, ge=1)
    batch: int = Field(32, ge=1)
    lr: float = Field(0.02, gt=0)
    weight_decay: float = Field(5e-4, ge=0)


class Prefix:
    """The texts of some classes behind `tokens` vectors. Raises `CutlineError` where the context is too short."""

    def __init__(self, model: towers.Model, names: Sequence[str], tokens: int) -> None:
        self.model, self.embedding = model, embedding_of(model)
        tokenizer = towers.Tokenizer(model)
        texts = [f"{name}." for name in names]
        if max(tokenizer.lengths(texts)) + tokens > tokenizer.context:
            raise ConfigError(
                f"learn.tokens={tokens} leaves no room for the class names in this model's context. Lower it."
            )
        ids, self.first = tokenizer(texts), first_place(tokenizer)
        anything = ids[0, self.first].expand(len(ids), tokens)  # vectors go in its place
        ids = torch.cat([ids[:, : self.first], anything, ids[:, self.first : tokenizer.context - tokens]], 1)
        self.ids = tokenizer.trimmed(ids).to(self.embedding.weight.device)

    def __call__(self, vectors: Tensor) -> Tensor:
        """vectors (tokens, W) → unit vectors (names, D), differentiably."""
        return encode_with(self.model, self.ids, vectors[None], self.first).float()


def learn(
    regions: Regions,
    config: LearnConfig,
    names: Sequence[str],
    seen: Tensor,
    split: Split,
    rows: Sequence[int],
    seed: int,
) -> Tensor:
    """Vectors (tokens, W) learned from crops of the seen classes of `rows`; names: of all classes, seen (K,) which they are."""
    features, labels = _crops(regions, split, rows, config.steps * config.batch, seed)
    prefix = Prefix(regions.clip, [n for n, known in zip(names, seen.tolist()) if known], config.tokens)
    device = prefix.ids.device
    place = torch.where(seen, seen.long().cumsum(0) - 1, -1)
    features, labels = features.to(device), place[labels].to(device)
    random = torch.Generator().manual_seed(seed)
    width = prefix.embedding.embedding_dim
    vectors = nn.Parameter((STD * torch.randn(config.tokens, width, generator=random)).to(device))
    optimiser = torch.optim.SGD([vectors], config.lr, MOMENTUM, weight_decay=config.weight_decay)
    with progress("learning the prompt", config.steps, "steps") as tick:
        for step in range(config.steps):
            set_lr(optimiser, config.lr * schedule(step, config.steps, kind="poly", power=POWER))
            chosen = torch.randint(len(features), (config.batch,), generator=random).to(device)
            logits = SCALE * features[chosen] @ prefix(vectors).T
            loss = F.cross_entropy(logits, labels[chosen])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            tick(1, f"loss {loss.item():.3f}")
    return vectors.detach().cpu()


def _crops(regions: Regions, split: Split, rows: Sequence[int], most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Embeddings (n, D) and classes (n,) of the seen masks of pictures in random order, until there are `most`."""
    features, labels, count = [], [], 0
    order = np.random.default_rng([seed, 3]).permutation(len(rows)).tolist()
    with progress("embedding regions", len(rows), "pictures") as tick:
        for place in order:
            sample = split.read(rows[place])
            target = torch.from_numpy(sample.target).long()
            classes = target.unique()  # type: ignore[no-untyped-call]
            classes = classes[classes >= 0]
            image = torch.from_numpy(sample.image).permute(2, 0, 1)
            features.append(regions.embed(image, target == classes[:, None, None]).cpu())
            labels.append(classes)
            count += len(classes)
            tick()
            if count >= most:
                break
    return torch.cat(features), torch.cat(labels)
