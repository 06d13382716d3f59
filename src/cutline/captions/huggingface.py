"""Generation with transformers, in this process: captioners, chat models that see, and language models.

Any image-text-to-text model that transformers itself has (BLIP, BLIP-2, GIT, Florence-2, PaliGemma, LLaVA, Qwen-VL,
SmolVLM, ViT-GPT2, …) is asked as it was trained: a chat model through its chat template, Florence-2 by its task token,
PaliGemma by its prefix, the plain captioners by the picture alone or a beginning that they complete. For text alone, any
causal or sequence-to-sequence language model, or a chat model that could also see.

Left out on purpose: models that bring code of their own (`trust_remote_code`), beams (one answer is greedy, several are
sampled), and quantisation.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from cutline import record
from cutline.captions.generator import Ask, Sampling, brief
from cutline.captions.work import Failed
from cutline.config import Config
from cutline.errors import ConfigError, CutlineError, DataError
from cutline.train.device import device_of

CHAT_PROMPT = "Describe the image in one sentence of at most 20 words."  # as short as VeCLIP asks of LLaVA
# What models without a chat template were trained to be asked; the others begin with nothing.
TASK_PROMPTS = {
    "florence2": "<CAPTION>", "paligemma": "caption en", "kosmos-2": "<grounding>An image of",
    "instructblip": "Write a short description of the image.",
}  # fmt: skip


class HfModel(Config):
    """A model of transformers. model: a folder or an id of the Hub; device: "auto", "cpu", "cuda", "cuda:1"."""

    kind: Literal["hf"] = "hf"
    model: str
    device: str = "auto"

    def name(self) -> str:
        """With the revision, or the fingerprint of the folder's files. Raises `DataError` if there is no such model."""
        if Path(self.model).is_dir():
            files = [p for p in sorted(Path(self.model).iterdir()) if p.is_file() and p.name[0] != "."]
            state = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
            return f"hf:{Path(self.model).resolve().name} {_hash(state)}"
        from transformers.utils.hub import cached_file

        with loading(self.model):
            parts = Path(str(cached_file(self.model, "config.json"))).parts
        return f"hf:{self.model}@{parts[-2]}"

    def noted(self, sees: bool) -> dict[str, Any]:
        return {}

    def load(self, sampling: Sampling, sees: bool) -> "HfGenerator":
        return HfGenerator(self, sampling, sees)


@cache
def _hash(state: tuple[tuple[str, int, int], ...]) -> str:
    return record.hash_files(path for path, _, _ in state)


class TooLong(ValueError):
    """A prompt that leaves no room for an answer: a model of fixed positions would crash, others talk nonsense."""


