"""Distillation of teachers' similarities, MobileCLIP (Vasu et al., 2311.17049, section 3.1, equation 3).

    P_k(U, V) = softmax over V of s_k · <U, V>       of teacher k, with its own scale s_k; Q likewise of the student
    L = ½ [ −(1/B) Σ_i Σ_j P̄_ij log Q_ij (pictures → texts)  +  the same of texts → pictures ],    P̄ = mean_k P_k

the mean of the teachers' softmaxes, not the softmax of their mean. Its gradient is that of the KL divergence, from which L
differs by the entropy of P̄, which is logged. All pictures and texts of all processes are compared; teachers have no
gradient. With rule `sum` there is one such loss per caption column, times the column's weight: L(real) + L(synthetic),
as in the paper. Where pictures have several texts (rule `all`) every text is compared, and in texts → pictures a
picture's texts together weigh as much as another picture's.

λ is the recipe's: `contrastive: {weight: 0.25}` beside `distill: {weight: 0.75}` is λ = 0.75, as for MobileCLIP-B, and
`distill` alone is λ = 1, as for its smaller models and its trainings on 12 M.

Teachers are either *stored* (DataCompDR): the embeddings that `cutline reinforce` has put beside the pictures, of the
very augmentation and captions that were drawn (`data.replay` names them); or *online*: an open_clip model that looks at
each batch at its own size, with its own mean and deviation. An online teacher sees the student's view, resized, and the
student's tokens, so it must have the same tokeniser. It is in no checkpoint, but loaded again by its name; a run does not
resume with one that has other weights by then.
"""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cutline import towers
from cutline.errors import ConfigError
from cutline.objectives import base
from cutline.objectives.chunked import chunked
from cutline.objectives.contrastive import widen
from cutline.objectives.gather import gather, gather_plain, pair, world
from cutline.towers.model import Model
from cutline.towers.pictures import weights_hash
from cutline.towers.store import preprocess_of

# What `train.stream.replay` (a room above this one) calls the stored embeddings of what was drawn, and whose they are.
IMAGE, TEXT, TEACHERS = "teacher/image", "teacher/text", "teachers"


class Config(base.ObjectiveConfig):
    """teacher: an online one, a name for `towers.load` (None: the stored ones); logit_scales: instead of the teachers' own,
    in their order (MobileCLIP: 100 for each; MobileCLIP2: 70, 60); chunk: rows compared at a time (None: all)."""

    teacher: str | None = None
    logit_scales: list[Annotated[float, Field(gt=0)]] | None = None
    chunk: int | None = Field(None, ge=1)


class Taught(NamedTuple):
    """What teachers say of a batch: their embeddings side by side, image (b, W) and text (m, W) of each source.

    widths: of each teacher's part, which is of length 1 in `text` and of the length of its logit scale in `image`, so
    that the product of two parts is a logit.
    """

    image: Tensor
    text: dict[str, Tensor]
    widths: list[int]


class Objective(base.Objective):
    config: Config

    def __init__(self, config: Config, model: Model) -> None:
        super().__init__(config, model)
        # In a tuple: not a part of this module, which is trained, copied to every process and saved.
        self.online = () if config.teacher is None else (OnlineTeacher(config.teacher, model),)

    def get_extra_state(self) -> str:
        """The hash of the online teacher's weights, for a checkpoint."""
        return self.online[0].hash if self.online else ""

    def set_extra_state(self, state: str) -> None:
        if self.online and state != self.get_extra_state():
            raise ConfigError(
                f"the teacher {self.config.teacher!r} has other weights than when this run began: put those back, or train anew."
            )

    def columns(self) -> list[str]:
        return [] if self.online else [IMAGE, TEXT]

    def forward(self, batch: base.Batch, features: base.Features) -> dict[str, Tensor]:
        """One term per text source; what it cannot fall below, the entropy of the teachers' softmaxes times the source's
        weight, is logged (`entropy`)."""
        given = self.config.logit_scales
        taught = self.online[0](batch, given, features.rows) if self.online else stored(batch, given)
        image, scale, (_, size) = widen(features.image()), features.logit_scale(), world()
        compare = partial(chunked, partial(_rows, taught.widths), self.config.chunk)
        pictures = (gather(image), gather_plain(taught.image), scale)  # of all processes, for all sources
        equal = image.new_full((len(image),), 1 / len(image))
        terms = {}
        for source, texts in batch.texts.items():
            text, said = widen(features.text(source)), taught.text[source]
            pairing = pair(texts.owners, len(image), texts.paired)
            share = pairing.share.to(image.dtype)[pairing.own] * size
            with torch.autocast(image.device.type, enabled=False):
                captions = (pairing.gather(text), pairing.gather(said), scale)
                to_text, entropy_text = compare((image, taught.image, equal), captions)
                to_image, entropy_image = compare((text, said, share), pictures)
            terms[source] = texts.weight * (to_text + to_image) / 2
            self.logged[f"entropy/{source}"] = texts.weight * (entropy_text + entropy_image) / 2
        return terms


