"""open_clip's tokeniser of CLIP, faster, with a bounded cache, and with the same tokens.

open_clip's own spends most of its time cleaning text that is clean already (ftfy, HTML entities) and looking up the
pieces of every word again; and it keeps every word it ever met, which grows without end on text from the web.
"""

from typing import Any

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer, _clean_lower
from torch import Tensor

MAX_WORDS = 200_000  # kept; about 60 MB


class WordTokenizer(SimpleTokenizer):  # type: ignore[misc]
    """`SimpleTokenizer` with tokens kept by word. Safe to call from several threads."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.ids: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`, without start and end."""
        # Printable ASCII without entities is what the cleaning leaves as it is, but for spaces and case.
        if self.clean_fn is _clean_lower and text.isascii() and text.isprintable() and "&" not in text:
            text = " ".join(text.split()).lower()
        else:
            text = self.clean_fn(text)
        tokens: list[int] = []
        for word in self.pat.findall(text):
            tokens += self.ids.get(word) or self._word(word)
        return tokens

    def _word(self, word: str) -> list[int]:
        encoded = "".join(self.byte_encoder[b] for b in word.encode("utf-8"))
        ids = [self.encoder[piece] for piece in self.bpe(encoded).split(" ")]
        if ids[0] not in self.all_special_ids:
            self.cache.pop(encoded, None)  # the parent's cache has no bound
        if len(self.ids) < MAX_WORDS:
            self.ids[word] = ids
        return ids

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """(M, context) int64; longer texts are cut, and end with the end token all the same."""
        if self.reduction_fn is not None:
            tokens: Tensor = super().__call__(texts, context_length)
            return tokens
        context = context_length or self.context_length
        texts = [texts] if isinstance(texts, str) else texts
        result = np.zeros((len(texts), context), np.int64)
        for row, text in zip(result, texts, strict=True):
            ids = [self.sot_token_id, *self.encode(text)[: context - 2], self.eot_token_id]
            row[: len(ids)] = ids
        return torch.from_numpy(result)
