"""Five captions of a scene, each true of the picture and each saying something else.

Most of a caption's information is in the objects: which of 96, how many, their colours, how they stand to each other.
With six grounds and four skies in the world, a caption that always named them would let a batch be told apart without
looking at any object, so the ground is in a fifth of the captions or so and the sky in fewer.

Every scene's objects show at least half of themselves (see `layout`), so all may be named and counted. A relation is
stated only where the geometry is clear (the margins below).
"""

from dataclasses import dataclass
from itertools import pairwise

from cutline.scenes.dice import CAPTIONS, Dice
from cutline.scenes.layout import Item, Scene
from cutline.scenes.objects import GROUNDS, OBJECTS, SKIES

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
_ON = {"wooden floor": "a wooden floor", "tiles": "a tiled floor", "sand": "sand", "grass": "the grass"}
_UNDER = {"clear": "a clear sky", "cloudy": "a cloudy sky", "sunset": "a sunset sky", "overcast": "an overcast sky"}
APART = 1.3  # ratio of depths from which one thing is in front of another
_LASTS = (" and ", " and ", " and ", " with ", " plus ", " along with ", " as well as ")
LEVEL = 1.25  # ratio of depths up to which two things are side by side


@dataclass(frozen=True)
class Group:
    """All objects of one kind in a scene. colour: their common colour where the kind comes in several."""

    items: tuple[Item, ...]
    colour: str

    @property
    def kind(self) -> int:
        return self.items[0].kind


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" and not phrase.startswith("one") else "a ") + phrase


def captions(scene: Scene, seed: int, index: int) -> list[str]:
    """The five captions of scene `index` of the world `seed`, all different."""
    dice = Dice(seed, index, CAPTIONS)
    groups = dice.shuffled(_groups(scene))
    grounded = dice.below(5)
    writers = (_listed, _related, _distances, _ordered, _told)
    result: list[str] = []
    for i, writer in enumerate(writers):
        while True:
            text = writer(dice, groups, _place(dice, scene, i == grounded or dice.chance(0.06)))
            if len(text.split()) < 7 and dice.chance(0.7):
                text += _light(dice, scene)
            if _tidy(text) not in result:
                break
        result.append(_tidy(text))
    return dice.shuffled(result)


def _groups(scene: Scene) -> list[Group]:
    groups = []
    for kind in dict.fromkeys(item.kind for item in scene.items):
        items = tuple(item for item in scene.items if item.kind == kind)
        colours = {item.colour for item in items}
        groups.append(Group(items, colours.pop() if OBJECTS[kind].hues and len(colours) == 1 else ""))
    return groups


def _place(dice: Dice, scene: Scene, ground: bool) -> str:
    """Where it is: the ground if asked, now and then the sky."""
    name = GROUNDS[scene.ground]
    where = ""
    if ground:
        where = " on " + _ON.get(name, name)
    if dice.chance(0.08):
        where += " under " + _UNDER[SKIES[scene.sky]]
    return where


def _light(dice: Dice, scene: Scene) -> str:
    """A word on the light, for captions that would be very short."""
    red, green, blue = scene.light
    words = ["in bright light" if green > 0.95 else "in dim light" if green < 0.82 else "in even light"]
    if red / blue > 1.08:
        words.append("in warm light")
    if red / blue < 0.93:
        words.append("in cool light")
    return f", {dice.choice(words)}"


def _phrase(dice: Dice, group: Group, definite: bool = False) -> str:
    """A noun phrase for all of a group: "a red car", "three pears", "two cups, one red and one blue"."""
    o, n = OBJECTS[group.kind], len(group.items)
    name = o.other if o.other and dice.chance(0.25) else o.name
    many = name + "s" if name == o.other else o.many
    colour = group.colour + " " if group.colour and dice.chance(0.65) else ""
    if n == 1:
        return f"the {colour}{name}" if definite else article(colour + name)
    number = NUMBERS[n]
    phrase = f"{'the ' if definite else ''}{number} {colour}{many}"
    if n == 2 and o.hues and not group.colour and not definite and dice.chance(0.5):
        return f"one {group.items[0].colour} and one {group.items[1].colour} {name}"
    return phrase


def _join(dice: Dice, phrases: list[str], lasts: tuple[str, ...] = (" and ",)) -> str:
    if len(phrases) == 1:
        return phrases[0]
    last = dice.choice(lasts)
    return ", ".join(phrases[:-1]) + last + phrases[-1]


