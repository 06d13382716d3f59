"""Works of writers and fusers, with what tests set."""

from collections.abc import Mapping, Sequence
from typing import Any

from cutline.captions.fuse import FuseWork, read_prompts
from cutline.captions.vlm import VlmWriter, source_of
from cutline.config import check


def write_work(
    spec: str, column: str, prompt: str = "", sampling: Mapping[str, Any] = {}, options: Mapping[str, Any] = {}
) -> VlmWriter:
    """options: of the model or the server."""
    source = source_of(spec).model_dump() | dict(options)
    return check(VlmWriter, {"source": source, "column": column, "prompt": prompt, "sampling": dict(sampling)})


def fuse_work(
    spec: str, inputs: Sequence[str], column: str, prompt: str = "veclip", sampling: Mapping[str, Any] = {},
    options: Mapping[str, Any] = {}, limit: int = 77,
) -> FuseWork:  # fmt: skip
    source = source_of(spec).model_dump() | dict(options)
    values = {"source": source, "column": column, "inputs": list(inputs), "prompts": read_prompts(prompt, inputs)}
    return check(FuseWork, values | {"sampling": dict(sampling), "limit": limit})
