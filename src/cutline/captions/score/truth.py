"""Scores of a caption against the scene it was written for, where the truth is known: tables made by `cutline scenes`.

object_precision     of the kinds of objects that the caption names, the share that is in the scene
object_recall        of the kinds in the scene, the share that the caption names
object_f1            the harmonic mean of both; 0 for a caption that names nothing
attribute_precision  of the colours and numbers it tells, the share that is right
relation_precision   of the relations it tells, the share that holds
relation_recall      of the clear relations between kinds in the scene (left of, nearer than, beside), the share it tells
counts               what these are made of, for sums over a set

A share of nothing is null. Relations hold as `scenes.captions.relations` has it, which the renderer's own captions are
written by; orders in a row by where the objects stand.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa

from cutline.captions.score.base import Asked, provenance
from cutline.captions.score.parse import Claim, Mention, Said, parse
from cutline.captions.work import Failed, Made, Row, Worker
from cutline.errors import DataError
from cutline.pairs import Pairs, Provenance
from cutline.scenes.captions import Group, relations
from cutline.scenes.layout import Item, Scene, layout
from cutline.scenes.source import SceneConfig

COUNTS = (
    "objects_named", "objects_right", "objects_there", "attributes_told", "attributes_right",
    "relations_told", "relations_right", "relations_there", "relations_found",
)  # fmt: skip
SHARES = {  # score → the counts it is the share of
    "object_precision": ("objects_right", "objects_named"),
    "object_recall": ("objects_right", "objects_there"),
    "attribute_precision": ("attributes_right", "attributes_told"),
    "relation_precision": ("relations_right", "relations_told"),
    "relation_recall": ("relations_found", "relations_there"),
}
KINDS: dict[str, pa.DataType] = dict.fromkeys(("object_f1", *SHARES), pa.float32()) | {
    "counts": pa.struct([(name, pa.int16()) for name in COUNTS])
}
_KEY = re.compile(r"s(\d+)-(\d{8,})")
_HOLDS = {"nearer": {"front", "nearer"}, "farther": {"behind", "farther"}}  # what else makes a relation true
_MIRRORED = {"right": "left", "behind": "nearer", "farther": "nearer"}
_FACT = {"left": "left", "front": "nearer", "nearer": "nearer", "beside": "beside"}
Fact = tuple[str, int, int]  # "left", "nearer" or "beside", and two kinds


@dataclass(frozen=True)
class TruthScores:
    """The scores above as one `Work`. world: the scenes that the table holds."""

    asked: Asked
    world: SceneConfig

    @property
    def reads(self) -> list[str]:
        return [self.asked.column]

    @property
    def writes(self) -> dict[str, pa.DataType]:
        return self.asked.writes(KINDS)

    def provenance(self) -> Provenance:
        return provenance(self.asked, self.reads, scenes=self.world.model_dump(mode="json"))

    def load(self) -> Worker:
        return _TruthWorker(self)


class _TruthWorker(Worker):
    def __init__(self, work: TruthScores) -> None:
        self.asked, self.world = work.asked, work.world

    def make(self, prepared: list[Row]) -> Made:
        texts, places = self.asked.texts(prepared)
        counts: list[dict[str, int]] = []
        unknown: dict[int, Failed] = {}
        for i, (row, mine) in enumerate(zip(prepared, places, strict=True)):
            named = _KEY.fullmatch(row["key"])
            if named is None or int(named[1]) != self.world.seed:
                unknown[i] = Failed("no scene of the world has this key")
                counts += [dict.fromkeys(COUNTS, 0) for p in mine if p >= 0]
            elif any(p >= 0 for p in mine):
                scene = layout(self.world.seed, int(named[2]), self.world.objects)
                counts += [judge(parse(texts[p]), scene) for p in mine if p >= 0]
        values = [scores(c) for c in counts]
        made = self.asked.made({n: [v[n] for v in values] for n in self.asked.names}, places)
        return [unknown.get(i, m) for i, m in enumerate(made)]


def world_of(pairs: Pairs) -> SceneConfig:
    """The scenes that a table holds; raises `DataError` if it was not made by `cutline scenes`."""
    made = pairs.provenance("key")
    if made is None or made.how != "scenes":
        raise DataError(
            f"the truth is known only for scenes, and {pairs.path!r} was not made by `cutline scenes`: leave it out."
        )
    return SceneConfig.model_validate(made.settings)


def judge(said: Said, scene: Scene) -> dict[str, int]:
    """How much of what a caption says is true of the scene, and how much of the scene it says: the `COUNTS`."""
    there = {item.kind for item in scene.items}
    named = {m.kind for m in said.mentions}
    colours = [bool(_items(m, scene, (c,))) for m in said.mentions for c in m.colours]
    numbers = [_number(said.mentions, kind, scene) for kind in sorted(named)]
    attributes = colours + [right for right in numbers if right is not None]
    rows = [_in_row(row, scene) for row in said.rows]
    claims = [_holds(claim, scene) for claim in said.claims] + [right for row in rows for right in row.adjacent]
    facts = _facts(scene)
    found = {f for claim in said.claims if _holds(claim, scene) for f in [_fact(claim.relation, claim.a, claim.b)]}
    found |= {f for row in rows for f in row.facts}
    values = (
        len(named), len(named & there), len(there), len(attributes), sum(attributes),
        len(claims), sum(claims), len(facts), len(facts & found),
    )  # fmt: skip
    return dict(zip(COUNTS, values, strict=True))


def scores(counts: Mapping[str, int]) -> dict[str, Any]:
    """The scores of these counts, of one caption or summed over many."""
    shares = {name: _share(counts[part], counts[whole]) for name, (part, whole) in SHARES.items()}
    f1 = _share(2 * counts["objects_right"], counts["objects_named"] + counts["objects_there"]) or 0.0
    return {"object_f1": f1, **shares, "counts": dict(counts)}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _items(mention: Mention, scene: Scene, colours: Sequence[str] = ()) -> tuple[Item, ...]:
    """The items of the scene that a mention may mean: of its kind, and of one of the colours, if there are any."""
    return tuple(i for i in scene.items if i.kind == mention.kind and (not colours or i.colour in colours))


def _number(mentions: Iterable[Mention], kind: int, scene: Scene) -> bool | None:
    """Whether the caption tells the right number of a kind, in all; None where it does not tell it."""
    numbers = [m.number for m in mentions if m.kind == kind]
    told = [n for n in numbers if n is not None]
    return None if len(told) < len(numbers) else sum(told) == len(_items(Mention(kind), scene))


def _holds(claim: Claim, scene: Scene) -> bool:
    a, b = (_items(m, scene, m.colours) for m in (claim.a, claim.b))
    if not a or not b:
        return False
    return bool(_HOLDS.get(claim.relation, {claim.relation}) & set(relations(Group(a, ""), Group(b, ""))))


def _fact(relation: str, a: Mention, b: Mention) -> Fact:
    """A relation as `_facts` has it."""
    if relation in _MIRRORED:
        return (_MIRRORED[relation], b.kind, a.kind)
    x, y = (a.kind, b.kind) if relation != "beside" or a.kind < b.kind else (b.kind, a.kind)
    return (_FACT[relation], x, y)


def _facts(scene: Scene) -> set[Fact]:
    """The clear relations of the scene's kinds, each told once."""
    mentions = [Mention(kind) for kind in sorted({item.kind for item in scene.items})]
    groups = {m: Group(_items(m, scene), "") for m in mentions}
    return {_fact(r, a, b) for a in mentions for b in mentions if a != b for r in relations(groups[a], groups[b])}