def _some(dice: Dice, groups: list[Group], most: int = 6) -> list[Group]:
    """The groups to name: all when there are up to four, mostly all when there are more."""
    chosen = dice.shuffled(groups)
    if len(groups) <= 4 or dice.chance(0.5):
        return chosen[:most]
    return chosen[: 4 + dice.below(len(groups) - 3)][:most]


def _list(dice: Dice, groups: list[Group]) -> str:
    return _join(dice, [_phrase(dice, g) for g in _some(dice, groups)])


def _be(group: Group) -> str:
    return "is" if len(group.items) == 1 else "are"


def _listed(dice: Dice, groups: list[Group], place: str) -> str:
    frame = dice.choice((
        "{}{}", "{}{}", "a picture of {}{}", "a photo showing {}{}", "here we see {}{}", "this is {}{}",
        "{}{}, nothing else", "the picture shows {}{}", "there {be} {}{}", "a scene with {}{}", "{}{} in one picture",
    ))  # fmt: skip
    chosen = _some(dice, groups, 8 if "nothing" in frame else 6)
    if len(chosen) < len(groups):
        frame = frame.replace(", nothing else", "")
    return str(frame.format(_join(dice, [_phrase(dice, g) for g in chosen], _LASTS), place, be=_be(chosen[0])))


def relations(a: Group, b: Group) -> list[str]:
    """Relations of a to b that are clear in the picture."""
    found = []
    wide = min(max(i.width for i in a.items), max(i.width for i in b.items))
    if max(i.x for i in a.items) + 0.5 * wide < min(i.x for i in b.items):
        found.append("left")
    if min(i.x for i in a.items) - 0.5 * wide > max(i.x for i in b.items):
        found.append("right")
    far, near = max(i.depth for i in a.items), min(i.depth for i in a.items)
    far_b, near_b = max(i.depth for i in b.items), min(i.depth for i in b.items)
    beside = all(abs(i.x - j.x) < 0.6 * (i.width + j.width) for i in a.items for j in b.items)
    if far * APART < near_b:
        found.append("front" if beside else "nearer")
    if near > far_b * APART:
        found.append("behind" if beside else "farther")
    close = all(abs(i.x - j.x) < 0.62 * (i.width + j.width) + 0.05 for i in a.items for j in b.items)
    if max(far, far_b) < LEVEL * min(near, near_b) and close:
        found.append("beside")
    return found


_WORDS = {
    "left": ("to the left of", "left of", "on the left side of"),
    "right": ("to the right of", "right of", "on the right side of"),
    "front": ("in front of",),
    "nearer": ("closer than", "nearer than", "closer to the camera than"),
    "behind": ("behind",),
    "farther": ("farther away than", "farther back than", "more distant than"),
    "beside": ("next to", "beside", "close to", "right by"),
}


def _pairs(groups: list[Group]) -> list[tuple[Group, str, Group]]:
    return [(a, r, b) for a in groups for b in groups if a is not b for r in relations(a, b)]


def _related(dice: Dice, groups: list[Group], place: str) -> str:
    """One relation, and what else there is."""
    pairs = _pairs(groups)
    if not pairs:
        return _looks(dice, groups, place)
    a, r, b = dice.choice(pairs)
    rest = [g for g in groups if g is not a and g is not b]
    words = dice.choice(_WORDS[r])
    pa, pb = _phrase(dice, a), _phrase(dice, b)
    frame = dice.below(4)
    if frame == 0 and r in ("left", "right", "front", "behind", "beside"):
        text = f"{words} {pb} there {_be(a)} {pa}{place}"
    elif frame == 1:
        text = f"{pa} {_be(a)} {words} {_phrase(dice, b, definite=dice.chance(0.5))}{place}"
    else:
        text = f"{pa} {words} {pb}{place}"
    if rest:
        more = _list(dice, rest)
        text += dice.choice((f", and also {more}", f"; there {_be(rest[0])} also {more}" if len(rest) == 1 else
                             f"; also {more}", f", with {more} in the picture too"))  # fmt: skip
    return text


def reach(depth: float) -> tuple[str, ...]:
    """Words for a distance in metres."""
    if depth < 0.6:
        return ("within arm's reach", "very near", "seen from up close", "right at hand")
    if depth < 1.6:
        return ("a step away", "near", "about a metre away")
    if depth < 4:
        return ("a few steps away", "a few metres away", "not far off")
    return ("far away", "many steps away", "well off in the distance")


