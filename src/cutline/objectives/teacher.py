"""What the self-distillation objectives `silc` and `masked` share: EMA teacher, prototype head, centre, collapse measures.

Teacher and student are two copies of the image tower and of a head that maps a feature x to K logits, the cosines
with K learned prototypes (DINO, Caron et al., 2104.14294, section 3.1, equations 1, 2 and 4, and its head):

    z(x) = W/|W| · h/|h|,  h = MLP(x)
    p_t = softmax((z_t − c) / τ_t),  p_s = softmax(z_s / τ_s),  L = −Σ_k p_t log p_s
    after a step:  θ_t ← m θ_t + (1 − m) θ_s,  c ← m_c c + (1 − m_c) mean(z_t)

The centre c (a mean over all processes) keeps one prototype from taking everything, the low temperature τ_t keeps the
teacher from saying the same of everything. Sinkhorn–Knopp, which DINOv2 has in place of the centre, is left out: it
spreads each batch evenly over the prototypes, and a batch smaller than their number cannot be spread so. Where a small
batch makes training stall, raise τ_t (to 0.07) and take fewer prototypes.

m is one number for the whole run, and does not rise to 1 as DINO's does: a teacher that hardly moves any more would not
learn what the text loss goes on teaching the student (SILC, Naeem et al., 2310.13355, section 3.2).

The teacher tower is one for all objectives of a recipe that agree on m, and sees a picture once. Teacher and centre have
no gradients, are in no group of the optimiser, and are saved with the objective.

Shapes: B pictures, R rows (pictures or patches), G, L views of a row, W width of a feature, E bottleneck, K prototypes.
"""

import copy
import math
from collections.abc import Iterator
from itertools import pairwise
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cutline.objectives import base
from cutline.objectives.chunked import chunked
from cutline.objectives.collapse import LEAST_INFORMATION, LEAST_STD, spread
from cutline.objectives.contrastive import widen
from cutline.objectives.gather import world
from cutline.towers import load_encoder
from cutline.towers.encoder import Encoder
from cutline.towers.model import Model
from cutline.towers.vit import NativeViT, TimmViT

AT_ONCE = 2**26  # logits made at a time (256 MiB): with 32,768 prototypes those of a batch's patches would fill a GPU


class Config(base.ObjectiveConfig):
    """momentum: m. prototypes, hidden, bottleneck: of the head. student_temperature, teacher_temperature: τ_s, τ_t.
    centre_momentum: m_c.

    SILC's own numbers are not published; m is the value remembered of it (low confidence), the rest is DINO's, with the
    32,768 prototypes of TIPS.
    """

    momentum: float = Field(0.966, ge=0, lt=1)
    prototypes: int = Field(32768, ge=2)
    hidden: int = Field(2048, ge=1)
    bottleneck: int = Field(256, ge=1)
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: float = Field(0.04, gt=0)
    centre_momentum: float = Field(0.9, ge=0, lt=1)


