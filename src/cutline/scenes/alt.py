"""Alt text as the web has it: a mix of kinds, most of them saying little about the picture.

Kinds that help: `good` (a caption), `one` (one right object among many), `shop` (shop talk around one right object),
`foreign` (one right object in German, Spanish or French). Kinds that do not: `wrong` (an object that is not there),
`filename`, `boilerplate`, `empty`.
"""

from collections.abc import Mapping, Sequence

from cutline.scenes.captions import article
from cutline.scenes.dice import ALT, Dice
from cutline.scenes.layout import Item, Scene
from cutline.scenes.objects import OBJECTS

KINDS = ("good", "one", "shop", "foreign", "wrong", "filename", "boilerplate", "empty")
USEFUL = ("good", "one", "shop", "foreign")
MIXES: dict[str, dict[str, float]] = {
    "web": dict(zip(KINDS, (0.12, 0.36, 0.08, 0.04, 0.08, 0.15, 0.14, 0.03), strict=True)),
    "mild": dict(zip(KINDS, (0.25, 0.55, 0.08, 0.02, 0.03, 0.04, 0.03, 0.0), strict=True)),
    "harsh": dict(zip(KINDS, (0.02, 0.13, 0.06, 0.04, 0.20, 0.27, 0.23, 0.05), strict=True)),
}
_MONTHS = ("January", "March", "May", "June", "August", "October", "December")
_PEOPLE = ("Anna", "J. Smith", "Marco", "Lena K.", "user4821", "the author", "PhotoWorld", "Kim")


def alt_text(
    scene: Scene, captions: list[str], mix: Mapping[str, float], world: Sequence[int], seed: int, index: int
) -> tuple[str, str]:
    """The alt text of a scene, and its kind. `captions` are the scene's own, `world` the kinds of its world."""
    dice = Dice(seed, index, ALT)
    kind = list(mix)[dice.weighted(list(mix.values()))]
    if kind == "good":
        return dice.choice(captions), kind
    if kind == "empty":
        return "", kind
    if kind == "filename":
        return _filename(dice), kind
    if kind == "boilerplate":
        return _boilerplate(dice), kind
    # People name what stands out: the larger an object shows, the likelier it is the one.
    item = scene.items[dice.weighted([i.size * i.width * i.visible for i in scene.items])]
    if kind == "foreign":
        return _foreign(dice, item), kind
    if kind == "wrong":
        here = {i.kind for i in scene.items}
        name = OBJECTS[dice.choice([k for k in world if k not in here])].name
    else:
        name = OBJECTS[item.kind].name
    if OBJECTS[item.kind].hues and kind != "wrong" and dice.chance(0.4):
        name = f"{item.colour} {name}"
    if kind == "shop" or (kind == "wrong" and dice.chance(0.3)):
        return _shop(dice, name), kind
    return _one(dice, name), kind


def _one(dice: Dice, name: str) -> str:
    return dice.choice((
        name, name, name.capitalize(), article(name), f"{name} - high quality photo", f"{name} image",
        f"photo of {name}", f"{name} {dice.below(90) + 1}", f"my {name}", f"{name.title()} | Gallery",
        f"{name}, {dice.choice(_MONTHS)} 20{dice.below(15) + 10}",
    ))  # fmt: skip


def _shop(dice: Dice, name: str) -> str:
    title, percent = name.title(), 5 * (dice.below(12) + 1)
    return dice.choice((
        f"Buy {title} online | free shipping | {percent}% off", f"{title} - best price {dice.below(200) + 5}.99",
        f"SALE {percent}% {title} in stock order now", f"{title} wholesale supplier, ships in 24h",
        f"Shop {title} | new arrivals {2010 + dice.below(15)}",
        f"{title} (pack of {dice.below(9) + 2}) customer reviews",
    ))  # fmt: skip


def _foreign(dice: Dice, item: Item) -> str:
    o = OBJECTS[item.kind]
    frames = (
        (o.de, ("{}", "{} kaufen", "Foto: {}", "{} im Bild", "schönes Bild mit {}")),
        (o.es, ("{}", "foto de {}", "imagen de {}", "{} en venta", "mi {} bonito")),
        (o.fr, ("{}", "photo de {}", "image : {}", "{} à vendre", "belle photo, {}")),
    )
    word, shapes = dice.choice(frames)
    return dice.choice(shapes).format(word)


def _filename(dice: Dice) -> str:
    number = dice.below(9000) + 1000
    year, month, day = 2005 + dice.below(20), dice.below(12) + 1, dice.below(28) + 1
    return dice.choice((
        f"IMG_{number}.JPG", f"DSC0{number}", f"DSC_{number}.jpg", f"P10{number}.JPG", f"image{dice.below(40)}.png",
        f"screenshot_{year}-{month:02d}-{day:02d}", f"{year}{month:02d}{day:02d}_{number}37.jpg",
        f"photo-{number}{number}",
        f"banner_{dice.below(12)}_final.jpg", f"thumb_{number}", f"WhatsApp Image {year}-{month:02d}-{day:02d}",
    ))  # fmt: skip


def _boilerplate(dice: Dice) -> str:
    return dice.choice((
        "image", "photo", "picture", "click to enlarge", "Click here to view larger image", "thumbnail", "logo",
        f"photo by {dice.choice(_PEOPLE)}", f"Photo credit: {dice.choice(_PEOPLE)}", "no description available",
        "placeholder", "read more", "share on social media", f"slide {dice.below(20) + 1}", "Image may contain: indoor",
        f"posted on {dice.choice(_MONTHS)} {dice.below(28) + 1}", f"page {dice.below(30) + 1} of {dice.below(60) + 30}",
        "featured image", "header background", "copyright all rights reserved", f"figure {dice.below(12) + 1}",
    ))  # fmt: skip
