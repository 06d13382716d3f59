"""A frozen text tower that reads learned vectors in place of a text's token embeddings (CoOp, 2109.01134; "mirror", 2402.03251).

The tokens of start, end and padding keep their own embeddings: the tower pools at the end token (or the padding tells it
where the text ends), and it never saw a text without them. So with the embeddings of a real text's tokens the output is
`encode_text` of that text, in every tower that open_clip has.

Shapes: M texts, n learned vectors each, W width of the text tower, T tokens with start, end and padding, D joint width.
"""

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from cutline import towers
from cutline.errors import ConfigError


def framed(model: towers.Model, n: int) -> tuple[Tensor, int]:
    """Token ids (T,) of a text of `n` tokens in its frame, and the place of the first of them.

    Raises `ConfigError` where the context has no room for them.
    """
    tokenizer = towers.Tokenizer(model)
    empty, one = tokenizer(["", "a"])
    first = first_place(tokenizer)
    special = tokenizer.lengths([""])[0]
    if n > tokenizer.context - special:
        raise ConfigError(
            f"{n} learned tokens do not fit into the context of {model.name}: {tokenizer.context} with {special} for start "
            f"and end. Take at most {tokenizer.context - special}."
        )
    ids = torch.cat([empty[:first], one[first].expand(n), empty[first : len(empty) - n]])
    return tokenizer.trimmed(ids[None])[0], first


def first_place(tokenizer: towers.Tokenizer) -> int:
    """Where a text begins: some tokenisers put a token of their own before it."""
    empty, one = tokenizer(["", "a"])
    return int((empty != one).nonzero()[0])


def room(model: towers.Model) -> int:
    """How many learned tokens the context has room for."""
    tokenizer = towers.Tokenizer(model)
    return tokenizer.context - tokenizer.lengths([""])[0]


class EmbeddedText(nn.Module):
    """Vectors (M, n, W) → unit vectors (M, D) in the joint space. It holds a frozen copy of the text tower of `model`, always in
    eval mode.

    ids, first: of `framed`.
    """

    ids: Tensor
    first: Tensor

    def __init__(self, model: towers.Model, ids: Tensor, first: int) -> None:
        super().__init__()
        self.model: Any = copy.deepcopy(model, {id(model.visual): None})  # the image tower is not copied
        self.model.requires_grad_(False)
        self.register_buffer("ids", ids)
        self.register_buffer("first", torch.tensor(first))
        self.width = int(embedding_of(model).weight.shape[1])
        self.train()

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def forward(self, vectors: Tensor) -> Tensor:
        return encode_with(self.model, self.ids.expand(len(vectors), -1), vectors, int(self.first))


def encode_with(model: Any, ids: Tensor, vectors: Tensor, first: int) -> Tensor:
    """Unit vectors (M, D) of token ids (M, T) with vectors (M, n, W), or (1, n, W) for all, in place of the embeddings of n
    tokens from place `first` on; differentiably."""

    def put(module: nn.Module, inputs: Any, found: Tensor) -> Tensor:
        middle = vectors.to(found.dtype).expand(len(found), -1, -1)
        return torch.cat([found[:, :first], middle, found[:, first + vectors.shape[1] :]], 1)

    handle = embedding_of(model).register_forward_hook(put)
    try:
        out: Tensor = model.encode_text(ids, normalize=True)
    finally:
        handle.remove()
    return out


def embedding_of(model: Any) -> Any:
    """The layer that turns token ids into vectors."""
    tower = getattr(model, "text", model)
    return tower.token_embedding if hasattr(tower, "token_embedding") else tower.transformer.get_input_embeddings()
