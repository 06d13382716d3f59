"""A classifier of words: the embedding of every class name, averaged over the prompts (2103.00020, section 3.1.4).

    w = normalize(Σ_prompts normalize(text(prompt with the name)))          (CLIP's prompt ensemble)

Embeddings are kept on disk, by a hash of the text tower, its tokeniser, the names and the prompts: 1,000 names in 80 prompts
are 80,000 texts. `CUTLINE_CACHE` moves the folder, which is `~/.cache/cutline`; any file there can be deleted.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F

from cutline import towers
from cutline.errors import CutlineError
from cutline.objectives.gather import of_all, own_share, same_on_all, together, world
from cutline.progress import progress
from cutline.record import fingerprint, fingerprint_of, write_atomic
from cutline.zeroshot.prompts import Names

BATCH = 512  # texts a step


@dataclass
class TextClassifier:
    """weights (M, D): a unit vector a name; owners (M,): its class; classes: the first name of each; truncated: texts that
    the context cut."""

    weights: Tensor
    owners: Tensor
    classes: list[str]
    truncated: int = 0

    def __call__(self, features: Tensor) -> Tensor:
        """Unit vectors (…, D) → the cosine of each class, of its best name: (…, K)."""
        similarity = features @ self.weights.T.to(features.dtype)
        if len(self.weights) == len(self.classes):
            return similarity
        out = similarity.new_full((*similarity.shape[:-1], len(self.classes)), -torch.inf)
        return out.scatter_reduce(-1, self.owners.expand_as(similarity), similarity, "amax")

    def to(self, device: torch.device | str) -> "TextClassifier":
        return TextClassifier(self.weights.to(device), self.owners.to(device), self.classes, self.truncated)


def open_joint(model: str | towers.Model, device: torch.device | str = "cpu") -> towers.Model:
    """The model, which has a text tower. Raises `CutlineError` for one that has none."""
    loaded = towers.load(model, device) if isinstance(model, str) else model
    if not loaded.model_cfg:
        raise CutlineError(
            f"{loaded.name} is an image tower without a text tower, so it knows no words. It can be transferred to classify, "
            "segment, detect and depth; for zero-shot give a run or an open_clip model (ARCHITECTURE:TAG)."
        )
    return loaded


@torch.no_grad()
def text_classifier(model: towers.Model, names: Names, templates: Sequence[str]) -> TextClassifier:
    """The classifier of `names` (of each class its synonyms) in `templates`, from the cache where it is there; all processes make
    it together.

    On the CPU, float32. Raises `CutlineError` for embeddings that are not finite.
    """
    owners = torch.tensor([i for i, synonyms in enumerate(names) for _ in synonyms])
    flat = [name for synonyms in names for name in synonyms]
    tokens = towers.Tokenizer(model)(flat).tolist()  # what the tokeniser makes of the names stands for all that it is
    path = _folder() / f"{fingerprint(_text_hash(model), tokens, flat, list(templates))}.safetensors"
    found = same_on_all(_read(path))
    if found is None:
        with together():
            mine = _embed(model, flat, templates)
        parts = of_all(mine)
        found = {
            "weights": torch.cat([part["weights"] for part in parts if len(part["weights"])]),
            "truncated": torch.stack([part["truncated"] for part in parts]).sum(),
        }
        if world()[0] == 0:
            _keep(path, found)
    return TextClassifier(found["weights"], owners, [s[0] for s in names], int(found["truncated"]))


def _embed(model: towers.Model, names: Sequence[str], templates: Sequence[str]) -> dict[str, Tensor]:
    """This process's share of the names."""
    tokenizer, device = towers.Tokenizer(model), next(model.parameters()).device
    each = max(1, BATCH // len(templates))  # names a step
    share = own_share(len(names), each)
    names = names[share.start : share.stop]
    weights, truncated, training = [], 0, model.training
    model.eval()
    with progress("embed names", len(names), "names", world()[0] == 0) as tick:
        for start in range(0, len(names), each):
            part = names[start : start + each]
            texts = [template.replace("{}", name) for name in part for template in templates]
            tokens = tokenizer(texts)
            truncated += tokenizer.truncated(texts, tokens)
            parts = torch.split(tokenizer.trimmed(tokens), BATCH)
            x = torch.cat(
                [model.encode_text(t.to(device), normalize=True).float() for t in parts]
            )  # (names · prompts, D)
            weights.append(F.normalize(x.view(len(part), len(templates), -1).mean(1), dim=-1).cpu())
            tick(len(part))
    model.train(training)
    out = torch.cat(weights) if weights else torch.empty(0)
    if not torch.isfinite(out).all():
        raise CutlineError("some text embeddings are not finite: the model is broken. Train it again, or load another.")
    return {"weights": out, "truncated": torch.tensor(truncated)}


def _text_hash(model: towers.Model) -> str:
    """Fingerprint of all that a text embedding depends on beside its tokens: the weights but for the image tower's, and the config."""
    parts = ((k, v) for k, v in model.state_dict().items() if not k.startswith("visual."))
    weights = fingerprint_of(p for k, v in parts for p in (k, v.cpu().contiguous().numpy().tobytes()))
    return fingerprint(weights, model.model_cfg.get("text_cfg"), bool(model.model_cfg.get("quick_gelu")))


def _folder() -> Path:
    return Path(os.environ.get("CUTLINE_CACHE", "~/.cache/cutline")).expanduser() / "texts"


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        found: dict[str, Tensor] = load(path.read_bytes())
        return found
    except (OSError, SafetensorError):
        return None


def _keep(path: Path, found: dict[str, Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(found))
    except OSError:
        pass  # a cache that cannot be written costs time only
