"""Captions to tokens: open_clip's tokeniser of a model, trimming to the longest caption, and counting truncations."""

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from open_clip.tokenizer import HFTokenizer
from torch import Tensor

from cutline.errors import CutlineError
from cutline.towers.model import Model
from cutline.towers.words import WordTokenizer


class Tokenizer:
    """The tokeniser that belongs to `model`.

    `tokenizer(texts)` → (M, context) int64, padded with 0 (or the tokeniser's own padding). `context`: the length;
    `trimmable`: whether `trimmed` shortens at all (see `Model.trimmable`). Safe to call from several threads.
    """

    def __init__(self, model: Model) -> None:
        text_cfg: dict[str, Any] = model.model_cfg.get("text_cfg", {})
        self.context = int(text_cfg.get("context_length", 77))
        self.trimmable = model.trimmable
        self.padding = 0
        options = text_cfg.get("tokenizer_kwargs") or {}
        source = model.tokenizer_folder or text_cfg.get("hf_tokenizer_name")
        self.tokenizer: Any
        # A fast tokeniser of transformers keeps whether it cuts and pads as state, which a call changes.
        self.lock: AbstractContextManager[Any] = threading.Lock() if source else nullcontext()
        if source:
            mode = text_cfg.get("tokenizer_mode")
            try:
                self.tokenizer = HFTokenizer(source, context_length=self.context, tokenizer_mode=mode, **options)
            except ImportError as e:
                raise CutlineError(f"the tokeniser {source!r} needs transformers: pip install transformers.") from e
            except (OSError, ValueError) as e:  # no files and no network, or other files
                raise CutlineError(
                    f"cannot read the tokeniser {source!r}: {str(e).splitlines()[0]} Check the network, or put its files "
                    "(tokenizer.json, tokenizer_config.json) into the folder of the model."
                ) from e
            self.padding = self.tokenizer.tokenizer.pad_token_id or 0
        else:
            self.tokenizer = WordTokenizer(context_length=self.context, **options)

    def __call__(self, texts: list[str]) -> Tensor:
        if not texts:
            return torch.zeros(0, self.context, dtype=torch.long)
        with self.lock:
            return cast(Tensor, self.tokenizer(texts))

    def trimmed(self, tokens: Tensor) -> Tensor:
        """`trim(tokens)` where the text tower allows it, else `tokens` as they are."""
        return trim(tokens) if self.trimmable else tokens

    def truncated(self, texts: list[str], tokens: Tensor | None = None) -> int:
        """How many of `texts` do not fit into the context. Give their `tokens` if they are there: it is then cheap."""
        tokens = self(texts) if tokens is None else tokens
        # Before the last: what ends a text may be what pads it, as SigLIP's "</s>".
        full = [texts[i] for i in tokens[:, -2:].ne(self.padding).any(1).nonzero().flatten().tolist()]
        return sum(n > self.context for n in self.lengths(full))

    def lengths(self, texts: list[str]) -> list[int]:
        """Tokens of each text, start and end included, before it is cut."""
        if isinstance(self.tokenizer, HFTokenizer) and texts:
            with self.lock:
                return [*map(len, self.tokenizer.tokenizer([self.tokenizer.clean_fn(t) for t in texts]).input_ids)]
        return [len(self.tokenizer.encode(t)) + 2 for t in texts]

    def save(self, folder: str) -> None:
        """Write the files of a Hugging Face tokeniser into `folder`; CLIP's own needs none."""
        if isinstance(self.tokenizer, HFTokenizer):
            self.tokenizer.save_pretrained(folder)


def trim(tokens: Tensor, multiple: int = 8) -> Tensor:
    """Cut (M, T) tokens after the longest text of the batch, rounded up to `multiple`; padding is 0.

    By the last token that is not padding, since id 0 ("!") may also stand inside a text.
    """
    used = int(tokens.ne(0).any(dim=0).nonzero().max()) + 1 if tokens.any() else 1
    return tokens[:, : -(-used // multiple) * multiple]