def _distances(dice: Dice, groups: list[Group], place: str) -> str:
    """Near and far: in metres' words, or against each other."""
    by_depth = sorted(groups, key=lambda g: min(i.depth for i in g.items))
    first, last = by_depth[0], by_depth[-1]
    if len(groups) > 1 and max(i.depth for i in first.items) * APART < min(i.depth for i in last.items):
        middle = by_depth[1:-1]
        more = f", {_list(dice, middle)} besides" if middle else ""
        a, b = _phrase(dice, first), _phrase(dice, last)
        frame = dice.below(4)
        if frame == 0:
            return f"{a} in the foreground and {b} in the background{place}{more}"
        if frame == 1:
            return f"{a} close to the camera, {b} farther back{place}{more}"
        if frame == 2:
            return f"{b} {_be(last)} farther off{place}, {a} {_be(first)} nearest{more}"
        nearest, rearmost = reach(first.items[-1].depth), reach(first.items[0].depth)
        nearness = dice.choice(nearest) if nearest == rearmost else "in front"
        return f"{a}, {nearness}, with {b} behind at a distance{place}{more}"
    group = dice.choice(groups)
    depths = [i.depth for i in group.items]
    rest = [g for g in groups if g is not group]
    more = f", and {_list(dice, rest)}" if rest else ""
    near, far = reach(min(depths)), reach(max(depths))
    words = dice.choice(near) if near == far else "at different distances"
    return f"{_phrase(dice, group)}{place} {words}{more}"


def _ordered(dice: Dice, groups: list[Group], place: str) -> str:
    """From left to right, where the objects stand apart; else what is biggest."""
    row = sorted((i for g in groups for i in g.items), key=lambda i: i.x)
    apart = all(b.x - a.x > 0.25 * min(a.width, b.width) + 0.02 for a, b in pairwise(row))
    if len(groups) < 2 or len(row) > 6 or not apart:
        return _looks(dice, groups, place)
    backwards = dice.chance(0.35)
    row = row[::-1] if backwards else row
    names = []
    for item in row:
        o = OBJECTS[item.kind]
        colour = item.colour + " " if o.hues and dice.chance(0.4) else ""
        names.append(article(colour + o.name))
    way = "right to left" if backwards else "left to right"
    if len(row) == 2:
        side, other = ("right", "left") if backwards else ("left", "right")
        return f"{names[0]} on the {side} and {names[1]} on the {other}{place}"
    listing = ", ".join(names[:-1]) + dice.choice((", then ", " and ")) + names[-1]
    return dice.choice((f"from {way}: {listing}{place}", f"{listing}, {way}{place}", f"a row from {way} of {listing}"))


def _area(item: Item) -> float:
    return item.size * item.width * item.visible


def _looks(dice: Dice, groups: list[Group], place: str) -> str:
    """How large something looks, and the rest."""
    group = max(groups, key=lambda g: max(_area(i) for i in g.items))
    item = max(group.items, key=_area)
    largest = all(_area(item) > 1.3 * _area(i) for g in groups for i in g.items if i is not item)
    rest = [g for g in groups if g is not group]
    more = f", with {_list(dice, rest)}" if rest else ""
    phrase = _phrase(dice, group)
    if len(group.items) == 1 and _area(item) > 0.3:
        frame = dice.choice(("{} fills much of the picture{}{}", "{}, seen large{}{}", "a big view of {}{}{}"))
        return str(frame.format(phrase, place, more))
    if len(group.items) == 1 and rest and largest and dice.chance(0.7):
        return f"the largest thing to be seen is {phrase}{place}{more}"
    frame = dice.choice(("you can see {}{}{}", "{}{}{}, that is all", "what you see is {}{}{}"))
    if len(groups) > 4:
        frame = "you can see {}{}{}"
    return str(frame.format(phrase, place, more))


def _told(dice: Dice, groups: list[Group], place: str) -> str:
    """Counts and kinds: how many things, of which family; or another relation."""
    total = sum(len(g.items) for g in groups)
    families = {OBJECTS[g.kind].family for g in groups}
    listing = _list(dice, groups)
    frame = dice.below(5)
    if frame == 0 and total > 1 and len(groups) <= 4:
        return f"{NUMBERS[total]} things{place}: {listing}"
    if frame == 1 and len(families) == 1:
        return f"{families.pop()}{place}: {listing}"
    if frame == 2 and len(groups) > 1:
        group = dice.choice(groups)
        rest = [g for g in groups if g is not group]
        return f"{_phrase(dice, group)} together with {_list(dice, rest)}{place}"
    if frame == 3 and len(_pairs(groups)) > 2:
        return _related(dice, groups, place)
    lead = dice.choice(("we found", "look at", "I can see", "just", "notice"))
    return f"{lead} {listing}{place}"


def _tidy(text: str) -> str:
    text = text.strip()
    return text[0].upper() + text[1:] + "."
