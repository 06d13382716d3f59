"""Collapse: training goes on and the features no longer tell pictures apart, which a loss does not always show.

Every run logs how different the embeddings of its pictures are (`image/feature_std`, `image/effective_rank`); objectives with
features or assignments of their own log theirs. What looks collapsed for `PATIENCE` steps on end is told to the user.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cutline.objectives.contrastive import widen

PATIENCE = 100  # steps on end
LEAST_STD = 0.1  # of features that tell pictures apart: cosines of 0.99. Towers at their random start have 0.3 to 0.6
LEAST_INFORMATION = 0.02  # nats that an assignment tells


@torch.no_grad()
def spread(features: Tensor, most: int = 1024) -> dict[str, Tensor]:
    """How different the rows of `features` (R, W) are: two numbers to log, none of a single row.

    feature_std: root of the summed variance of the L2-normalised rows (of at most `most`, evenly chosen): 1 where they
    point everywhere, 0 where they are all the same. effective_rank: (Σ λ)² / Σ λ² over the eigenvalues λ of their
    covariance, the number of directions they vary in (the participation ratio: it needs no decomposition, unlike the
    exponential of the entropy of λ, and is never larger).
    """
    if len(features) < 2:
        return {}
    x = F.normalize(widen(features[:: -(-len(features) // most)]), dim=-1)
    x = x - x.mean(0)
    with torch.autocast(x.device.type, enabled=False):
        gram = x @ x.T if len(x) < x.shape[1] else x.T @ x  # the same eigenvalues, but for zeros
    total, squares = gram.trace(), gram.square().sum()
    rank = total.square() / squares.clamp(min=torch.finfo(x.dtype).tiny)
    return {"feature_std": (total / len(x)).sqrt(), "effective_rank": rank}


def of_pictures(log: dict[str, float]) -> str:
    """What to tell where a step's embeddings are alike; "" where they are not."""
    std = log.get("image/feature_std", 1.0)
    if not std < LEAST_STD:  # nor where it is not finite
        return ""
    return (
        f"the embeddings of all pictures are alike (feature std {std:.4f}; 1 where they point everywhere): training has "
        f"collapsed or not begun. Lower train.lr, lengthen train.warmup or set train.clip, and look whether the texts or labels "
        f"tell the pictures apart."
    )
