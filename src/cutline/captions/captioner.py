"""`cutline caption train`: a captioner of our own, from the rows of a table that have a good caption.

It is a CoCa (Yu et al., 2205.01917; open_clip's classes), trained in two runs. The first teaches the image tower alone
what is in the pictures, by the content words of their captions (`objectives.catlip`): with few pictures that is what a
captioner lacks, and it costs a fraction of the whole. Rows without a good caption serve there with their alt text, of
which only the words that good captions have count: names in poor text are still names. The second trains everything on `captioning` and `contrastive`, with
`catlip` beside them. A share of the rows is held out; the model that writes the best captions for them is kept, and
training stops when these have not become better for a while. The folder is a run directory with three more things: the
first run (`image/`), the ids of the tokens that occur in the captions (`vocabulary.json`), which are all that is ever
written, and the scores on the held-out rows.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from cutline import towers
from cutline.captions.coca import VOCABULARY, CocaWriter, plain
from cutline.captions.decode import CocaDecoder
from cutline.captions.patterns import MEDIA, STOPWORDS
from cutline.captions.work import Failed, picture_of, texts_in
from cutline.config import Config
from cutline.errors import ConfigError, DataError
from cutline.metrics.captions import bleu_4, cider_d, word_overlap, words_of
from cutline.objectives import captioning
from cutline.objectives.gather import barrier, same_on_all, world
from cutline.pairs import Pairs
from cutline.record import Protocol, Result, fingerprint, write_atomic
from cutline.towers import TowerConfig
from cutline.towers.pictures import test_transform, weights_hash
from cutline.train.device import process_group
from cutline.train.loop import Run, train
from cutline.train.recipe import DataConfig, Objectives, Recipe, TrainConfig
from cutline.train.stream import Augment, TextConfig
from cutline.train.stream.order import key

CLASSES = "classes.json"
MOST_HELD_OUT = 1000
MOST_TEXTS = 5  # references of a held-out picture
BATCH = 64  # of held-out pictures
RARE = 10  # pictures that a word must be in to be a class, where there are many pictures
LOOK = 256  # held-out pictures that are written about at every look


class CaptionerTrain(TrainConfig):
    """A training run's options with the defaults of a captioner for few pictures."""

    batch: int = Field(64, ge=2)
    samples: int = Field(25_600, ge=1)
    lr: float = Field(2e-3, gt=0)
    warmup: int = Field(50, ge=0)
    save_every: int = Field(100, ge=1)
    keep: int = Field(1, ge=1)