class HfGenerator:
    """The model, its processor, and how it wants to be asked. sees: asks come with pictures."""

    def __init__(self, source: HfModel, sampling: Sampling, sees: bool) -> None:
        self.tokens, self.sees, self.sampling, self.source = 0, sees, sampling, source.model
        self.device = device_of(source.device)
        self.model: Any
        with loading(source.model):
            auto = _auto_class(source.model, sees)
            self.processor, self.tokenizer, self.images = _processor(source.model, sees)
            self.model, info = auto.from_pretrained(source.model, dtype=_dtype(self.device), output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            raise DataError(
                f"{source.model!r} does not hold all weights of a {type(self.model).__name__}: {len(missing)} are missing, "
                f"such as {missing[0]!r}. It may be a part of a model, or one for another task."
            )
        self.model.to(self.device).eval()
        self.type = str(self.model.config.model_type)
        self.chat = bool(template := getattr(self.processor, "chat_template", None))  # of the one that would apply it
        # Thinking would use up the tokens. Of templates that do not know the word, processors would warn in each row.
        self.quiet = {"enable_thinking": False} if "enable_thinking" in str(template) else {}
        self.context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 0  # tokens
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if not getattr(self.model.config, "is_encoder_decoder", False):
            self.tokenizer.padding_side = "left"  # what is generated follows the prompt
        # Encoding changes the state of a fast tokeniser, so the thread that decodes has its own.
        self.decoder = copy.deepcopy(self.tokenizer)
        _forget_sampling(self.model)

    def prepare(self, asks: list[Ask]) -> tuple[list[Ask], dict[int, Failed], Any]:
        """Inputs of the model, and the asks that its processor refuses (such as a picture one pixel high)."""
        try:
            return asks, {}, self._encode(asks)
        except (ValueError, RuntimeError, TypeError, IndexError, ZeroDivisionError) as e:
            if len(asks) == 1:
                why = "" if isinstance(e, TooLong) else "refused by the processor: "
                return asks, {0: Failed(why + (brief(e) or type(e).__name__))}, None
        # Each alone, to find which: it happens rarely.
        refused = {i: bad[0] for i, (_, bad, _) in enumerate(self.prepare([ask]) for ask in asks) if bad}
        if not refused:
            raise CutlineError(
                f"the processor of {self.source!r} takes each of {len(asks)} pictures alone, but not all."
            )
        left = [ask for i, ask in enumerate(asks) if i not in refused]
        return asks, refused, self._encode(left) if left else None

    def _encode(self, asks: list[Ask]) -> Any:
        options: dict[str, Any] = {"return_tensors": "pt"}
        pictures = [ask.picture for ask in asks]
        if self.images is not None:
            if any(ask.prompt for ask in asks):
                raise ConfigError(f"{self.source!r} takes pictures alone and cannot be given a prompt. Leave it out.")
            return self.images(images=pictures, **options)
        texts = [self._text(ask.prompt) for ask in asks]
        if any(texts):
            bos = self.tokenizer.bos_token or ""
            begun = self.chat and (self.processor is self.tokenizer or (bool(bos) and texts[0].startswith(bos)))
            options |= {"padding": True} | ({"add_special_tokens": False} if begun or self.type == "git" else {})
        if not self.sees:
            inputs = self.tokenizer(texts, return_token_type_ids=False, **options)
            decodes = not getattr(self.model.config, "is_encoder_decoder", False)  # on from the prompt, in its context
            if 0 < self.context < inputs["input_ids"].shape[1] + decodes * self.sampling.max_new_tokens:
                raise TooLong("prompt longer than the model's context")
            return inputs
        if self.chat:
            return self.processor(text=texts, images=[[p] for p in pictures], **options)
        if any(texts):
            return self.processor(text=texts, images=pictures, **options)
        return self.processor(images=pictures, **options)

    def _text(self, prompt: str) -> str:
        """A prompt as the model was trained to be asked."""
        if self.chat:
            content = [{"type": "text", "text": prompt or CHAT_PROMPT}]
            if self.sees:
                content.insert(0, {"type": "image"})
            messages = [{"role": "user", "content": prompt if self.processor is self.tokenizer else content}]
            options = {"add_generation_prompt": True, "tokenize": False} | self.quiet
            return str(self.processor.apply_chat_template(messages, **options))
        if not self.sees:
            return prompt
        text = prompt or TASK_PROMPTS.get(self.type, "")
        if self.type == "paligemma":
            return f"{self.processor.image_token}{text}"  # else it warns, and does so itself
        # GIT ends a text with [SEP], also a beginning that it shall go on with: so it is given without the marks.
        return f"{self.tokenizer.cls_token}{text}" if text and self.type == "git" else text

    def answer(self, prepared: tuple[list[Ask], dict[int, Failed], Any]) -> list[list[str] | Failed]:
        asks, refused, inputs = prepared
        left = [ask for i, ask in enumerate(asks) if i not in refused]
        texts = iter(self._generate(left, inputs) if left else [])
        return [refused[i] if i in refused else next(texts) for i in range(len(asks))]

    def _generate(self, asks: list[Ask], inputs: Any) -> Iterator[list[str]]:
        s = self.sampling
        options: dict[str, Any] = {"max_new_tokens": s.max_new_tokens, "num_beams": 1, "num_return_sequences": s.num}
        options |= (
            {"do_sample": True, "temperature": s.heat, "top_p": s.top_p, "top_k": 0} if s.heat else {"do_sample": False}
        )
        try:
            with torch.inference_mode(), _seeded(self.device, s.seed, [ask.key for ask in asks]):
                out = self.model.generate(**_moved(inputs, self.device, self.model.dtype), **options)
        except torch.OutOfMemoryError as e:
            raise CutlineError(
                f"{self.source!r} needs more memory than {self.device} has for a batch of {len(asks)}. Take smaller batches."
            ) from e
        new = _without_prompt(out, inputs.get("input_ids"), s.num).cpu()
        self.tokens += int(new.ne(self.tokenizer.pad_token_id).sum())
        texts = self.decoder.batch_decode(new, skip_special_tokens=True)
        finished = [self._finished(texts[i], asks[i // s.num].prompt) for i in range(len(texts))]
        return (finished[i : i + s.num] for i in range(0, len(finished), s.num))

    def _finished(self, text: str, prompt: str) -> str:
        if self.chat:
            return text
        if self.sees:  # BLIP and GIT repeat the beginning they were given
            text = text.strip()
            return text[len(prompt) :] if prompt and text.lower().startswith(prompt.lower()) else text
        # A language model that was not taught to chat completes the prompt: its answer is the rest of the line.
        return text.strip().split("\n")[0]


def _processor(model: str, sees: bool) -> tuple[Any, Any, Any]:
    """(processor, tokeniser, image processor where the model has no processor that joins the two)."""
    import transformers

    auto: Any = transformers  # its Auto classes have no types
    processor = auto.AutoProcessor.from_pretrained(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    if not sees:
        # A model that could also see has its chat template with the processor, for messages made of parts.
        parts = hasattr(processor, "image_processor") and processor.chat_template is not None
        return (processor if parts else tokenizer), tokenizer, None
    if hasattr(processor, "image_processor"):
        return processor, tokenizer, None
    images, tokenizer = auto.AutoImageProcessor.from_pretrained(model), auto.AutoTokenizer.from_pretrained(model)
    return tokenizer, tokenizer, images


def _auto_class(model: str, sees: bool) -> Any:
    """The class that loads the model. Raises `DataError` for one that does not do what it is wanted for."""
    import transformers
    from transformers.models.auto import modeling_auto

    kinds = {"AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"}
    if not sees:
        kinds = {
            "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
            "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
        } | kinds
    config = transformers.AutoConfig.from_pretrained(model)
    for name, mapping in kinds.items():
        if type(config) in getattr(modeling_auto, mapping):
            return getattr(transformers, name)
    does = "describe pictures" if sees else "write text"
    raise DataError(
        f"{model!r} is a {config.model_type!r} model, of which transformers does not know that it can {does}. "
        f"Choose one of the {'image-text-to-text' if sees else 'text-generation'} models of the Hub."
    )


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Turns what transformers raises for a model that it cannot load into a `DataError` that says what to do."""
    try:
        yield
    except DataError:
        raise
    except Exception as e:  # OSError, ValueError, ImportError, KeyError, safetensors' own, …
        if "trust_remote_code" in str(e):
            why = "it brings code of its own, which Cutline does not run. Choose a model that transformers itself has."
        elif isinstance(e, ImportError):
            why = f"a package is missing: {str(e).strip().splitlines()[0]}"
        elif Path(model).is_dir():
            why = f"{str(e).splitlines()[0] if str(e) else type(e).__name__} Check the folder."
        else:
            why = (
                f"it is no folder, and the Hub cannot be asked or does not have it ({type(e).__name__}). Check the name; on "
                "a machine without network, download it elsewhere (`hf download`) and give the folder."
            )
        raise DataError(f"the model {model!r} cannot be loaded: {why}") from e


def _dtype(device: torch.device) -> torch.dtype:
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _forget_sampling(model: Any) -> None:
    """Drop the model's own settings of what is decided here, of the language model inside too, that would warn or win."""
    for part in model.modules():
        config = getattr(part, "generation_config", None)
        if config is not None:
            config.max_length = None
            config.temperature = config.top_k = config.top_p = config.min_p = config.typical_p = None


def _moved(inputs: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def _without_prompt(out: Tensor, prompt: Tensor | None, num: int) -> Tensor:
    """What was generated: decoders give the prompt back before it."""
    if prompt is None or out.shape[1] < prompt.shape[1]:
        return out
    repeats = torch.equal(out[:, : prompt.shape[1]], prompt.to(out.device).repeat_interleave(num, 0))
    return out[:, prompt.shape[1] :] if repeats else out


@contextmanager
def _seeded(device: torch.device, seed: int, keys: Sequence[str]) -> Iterator[None]:
    """Draws that follow from the seed and the rows, and leave no trace."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cast(Any, devices)):
        torch.manual_seed(int(record.fingerprint(seed, list(keys)), 16) % (1 << 63))
        yield