class Teacher(nn.Module):
    """The EMA of a model's image tower: always in eval mode, without gradients."""

    def __init__(self, model: Model, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.encoder: Encoder = copy.deepcopy(load_encoder(model)).requires_grad_(False).eval()
        self._pictures: Tensor | None = None
        self._seen: tuple[Tensor, Tensor | None] | None = None
        self._step: int | None = None

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in eval mode: no dropout, no drop path, batch norms by the statistics that follow the student's."""
        return super().train(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) of the tower's size → pooled features (B, D) and those of patches (B, N, C), None of other towers
        than plain ViTs. A second call with the same pictures gives what the first gave."""
        if self._seen is None or images is not self._pictures:
            with torch.no_grad():
                self._seen = self._look(images)
            self._pictures = images
        return self._seen

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        encoder = self.encoder
        if not isinstance(encoder, NativeViT | TimmViT):
            return encoder.pooled(images), None
        pooled, patches = encoder.replaced(images)
        return pooled, encoder.last_norm(patches)

    def follow(self, model: nn.Module, step: int) -> None:
        """Move towards the tower of `model`, once a step however many objectives ask."""
        self._pictures = self._seen = None
        if step != self._step:
            move(self.encoder.visual, model.visual, self.momentum)  # type: ignore[arg-type]
            self._step = step


@torch.no_grad()
def move(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher ← momentum · teacher + (1 − momentum) · student, for parameters and buffers; whole numbers are copied."""

    def tensors(module: nn.Module) -> Iterator[Tensor]:
        yield from module.parameters()
        yield from module.buffers()

    pairs = list(zip(tensors(teacher), tensors(student), strict=True))
    own, new = zip(*[p for p in pairs if p[0].is_floating_point()], strict=True)
    get_ema_multi_avg_fn(momentum)(own, new, None)  # type: ignore[no-untyped-call]
    for ours, theirs in pairs:
        if not ours.is_floating_point():
            ours.copy_(theirs)


_teachers: WeakKeyDictionary[nn.Module, WeakValueDictionary[float, Teacher]] = WeakKeyDictionary()


def teacher_of(model: Model, momentum: float) -> tuple[Teacher, bool]:
    """The teacher of `model` with this momentum, and whether it was made now: who is told so holds and saves it."""
    known = _teachers.setdefault(model, WeakValueDictionary())
    teacher = known.get(momentum)
    if teacher is not None:
        return teacher, False
    known[momentum] = teacher = Teacher(model, momentum)
    return teacher, True


class Head(nn.Module):
    """Three layers to a unit vector of E numbers, and K prototypes of which only the directions count."""

    def __init__(self, width: int, config: Config) -> None:
        super().__init__()
        sizes = [width, config.hidden, config.hidden, config.bottleneck]
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)  # DINO's 0.02, where 2,048 come in
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        self.last = nn.Linear(config.bottleneck, config.prototypes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, W) → unit vectors (…, E), in float32 or wider."""
        return F.normalize(widen(self.mlp(x)), dim=-1)

    def prototypes(self) -> Tensor:
        """Unit vectors (K, E)."""
        return F.normalize(self.last.weight, dim=-1)


class Prototypes(nn.Module):
    """The two heads and the centre: features of teacher and student → the loss between them."""

    centre: Tensor

    def __init__(self, width: int, config: Config) -> None:
        super().__init__()
        self.config = config
        self.student = Head(width, config)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(config.prototypes))
        self.seen: list[
            tuple[Tensor, int]
        ] = []  # mean logits since the last step, over all processes, and of how many rows

    def forward(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """teacher (R, G, W), student (R, L, W) → mean loss over all pairs of a row's views, and what to log.

        Logged, over all processes: `entropy/mean`, of the teacher's mean assignment, and `entropy/each`, the mean over
        single ones, in nats. Their difference is what an assignment tells of its picture; at 0 training has collapsed,
        be it that one prototype takes all (both 0) or that all pictures look alike (both high).
        """
        config = self.config
        with torch.no_grad():
            seen = self.teacher(teacher)  # (R, G, E)
        said = self.student(student)
        # Half precision would round cosines to 1/256, and logits, 1/τ_t times as large, to a tenth.
        with torch.autocast(said.device.type, enabled=False):
            own, other = self.teacher.prototypes(), self.student.prototypes()
            sums = said.new_zeros(config.prototypes + 1)  # of the teacher's assignments, and of their entropies

            def rows(seen: Tensor, said: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
                target = assign(seen @ own.T, self.centre, config.teacher_temperature)
                with torch.no_grad():
                    sums.add_(torch.cat([target.sum((0, 1)), entropy(target).sum().view(1)]))
                each = cross_entropy(target, said @ other.T / config.student_temperature)
                return each.sum(), each.new_zeros(())

            chunk = max(1, AT_ONCE // ((seen.shape[1] + said.shape[1]) * config.prototypes))
            loss, _ = chunked(rows, chunk, (seen, said), (other,))
            mean = own @ seen.mean((0, 1))  # as the logits are linear in `seen`
            shared = torch.cat([sums / (seen.shape[0] * seen.shape[1]), mean])
        if world()[1] > 1:
            torch.distributed.all_reduce(shared)
            shared /= world()[1]
        k = config.prototypes
        self.seen.append((shared[k + 1 :], len(said)))
        return loss / len(said), {"entropy/mean": entropy(shared[:k]), "entropy/each": shared[k]}

    @torch.no_grad()
    def follow(self) -> None:
        """Move the teacher's head and the centre; call it after a step."""
        move(self.teacher, self.student, self.config.momentum)
        mean = torch.stack([m * n for m, n in self.seen]).sum(0) / sum(n for _, n in self.seen)
        self.seen.clear()
        self.centre.lerp_(mean, 1 - self.config.centre_momentum)


