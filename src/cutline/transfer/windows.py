"""Window attention for plain vision transformers at large inputs (ViTDet, 2203.16527, section 3).

Most blocks then attend within windows of `size` × `size` patches, and a few, evenly spaced, over the whole picture, so
that cost grows with the number of patches and not with its square. Hooks before and after each attention cut the tokens
and put them together again, which leaves weights, norms, residuals and drop path as they are. Grids that are no
multiple of the window are padded with zeros after the norm, as in ViTDet.

ViTDet drops the class token. Here it stays, as the towers were trained with it: each window sees its own copy of the
prefix tokens (class, registers), and the copies are averaged after. With one window this is global attention to the
bit.

Relative positions are MViTv2's (2112.01526, equation 4), which ViTDet adds for detection: to the logit of query i and key
j comes q_i · (R^h[y_i − y_j] + R^w[x_i − x_j]), with tables of each block's own, zero at the start. Prefix tokens have none.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cutline.errors import ConfigError
from cutline.towers.encoder import Encoder
from cutline.towers.vit import NativeViT, TimmViT, even_taps


class Windows:
    """The hooks, and the grid of patches of the pictures at hand. prefix: tokens before the patches."""

    def __init__(self, size: int, patch: int, prefix: int) -> None:
        self.size, self.patch, self.prefix = size, patch, prefix
        self.grid = (0, 0)

    def see(self, encoder: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Before the encoder: note the grid of its input."""
        height, width = arguments[0].shape[-2:]
        self.grid = (-(-height // self.patch), -(-width // self.patch))

    def before(self, attention: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Tokens (B, P + h·w, C), once or as query, key and value, to (B·windows, P + size², C)."""
        cut = self._cut(arguments[0])
        return tuple(cut if a is arguments[0] else a for a in arguments)

    def after(self, attention: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        """Back to (B, P + h·w, C); open_clip's attention gives a pair, of which this is the first."""
        return (self._join(output[0]), *output[1:]) if isinstance(output, tuple) else self._join(output)

    def _counts(self) -> tuple[int, int]:
        return -(-self.grid[0] // self.size), -(-self.grid[1] // self.size)

    def _cut(self, x: Tensor) -> Tensor:
        (h, w), (rows, columns), s, (b, _, c) = self.grid, self._counts(), self.size, x.shape
        prefix, patches = x[:, : self.prefix], x[:, self.prefix :].reshape(b, h, w, c)
        patches = F.pad(patches, (0, 0, 0, columns * s - w, 0, rows * s - h))
        patches = patches.reshape(b, rows, s, columns, s, c).transpose(2, 3).reshape(b, rows, columns, s * s, c)
        prefix = prefix[:, None, None].expand(-1, rows, columns, -1, -1)
        return torch.cat([prefix, patches], 3).flatten(0, 2)

    def _join(self, x: Tensor) -> Tensor:
        (h, w), (rows, columns), s = self.grid, self._counts(), self.size
        x = x.reshape(-1, rows, columns, *x.shape[1:])
        prefix, patches = x[:, :, :, : self.prefix].mean((1, 2)), x[:, :, :, self.prefix :]
        patches = patches.reshape(len(x), rows, columns, s, s, -1).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return torch.cat([prefix, patches[:, :h, :w].flatten(1, 2)], 1)


def use_windows(encoder: Encoder, size: int) -> list[int]:
    """Give all blocks of `encoder` but four evenly spaced ones windows of `size` patches; returns those four.

    The four are 2, 5, 8 and 11 of 12, as in ViTDet. Raises `ConfigError` for towers without plain attention blocks.
    """
    blocks, prefix = _plain(encoder, f"window={size}", "to cut into windows. Leave window out.")
    windows, everywhere = Windows(size, int(encoder.patch or 1), prefix), even_taps(len(blocks), None)
    encoder.register_forward_pre_hook(windows.see)
    for k, block in enumerate(blocks):
        if k not in everywhere:
            block.attn.register_forward_pre_hook(windows.before)
            block.attn.register_forward_hook(windows.after)
    return everywhere


class Relative(nn.Module):
    """One block's relative positions, and the hook that adds them to its attention's logits.

    size: patches a side that its tables are for, resized to others; window: patches a side of its windows, or None where it
    sees the whole grid, which `view` knows.
    """

    def __init__(self, attention: Any, size: int, window: int | None, view: Windows) -> None:
        super().__init__()
        self.heads, self.window, self.view = int(attention.num_heads), window, view
        self.rows, self.columns = (nn.Parameter(torch.zeros(2 * size - 1, attention.head_dim)) for _ in range(2))

    def forward(self, q: Tensor, grid: tuple[int, int]) -> Tensor:
        """What is added to the logits, (B, heads, P + h·w, P + h·w), of queries (B, heads, P + h·w, width)."""
        prefix = q.shape[2] - grid[0] * grid[1]
        patches = q[:, :, prefix:].reshape(*q.shape[:2], *grid, q.shape[3])
        by_row = torch.einsum("bnhwd,hkd->bnhwk", patches, _between(self.rows, grid[0]))
        by_column = torch.einsum("bnhwd,wkd->bnhwk", patches, _between(self.columns, grid[1]))
        bias = (by_row[..., None] + by_column[..., None, :]).flatten(4).flatten(2, 3)
        return F.pad(bias, (prefix, 0, prefix, 0))

    def before(
        self, attention: Any, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the attention its logits' addend as a mask, which both open_clip's and timm's take."""
        x, flat = arguments[0], isinstance(attention, nn.MultiheadAttention)
        weight, bias = (
            (attention.in_proj_weight, attention.in_proj_bias) if flat else (attention.qkv.weight, attention.qkv.bias)
        )
        q = F.linear(x, weight[: x.shape[2]], None if bias is None else bias[: x.shape[2]])
        q = q.reshape(*q.shape[:2], self.heads, -1).transpose(1, 2)
        added = self(q, (self.window, self.window) if self.window else self.view.grid).to(x.dtype)
        return arguments, {**named, "attn_mask": added.flatten(0, 1) if flat else added}


def _between(table: Tensor, size: int) -> Tensor:
    """The entry of every pair of places, (size, size, width), of a table (2 n − 1, width)."""
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.T[None], 2 * size - 1, mode="linear")[0].T
    places = torch.arange(size, device=table.device)
    return table[places[:, None] - places[None] + size - 1]


def use_relative(encoder: Encoder, size: int, window: int | None) -> None:
    """Give every block of `encoder` relative positions. size: patches a side of the pictures; window: as of `use_windows`,
    which must come first. Raises `ConfigError` for towers without plain attention blocks."""
    blocks, prefix = _plain(encoder, "relative=true", "to add relative ones to. Leave relative out.")
    view = Windows(window or size, int(encoder.patch or 1), prefix)  # for the grid
    encoder.register_forward_pre_hook(view.see)
    everywhere = even_taps(len(blocks), None) if window else range(len(blocks))
    for k, block in enumerate(blocks):
        own = None if k in everywhere else window
        block.attn.relative = Relative(block.attn, own or size, own, view)
        block.attn.register_forward_pre_hook(block.attn.relative.before, with_kwargs=True)


def _plain(encoder: Encoder, option: str, then: str) -> tuple[list[Any], int]:
    """The attention blocks of a plain ViT with learned positions, and its tokens before the patches."""
    blocks: list[Any]
    if isinstance(encoder, NativeViT):
        blocks, prefix = list(encoder.visual.transformer.resblocks), encoder.prefix
        fits = encoder.visual.transformer.batch_first
    elif isinstance(encoder, TimmViT):
        trunk = encoder.visual.trunk
        blocks, prefix = list(trunk.blocks), int(trunk.num_prefix_tokens)
        # Rotary embeddings and relative biases come into each block for the whole grid.
        fits = getattr(trunk, "rope", None) is None and encoder.any_size
    else:
        fits, blocks, prefix = False, [], 0
    if not fits or not all(hasattr(b, "attn") for b in blocks):
        raise ConfigError(
            f"{option}: {encoder.name} ({type(encoder).__name__}) has no plain attention with learned positions {then}"
        )
    return blocks, prefix
