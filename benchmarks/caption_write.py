"""`caption write` with a transformers model against a bare `model.generate` loop: `python benchmarks/caption_write.py`.

A BLIP of random weights describes N JPEGs of a table, `--batch` a step. The bare loop is given the model's inputs, made
beforehand and held in memory, and does nothing but `generate` and turn tokens into text. Ours is `captions.engine.run`: it
reads the pictures from the table, decodes and prepares them, generates, cleans the text, and commits the column. Both use
the same model object, and write the same captions, which is checked. Rates are the best of `--rounds`, taken in turn, and
without loading. The goal is a ratio of 0.95.
"""

import argparse
import io
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from cutline.captions.clean import clean
from cutline.captions.engine import RunConfig, run
from cutline.captions.generator import AskWorker, Sampling
from cutline.captions.huggingface import HfModel
from cutline.captions.vlm import VlmWriter
from cutline.captions.work import Failed
from cutline.pairs import Pairs, create_from_rows

SIZES = {  # vision and text width, layers of each, picture side
    "tiny": (128, 3, 2, 96), "small": (384, 6, 4, 224), "base": (768, 12, 12, 384),
}  # fmt: skip
SYLLABLES = [a + b for a in "bdfglmnprstvz" for b in "aeiou"]
WORDS = [a + b for a in SYLLABLES for b in SYLLABLES]


def make_model(folder: Path, size: str) -> None:
    width, eyes, layers, side = SIZES[size]
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(marks + WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    shared = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width}
    config = hf.BlipConfig(
        vision_config={**shared, "num_hidden_layers": eyes, "image_size": side, "patch_size": 16, "initializer_range": 0.1},
        text_config={**shared, "num_hidden_layers": layers, "vocab_size": words.get_vocab_size(), "bos_token_id": 2,
                     "sep_token_id": 3, "pad_token_id": 0, "encoder_hidden_size": width, "initializer_range": 0.2},
    )  # fmt: skip
    torch.manual_seed(0)
    hf.BlipForConditionalGeneration(config).save_pretrained(folder)
    hf.BlipProcessor(hf.BlipImageProcessor(size={"height": side, "width": side}), tokenizer).save_pretrained(folder)


def make_table(path: Path, n: int) -> Pairs:
    """Smooth pictures of 320 × 240, as JPEG."""

    def rows() -> Any:
        rng = np.random.default_rng(0)
        for i in range(n):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            coarse.resize((320, 240), Image.Resampling.BICUBIC).save(out := io.BytesIO(), "JPEG", quality=85)
            yield {"key": f"{i:06d}", "image": out.getvalue(), "alt": None}

    create_from_rows(path, rows())
    return Pairs.open(path)


@dataclass
class Loaded:
    """A writer whose model is loaded already."""

    work: VlmWriter
    worker: AskWorker

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)

    def load(self) -> AskWorker:
        return self.worker


def bare(worker: AskWorker, batches: list[dict[str, Any]], tokens: int) -> tuple[float, list[str]]:
    generator: Any = worker.generator
    model, texts = generator.model, []
    begun = time.perf_counter()
    with torch.inference_mode():
        for inputs in batches:
            out = model.generate(
                **{k: v.to(generator.device) for k, v in inputs.items()}, max_new_tokens=tokens, do_sample=False
            )
            texts += generator.decoder.batch_decode(out, skip_special_tokens=True)
    return time.perf_counter() - begun, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=256, help="pictures")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--tokens", type=int, default=20, help="of a caption, at most")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "blip", options.size)
        pairs = make_table(Path(folder) / "t.lance", options.n)
        source, sampling = HfModel(model=f"{folder}/blip"), Sampling(max_new_tokens=options.tokens)
        worker = VlmWriter(source=source, column="warm", sampling=sampling).load()
        rows = [
            pairs.read(range(i, min(i + options.batch, options.n)), ["key", "image"])
            for i in range(0, options.n, options.batch)
        ]
        batches = [dict(worker.prepare(some)[1][2]) for some in rows]
        bare(worker, batches[:1], options.tokens)
        loop, ours = [], []
        for turn in range(options.rounds):
            seconds, texts = bare(worker, batches, options.tokens)
            loop.append(seconds)
            worker.column = f"caption{turn}"
            work = VlmWriter(source=source, column=worker.column, sampling=sampling)
            begun = time.perf_counter()
            config = RunConfig(batch=options.batch, max_bad=1)
            pairs, _ = run(pairs, Loaded(work, worker), worker.column, config, show=False, say=lambda _: None)
            ours.append(time.perf_counter() - begun)
            written = [row[worker.column] for row in pairs.read(range(options.n), [worker.column])]
            cleaned = [clean(text) for text in texts]
            assert written == [None if isinstance(c, Failed) else c for c in cleaned], "not the same captions"
        print(
            f"BLIP {options.size}, {options.n} pictures, batches of {options.batch}, {options.tokens} tokens, {source.device}"
        )
        print(f"bare generate {options.n / min(loop):8.1f} pictures/s  {[round(s, 2) for s in loop]}")
        print(f"caption write {options.n / min(ours):8.1f} pictures/s  {[round(s, 2) for s in ours]}")
        print(f"ratio         {min(loop) / min(ours):8.3f}")


if __name__ == "__main__":
    main()