class ImageTrain(CaptionerTrain):
    """The same of the run before, for the image tower alone."""

    samples: int = Field(96_000, ge=1)
    lr: float = Field(3e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    save_every: int = Field(500, ge=1)


class CaptionerConfig(Config):
    """How a captioner is trained.

    towers: None takes a small CoCa for pictures of up to 96 pixels, or one for larger ones; image: the run for the image
    tower alone (null: none); also: columns with poorer text for the rows that have no good caption, in that run; good:
    share of its samples that have one; captioning, contrastive, catlip: weights of
    the objectives of the second run; positive: weight of words that are there, in catlip; held_out: share of the rows
    (at most 1,000); patience: looks without better captions before it stops; augment: no mirror images, since captions
    tell left from right.
    """

    towers: TowerConfig | None = None
    image: ImageTrain | None = Field(default_factory=ImageTrain)
    also: list[str] = Field(default_factory=lambda: ["alt"])
    good: float = Field(0.33, gt=0, le=1)
    train: CaptionerTrain = Field(default_factory=CaptionerTrain)
    captioning: float = Field(1.0, gt=0)
    contrastive: float = Field(0.2, ge=0)
    catlip: float = Field(0.2, ge=0)
    positive: float = Field(10.0, gt=0)
    held_out: float = Field(0.1, gt=0, lt=1)
    patience: int = Field(5, ge=1)
    augment: Augment = Augment(scale=(0.6, 1.0))
    seed: int = Field(0, ge=0)


class Rows:
    """Some rows of a table, as a source of training. note: what the fingerprint is made of beside the pictures."""

    def __init__(self, pairs: Pairs, rows: Sequence[int] | NDArray[np.int64], note: Sequence[Any]) -> None:
        self.pairs, self.rows, self.columns = pairs, np.asarray(rows, np.int64), pairs.columns
        self.fingerprint = fingerprint(pairs.digest("key"), pairs.digest("image"), list(note))

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        return self.pairs.read(self.rows[list(rows)].tolist(), columns)


def train_captioner(
    pairs: Pairs, column: str, out: Path, config: CaptionerConfig, resume: bool = False, show: bool = True
) -> Result:
    """Train a captioner on the captions in `column` into the folder `out`; returns its scores on held-out rows.

    metrics: loss of the held-out captions; BLEU-4, CIDEr-D and precision, recall and F1 of content words of what it
    writes for the held-out pictures (greedy). Raises `DataError` for fewer than three rows with a caption and `ConfigError`
    for a folder that holds a run, unless `resume` goes on with it. Under torchrun: on all its processes.
    """
    with process_group(config.train.device):
        return _train(pairs, column, out, config, resume, show)


def _train(pairs: Pairs, column: str, out: Path, config: CaptionerConfig, resume: bool, show: bool) -> Result:
    began = time.monotonic()
    learnt, held = split(pairs, column, config)
    _begin(out, {"column": column, "captions": pairs.digest(column), "config": config.model_dump(mode="json")}, resume)
    if (out / "result.json").exists():
        return Result.read(out)
    # What is learnt from, and not the table's own fingerprint, which a column added meanwhile would change.
    source = Rows(pairs, learnt.rows, [pairs.digest(column), config.seed, config.held_out])
    config = _fitted(config, len(learnt))
    tower = config.towers or TowerConfig(model=_preset(pairs))
    classes = _write_words(learnt, column, out, tower)
    if config.image is not None and classes and not (out / "image" / "model").is_dir():
        also = [c for c in config.also if c in pairs.columns and c != column]
        first = _recipe(
            pairs, column, config, config.image, tower, {"catlip": _catlip([column, *also], out, config, 1.0)}
        )
        train(first, out / "image", resume, _with_others(source, held, also, config.good), show)
    if config.image is not None and classes:
        tower = TowerConfig(model=str(out / "image"))
    weights: dict[str, dict[str, Any]] = {
        "captioning": {"weight": config.captioning, "vocabulary": str(out / VOCABULARY)},
        "contrastive": {"weight": config.contrastive},
        "catlip": _catlip([column], out, config, config.catlip if classes else 0.0),
    }
    best = Best(HeldOut(held, column), out, config.patience)
    train(_recipe(pairs, column, config, config.train, tower, weights), out, resume, source, show, best)
    model = towers.load(str(out))
    metrics: dict[str, float] = {"pictures": len(learnt), "held_out": len(held), "steps": best.step}
    metrics |= {"loss": best.history[best.step]["loss"]} | best.held.written(model, out, len(held))
    protocol = Protocol(
        task="caption", data=pairs.path, data_fingerprint=fingerprint(pairs.fingerprint, held.rows.tolist()), split="held out",
        settings={"column": column, "decoding": "greedy", "references": MOST_TEXTS}, encoder=str(out),
        encoder_hash=weights_hash(model), seed=config.seed,
    )  # fmt: skip
    result = Result(metrics=metrics, protocol=protocol, seconds=time.monotonic() - began)
    if world()[0] == 0:
        result.write(out)
    return result


def _begin(out: Path, asked: dict[str, Any], resume: bool) -> None:
    """Note in the folder what is asked for, or see that an earlier start was asked for the same. Raises `ConfigError`."""
    note = out / "captioner.json"
    if not resume and any((out / name).exists() for name in (note.name, "recipe.yaml", "model")):
        raise ConfigError(
            f"{out} already holds a captioner or a run. Add --resume to go on with it, or choose another --out."
        )
    if note.exists() and (then := json.loads(note.read_bytes())) != asked:
        parts = [(then, asked, key) for key in ("column", "captions")] + [
            (then["config"], asked["config"], key) for key in asked["config"]
        ]
        differ = "; ".join(f"{key}: {a.get(key)!r} then, {b[key]!r} now" for a, b, key in parts if a.get(key) != b[key])
        raise ConfigError(f"{out} was begun otherwise ({differ}). Resume with the same, or choose another --out.")
    barrier()  # all have looked
    if world()[0] == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(note, json.dumps(asked, indent=2).encode())
    barrier()


def split(pairs: Pairs, column: str, config: CaptionerConfig) -> tuple[Rows, Rows]:
    """The rows with a caption, those to learn from and those held out: which is which follows from keys and seed."""
    pairs.check_columns([column])
    ranked = []
    for start in range(0, len(pairs), 4096):
        rows = range(start, min(start + 4096, len(pairs)))
        for row, values in zip(rows, pairs.read(rows, ["key", column]), strict=True):
            found = values[column]
            if not isinstance(found, str | list | None):
                raise DataError(f"the column {column!r} holds no text but {found!r}: name one of captions with --from.")
            if texts_in(found):
                ranked.append((key(config.seed, str(values["key"])), row))
    if len(ranked) < 3:
        raise DataError(
            f"{len(ranked)} rows of {pairs.path!r} have a caption in {column!r}, and a captioner needs three at the very "
            "least (some hundreds to be of use): two to learn from and one to be tested on. Name another column with --from."
        )
    count = min(MOST_HELD_OUT, max(1, round(config.held_out * len(ranked))), len(ranked) - 2)
    held = sorted(row for _, row in sorted(ranked)[:count])
    learnt = sorted(row for _, row in sorted(ranked)[count:])
    return Rows(pairs, learnt, []), Rows(pairs, held, [])


def _with_others(learnt: Rows, held: Rows, also: list[str], good: float) -> Rows:
    """The rows with a good caption, each as often as makes them the share `good`, and those with other text."""
    if good == 1 or not also:
        return learnt
    others = np.setdiff1d(np.arange(len(learnt.pairs)), np.concatenate([learnt.rows, held.rows]), assume_unique=True)
    times = max(1, round(good / (1 - good) * len(others) / len(learnt)))
    return Rows(learnt.pairs, np.concatenate([np.tile(learnt.rows, times), others]), [learnt.fingerprint, also, good])


def _write_words(learnt: Rows, column: str, out: Path, tower: TowerConfig) -> int:
    """Write the files of ids that the objectives read: tokens that occur, and content words; returns how many of these.

    A word that few pictures have cannot be learnt from them, and a thousand such words drown the others in noise.
    """
    tokenizer = towers.Tokenizer(towers.build(tower))
    pictures = Counter(i for texts in _texts(learnt, column) for i in set(tokenizer(texts).flatten().tolist()))
    ids = sorted(pictures.keys() - {0})
    least = min(RARE, len(learnt) // 300)
    words = [i for i in ids if pictures[i] >= least and _is_word(tokenizer.tokenizer.decode([i]).strip())]
    if world()[0] == 0:
        write_atomic(out / VOCABULARY, json.dumps(ids).encode())
        write_atomic(out / CLASSES, json.dumps(words).encode())
    barrier()
    return len(words)


def _fitted(config: CaptionerConfig, rows: int) -> CaptionerConfig:
    """Batches no larger than the data."""
    parts = {n: part for n, part in (("train", config.train), ("image", config.image)) if part is not None}
    return config.model_copy(update={n: p.model_copy(update={"batch": min(p.batch, rows)}) for n, p in parts.items()})


def _catlip(columns: list[str], out: Path, config: CaptionerConfig, weight: float) -> dict[str, Any]:
    return {"weight": weight, "classes": str(out / CLASSES), "texts": columns, "positive": config.positive}


def _recipe(
    pairs: Pairs, column: str, config: CaptionerConfig, how: TrainConfig, tower: TowerConfig,
    objectives: dict[str, dict[str, Any]],
) -> Recipe:  # fmt: skip
    return Recipe(
        name="captioner",
        seed=config.seed,
        data=DataConfig(pairs=pairs.path, text=TextConfig(columns={column: 1.0}), augment=config.augment),
        towers=tower,
        objectives=Objectives(**{name: options for name, options in objectives.items() if options["weight"]}),
        train=how,
    )


def _preset(pairs: Pairs) -> str:
    """A CoCa for the size of the pictures, by the first of them."""
    sizes = [
        min(r["width"], r["height"]) for r in pairs.read(range(min(64, len(pairs))), ["width", "height"]) if r["width"]
    ]
    return "coca-tiny-64" if sizes and sorted(sizes)[len(sizes) // 2] <= 96 else "coca-tiny-112"


def _is_word(piece: str) -> bool:
    return piece.isalpha() and len(piece) > 2 and piece not in STOPWORDS and piece not in MEDIA


def _texts(rows: Rows, column: str) -> Iterator[list[str]]:
    for start in range(0, len(rows), 256):
        read = rows.read(range(start, min(start + 256, len(rows))), [column])
        yield [text for row in read for text in texts_in(row[column])]


class HeldOut:
    """Rows that a captioner is judged by."""

    def __init__(self, rows: Rows, column: str) -> None:
        self.rows, self.column = rows, column

    def batches(self, model: towers.Model) -> Iterator[tuple[torch.Tensor, list[str], list[list[str]]]]:
        """Pictures (B, 3, S, S), keys, and their references; pictures that cannot be read are left out."""
        transform, device = test_transform(model), next(model.parameters()).device
        for start in range(0, len(self.rows), BATCH):
            indices = range(start, min(start + BATCH, len(self.rows)))
            read = self.rows.read(indices, ["key", "image", self.column])
            ready = [(row, p) for row in read if not isinstance(p := picture_of(row), Failed)]
            if ready:
                images = torch.stack([transform(p) for _, p in ready]).to(device)
                texts = [texts_in(row[self.column])[:MOST_TEXTS] for row, _ in ready]
                yield images, [str(row["key"]) for row, _ in ready], texts

    @torch.no_grad()
    def loss(self, model: Any, objective: captioning.Objective) -> float:
        """Mean of the captioning loss over batches of held-out pictures, in eval mode."""
        tokenizer, losses = towers.Tokenizer(model), []
        training = model.training
        model.eval()
        for images, _, texts in self.batches(model):
            owners = torch.tensor([i for i, found in enumerate(texts) for _ in found], device=images.device)
            tokens = tokenizer.trimmed(tokenizer([t for found in texts for t in found])).to(images.device)
            _, pictures = model.image_and_tokens(images)
            _, states = model.text_and_tokens(tokens)
            states = model.decode(pictures[owners], states[:, :-1])
            loss, _, _ = objective.loss(states, tokens[:, 1:], model.text_decoder.text_projection)
            losses.append((float(loss), len(tokens)))
        model.train(training)
        if not losses:
            raise DataError("no held-out picture can be read; `cutline pairs check` tells what is wrong with them.")
        return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)

    def written(self, model: Any, captioner: Path, most: int = LOOK) -> dict[str, float]:
        """Scores of what the model writes for (at most `most`) held-out pictures, greedily, against all references."""
        vocabulary = json.loads((captioner / VOCABULARY).read_text())
        decoding = CocaWriter(str(captioner), "caption").decoding()
        training = model.training
        model.eval()
        decoder, tokenizer = CocaDecoder(model, decoding, vocabulary), towers.Tokenizer(model).tokenizer
        captions: list[str] = []
        references: list[list[str]] = []
        for images, keys, texts in self.batches(model):
            captions += [plain(tokenizer.decode(ids[0])) for ids in decoder(images, keys)]
            references += texts
            if len(captions) >= most:
                break
        model.train(training)
        words = [set(words_of(c)) - STOPWORDS for c in captions]
        overlap = word_overlap(words, [set(words_of(" ".join(refs))) - STOPWORDS for refs in references])
        scores = {"cider_d": cider_d(captions, references), "bleu_4": bleu_4(captions, references)}
        return scores | {f"content_{name}": value for name, value in overlap._asdict().items()}


class Best:
    """A `Watch`: keeps the model that writes the best captions (by CIDEr-D), and stops after `patience` looks without a
    better one. (The held-out loss rises long before: the decoder grows sure of its phrases, not wrong about the picture.)
    """

    def __init__(self, held: HeldOut, out: Path, patience: int) -> None:
        self.held, self.patience, self.kept, self.note = held, patience, out / "best", out / "held_out.json"
        self.out = out
        self.history: dict[int, dict[str, float]] = {}  # step → scores

    @property
    def step(self) -> int:
        """The best so far; where CIDEr-D tells nothing (of one picture it is always 0), by content words, then by the loss."""
        return max(self.history, key=lambda step: (*self._rank(self.history[step]), -step))

    @staticmethod
    def _rank(scores: dict[str, float]) -> tuple[float, float, float]:
        return scores["cider_d"], scores["content_f1"], -scores["loss"]

    def __call__(self, run: Run) -> bool:
        if not self.history and run.step > run.recipe.train.save_every and self.note.exists():
            known = {int(step): scores for step, scores in json.loads(self.note.read_bytes()).items()}
            self.history = {step: scores for step, scores in known.items() if step <= run.step}
        if run.step not in self.history:
            model, objective = run.final(), run.trainee.objectives["captioning"]
            assert isinstance(objective, captioning.Objective)
            scores = {"loss": self.held.loss(model, objective)} | self.held.written(model, self.out)
            self.history[run.step] = same_on_all(scores)
            if world()[0] == 0:
                self._write(run, model)
            barrier()
        return len([step for step in self.history if step > self.step]) >= self.patience

    def _write(self, run: Run, model: towers.Model) -> None:
        """On the first process: the model, if it is the best, and the scores so far."""
        if self.step == run.step:
            aside = self.kept.with_name(".best")
            towers.save(model, aside)
            shutil.rmtree(self.kept, ignore_errors=True)
            aside.rename(self.kept)
        write_atomic(self.note, json.dumps(self.history).encode())