def assign(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """The teacher's logits (…, K) → its assignments, softmax((z − c) / τ)."""
    return ((logits - centre) / temperature).softmax(-1)


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """Assignments (R, G, K) and the student's logits over its temperature (R, L, K) → (R,): the mean over the G·L pairs.

    It is linear in the target, so the mean over pairs is that against the mean target.
    """
    mean = target.mean(1)  # (R, K)
    return logits.logsumexp(-1).mean(1) - (mean * logits.mean(1)).sum(-1)


def entropy(p: Tensor) -> Tensor:
    """Of distributions (…, K), in nats: (…)."""
    each: Tensor = torch.special.entr(p)
    return each.sum(-1)


class SelfDistillation(base.Objective):
    """Base of `silc` and `masked`: holds the teacher, lets it follow, and says when training has collapsed.

    prototypes: made by the method, for the features it compares.
    """

    needs_text = False
    own_passes = True
    config: Config
    prototypes: Prototypes

    def __init__(self, config: Config, model: Model) -> None:
        super().__init__(config, model)
        teacher, mine = teacher_of(model, config.momentum)
        self._teacher: tuple[Teacher] = (teacher,)  # in a tuple: not a part of this module
        if mine:
            self.teacher = teacher
        self._student: tuple[Encoder] = (load_encoder(model),)

    @property
    def tower(self) -> Teacher:
        """The teacher's tower, whoever holds it."""
        return self._teacher[0]

    @property
    def student(self) -> Encoder:
        """The image tower that is trained."""
        return self._student[0]

    def distil(self, teacher: Tensor, student: Tensor, pictures: Tensor) -> Tensor:
        """teacher (R, G, W), student (R, L, W) → the loss; what shows a collapse is logged, with the spread of `pictures`,
        what the teacher sees in each (B, W)."""
        loss: Tensor
        loss, logged = self.prototypes(teacher, student)
        self.logged = logged | spread(pictures)
        return loss

    def after_step(self, model: nn.Module, step: int) -> None:
        self.tower.follow(model, step)
        self.prototypes.follow()
        self.collapse = ""
        if "feature_std" not in self.logged:
            return  # of one picture
        mean, each, std = (float(self.logged[which]) for which in ("entropy/mean", "entropy/each", "feature_std"))
        if mean - each < LEAST_INFORMATION or std < LEAST_STD:
            flat = each > math.log(self.config.prototypes) / 2  # all prototypes alike, or one for everything
            fix = "Lower teacher_temperature" if flat else "Raise teacher_temperature (0.07), take fewer prototypes"
            self.collapse = (
                f"self-distillation has collapsed: the teacher says the same of every picture (entropy of its mean assignment "
                f"{mean:.3f} nats, of a single one {each:.3f}; feature std {std:.3f}). {fix}, or train with a larger batch or a "
                f"lower train.lr."
            )

    def after_skip(self) -> None:
        self.prototypes.seen.clear()