def _rows(
    widths: list[int], query: Tensor, asked: Tensor, weight: Tensor, keys: Tensor, told: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Student and teachers, each row against all keys → weighted sums of the cross-entropies and of the targets' entropies."""
    parts = zip(torch.split(asked, widths, 1), torch.split(told, widths, 1), strict=True)
    target = torch.stack([(a @ b.T).softmax(1) for a, b in parts]).mean(0)  # (rows, keys)
    log = (scale * query @ keys.T).log_softmax(1)
    return -weight @ (target * log).sum(1), weight @ torch.special.entr(target).sum(1)


def stored(batch: base.Batch, logit_scales: list[float] | None) -> Taught:
    """The embeddings that come with a replayed batch. Raises `ConfigError` for another number of `logit_scales`."""
    teachers: Any = batch.columns[TEACHERS]  # each with its width and logit_scale
    widths = [t.width for t in teachers]
    text = {source: batch.columns[f"{TEXT}/{source}"] for source in batch.texts}
    return _taught(batch.columns[IMAGE], text, widths, [t.logit_scale for t in teachers], logit_scales)


def _taught(
    image: Tensor, text: dict[str, Tensor], widths: list[int], scales: list[float], given: list[float] | None
) -> Taught:
    if given is not None and len(given) != len(scales):
        raise ConfigError(
            f"objectives.distill.logit_scales has {len(given)} values, and the teachers are {len(scales)}: "
            "give one for each, in their order, or leave it out for their own."
        )

    def parts(x: Tensor) -> list[Tensor]:
        # Normalised again, as half precision has rounded their lengths.
        return [F.normalize(part, dim=1) for part in torch.split(widen(x), widths, 1)]

    scaled = [s * part for s, part in zip(given or scales, parts(image), strict=True)]
    return Taught(torch.cat(scaled, 1), {source: torch.cat(parts(x), 1) for source, x in text.items()}, widths)


class OnlineTeacher:
    """A frozen model that embeds the student's batches: `teacher(batch, logit_scales)` → `Taught`.

    Raises `ConfigError` for a model without texts, with another tokeniser, or with a shorter context.
    """

    def __init__(self, name: str, student: Model) -> None:
        self.model = model = towers.load(name, next(student.parameters()).device).requires_grad_(False)
        if not model.model_cfg:
            raise ConfigError(f"the teacher {name!r} has no text tower: choose a CLIP (open_clip's, or a run).")
        theirs, mine = towers.Tokenizer(model), towers.Tokenizer(student)
        self.context, self.padding, self.trimmable = theirs.context, theirs.padding, theirs.trimmable
        if theirs.context < mine.context:
            raise ConfigError(
                f"the teacher {name!r} reads at most {theirs.context} tokens, and the student {mine.context}: "
                f"set towers.context_length={theirs.context}."
            )
        if not _same_tokens(theirs, mine):
            raise ConfigError(
                f"the teacher {name!r} has another tokeniser than the student, whose tokens it would read. Choose another "
                "teacher, or store its embeddings (`cutline reinforce --teachers …`) and set data.replay."
            )
        self.size: Any = preprocess_of(model)["size"]
        self.interpolation = "bilinear" if preprocess_of(model)["interpolation"] == "bilinear" else "bicubic"
        self.own, self.students = _channels(model), _channels(student)
        self.scale = float(model.logit_scale.exp())

    @cached_property
    def hash(self) -> str:
        return weights_hash(self.model)

    @torch.no_grad()
    def __call__(self, batch: base.Batch, logit_scales: list[float] | None = None, rows: int | None = None) -> Taught:
        """rows: that pass the teacher at a time (None: all)."""

        def some(encode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            return torch.cat([encode(part) for part in torch.split(x, rows or len(x))])

        image = some(lambda x: self.model.encode_image(self.view(x)), batch.views["image"])
        text = {s: some(self.model.encode_text, self.tokens(t.tokens)) for s, t in batch.texts.items()}
        return _taught(image, text, [image.shape[1]], [self.scale], logit_scales)

    def view(self, images: Tensor) -> Tensor:
        """Pictures normalised for the student → as the teacher expects them."""
        (mean, std), (own_mean, own_std) = self.students, self.own
        pixels = images * std + mean
        size = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode=self.interpolation, antialias=True).clamp(0, 1)
        return (pixels - own_mean) / own_std

    def tokens(self, tokens: Tensor) -> Tensor:
        """As long as the teacher wants them."""
        missing = 0 if self.trimmable else self.context - tokens.shape[1]
        return F.pad(tokens, (0, missing), value=self.padding)


def _channels(model: Model) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the pictures of a model, (3, 1, 1) each."""
    values, device = preprocess_of(model), next(model.parameters()).device
    mean, std = (torch.tensor(values[k], device=device).view(3, 1, 1) for k in ("mean", "std"))
    return mean, std


def _same_tokens(a: towers.Tokenizer, b: towers.Tokenizer) -> bool:
    """By what they make of a few words, each far shorter than a context: names and files of equal ones differ."""
    words = ["a cat", "Hello!", "naïve", "3.14", "it's", "東京", "two  dogs"]
    n = min(a.context, b.context)
    return a.padding == b.padding and torch.equal(a(words)[:, :n], b(words)[:, :n])