@dataclass
class _Row:
    """adjacent: for every two neighbours of a told row, whether they stand so; facts: what it tells rightly of kinds."""

    adjacent: list[bool]
    facts: set[Fact]


def _in_row(row: Sequence[Mention], scene: Scene) -> _Row:
    """A row told from left to right against the order of the scene: right is what the longest common order holds."""
    told = [m for m in row for _ in range(m.number or 1)]
    stand = sorted(scene.items, key=lambda item: item.x)
    same = [[m.kind == i.kind and (not m.colours or i.colour in m.colours) for i in stand] for m in told]
    best = [[0] * (len(stand) + 1) for _ in range(len(told) + 1)]  # longest common order from these places on
    for t in reversed(range(len(told))):
        for s in reversed(range(len(stand))):
            best[t][s] = max(best[t + 1][s], best[t][s + 1], best[t + 1][s + 1] + 1 if same[t][s] else 0)
    kept, s = [False] * len(told), 0
    for t in range(len(told)):
        place = next((i for i in range(s, len(stand)) if same[t][i]), None)
        if place is not None and best[t + 1][place + 1] + 1 == best[t][s]:
            kept[t], s = True, place + 1
    right = [m.kind for m, k in zip(told, kept, strict=True) if k]
    facts = {("left", a, b) for i, a in enumerate(right) for b in right[i + 1 :] if a != b}
    return _Row([a and b for a, b in pairwise(kept)], facts)
