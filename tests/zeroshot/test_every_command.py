"""Every zero-shot command on both kinds of towers, from folders that were saved with random weights."""

import copy
import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from classes_made import THINGS, encoded
from words_made import KINDS

from cutline import towers
from cutline.record import Result
from cutline.scenes.objects import OBJECTS
from cutline.zeroshot.dense import Method

SCENES = "scenes:n=8,size=48,objects=24"
SMALL = ("steps=2", "batch=4", "pictures=2")
HEAD = (*SMALL, "max_depth=80", "channels=16", "filters=16", "deconvolutions=1")
MASKS = (*SMALL, "channels=64", "pyramid_channels=32", "queries=4", "layers=1")
RUNS: dict[str, tuple[str, ...]] = {
    **{f"segment {m}": (f"method={m}", "prompts=photo", "pictures=2") for m in get_args(Method) if m != "proxyclip"},
    "segment proxyclip": ("method=proxyclip", "proxy=scratch:test_vit", "prompts=photo", "pictures=2"),
    "depth tokens": ("method=tokens", "count=3", *SMALL, "max_depth=80"),
    "depth mirror": ("method=mirror", "tokens=4", *HEAD),
    "proposals": ("prompts=photo", *MASKS),
    "proposals learned": ("learn.tokens=2", "learn.steps=2", *MASKS),
}
SUITE = """
name: all
tasks:
  classify: {{task: classify, data: "{data}", config: {{pictures: 4, prompts: photo}}}}
  retrieve: {{task: retrieve, data: "{data}"}}
  segment: {{task: segment, data: "{data}", config: {{pictures: 2, prompts: photo}}}}
  depth: {{task: depth, data: "{data}", config: {{pictures: 2}}}}
"""


@pytest.fixture
def things(tmp_path: Path) -> Path:
    """ROOT/{train,val}/CLASS/*.jpg, 2 of each."""
    for part in ("train", "val"):
        for name in THINGS:
            (tmp_path / "things" / part / name).mkdir(parents=True)
            for i in range(2):
                (tmp_path / "things" / part / name / f"{i}.jpg").write_bytes(encoded(name, i))
    return tmp_path / "things"


def sentence_pieces(folder: Path) -> str:
    """A tokeniser of SigLIP's kind, in Hugging Face's files: pieces of sentences, and what ends a text pads it."""
    from tokenizers import SentencePieceUnigramTokenizer, processors
    from transformers import PreTrainedTokenizerFast

    made = SentencePieceUnigramTokenizer()
    texts = [f"a photo of a {o.name}" for o in OBJECTS]
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(
        texts, 200, show_progress=False, special_tokens=special, unk_token="<unk>",
        initial_alphabet=list(string.ascii_lowercase),
    )  # fmt: skip
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, unk_token="<unk>", pad_token="</s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_every_command_runs(kind: str, things: Path, tmp_path: Path, here: Callable[..., Any]) -> None:
    every_command(copy.deepcopy(KINDS[kind]), things, tmp_path, here)


def every_command(custom: dict[str, Any], things: Path, root: Path, here: Callable[..., Any]) -> None:
    """custom: open_clip's model config; where its texts have no causal mask, it gets a tokeniser of SigLIP's kind."""
    if custom["text_cfg"].get("no_causal_mask"):
        custom["text_cfg"]["hf_tokenizer_name"] = sentence_pieces(root / "hub")
    model = towers.save(towers.build(towers.TowerConfig(custom=custom)), root / "model")
    shutil.rmtree(root / "hub", ignore_errors=True)  # the folder has it

    def run(name: str, *options: str, model: Path = model) -> Path:
        out = root / name.replace(" ", "-")
        done = here("zeroshot", name.split()[0], "--model", str(model), "--out", str(out), *options)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        return out

    for name, options in RUNS.items():
        out = run(name, "--data", SCENES, *options)
        assert (out / "samples.png").stat().st_size > 1000, name
        assert Result.read(out).metrics, name
    adapted = run("adapt", "--data", f"imagefolder:{things}", "prompts=photo", *SMALL)
    assert {"zeroshot_top1", "top1", "words_top1"} <= Result.read(adapted).metrics.keys()
    photo = str(next(things.rglob("*.jpg")))
    # What was trained is used again.
    run("classify photo", "--picture", photo, "--classes", "apple; leaf; sea", model=adapted)
    run("segment photo", "--picture", photo, "--classes", "apple; leaf; sea", model=adapted)
    for name in ("tokens", "mirror"):
        run(f"depth {name} photo", "--picture", photo, model=root / f"depth-{name}")
    run("proposals elsewhere", "--data", SCENES, "pictures=2", model=root / "proposals")
    (root / "suite.yaml").write_text(SUITE.format(data=SCENES))
    suite = here("zeroshot", "suite", str(root / "suite.yaml"), "--model", str(model), "--out", str(root / "suite"))
    assert suite.returncode == 0, suite.stderr
    scores = json.loads((root / "suite" / "table.json").read_text())["scores"]
    assert all(cell["value"] is not None for cell in scores)
