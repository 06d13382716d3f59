"""Captions by models of others: `cutline caption write PAIRS --with hf:MODEL` or `--with openai:URL#MODEL`."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from cutline.captions.clean import CONTEXT
from cutline.captions.generator import Ask, AskWorker, Sampling
from cutline.captions.huggingface import CHAT_PROMPT, HfModel
from cutline.captions.server import Server
from cutline.captions.work import Failed, Row, picture_of
from cutline.config import Config, check
from cutline.errors import ConfigError
from cutline.pairs import Provenance

Source = Annotated[HfModel | Server, Field(discriminator="kind")]
OPENAI, HF = "openai:", "hf:"


def source_of(spec: str) -> HfModel | Server:
    """What `--with` names: "hf:FOLDER or ID", or "openai:URL#MODEL" of a server with the protocol of OpenAI.

    A URL without #MODEL is of a server with one model, which it is asked for when work begins. Raises `ConfigError` for
    anything else.
    """
    if spec.startswith(HF) and len(spec) > len(HF):
        return check(HfModel, {"model": spec.removeprefix(HF)})
    if spec.startswith(OPENAI):
        url, _, model = spec.removeprefix(OPENAI).partition("#")
        return check(Server, {"url": url, "model": model})
    raise ConfigError(
        f"{spec!r} names no model. Use hf:FOLDER or hf:ID for a model of transformers, "
        "or openai:URL#MODEL for a server, such as openai:http://localhost:8000/v1#Qwen/Qwen2.5-VL-7B-Instruct."
    )


class VlmWriter(Config):
    """A `Work` that writes a column of captions.

    prompt: what the model is asked; "" is the model's own way (see `huggingface`), for chat models `CHAT_PROMPT`.
    sampling.num: captions for each row; with more than one the column holds lists. limit: tokens of CLIP's tokeniser,
    start and end included, at which a caption is cut, at a sentence's end where there is one.
    """

    source: Source
    column: str = Field(min_length=1)
    prompt: str = ""
    sampling: Sampling = Sampling()
    limit: int = Field(CONTEXT, ge=3)

    def model_post_init(self, context: Any) -> None:
        if self.sampling.num > 1 and not self.sampling.heat:
            raise ConfigError(
                f"num={self.sampling.num} captions with temperature=0 are the same one again. Take one, or a temperature above 0."
            )

    @property
    def reads(self) -> list[str]:
        return ["image"]

    @property
    def writes(self) -> Mapping[str, str]:
        return {self.column: "list<string>" if self.sampling.num > 1 else "string"}

    def provenance(self) -> Provenance:
        return Provenance(
            how="caption write", model=self.source.name(), prompt=self._prompt, sampling=self.sampling.noted(),
            inputs=["image"], settings={"limit": self.limit} | self.source.noted(sees=True),
        )  # fmt: skip

    @property
    def _prompt(self) -> str:
        return self.prompt or (CHAT_PROMPT if isinstance(self.source, Server) else "")

    def load(self) -> AskWorker:
        generator = self.source.load(self.sampling, sees=True)
        return AskWorker(generator, self._asks, self.column, self.sampling.num > 1, self.limit)

    def _asks(self, row: Row) -> list[Ask] | Failed:
        picture = picture_of(row)
        if isinstance(picture, Failed):
            return picture
        encoded = row["image"] if isinstance(row["image"], bytes) else None
        return [Ask(str(row["key"]), self._prompt, picture, encoded)]
