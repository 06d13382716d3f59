"""Prompts and class names: open_clip's sets, or files of one's own.

A class has one name or several (synonyms), the best of which counts. Inline, `a red apple; grass, lawn; sky` are three
classes of which the second has two names; in a file they are a line each. Prompts hold `{}` where the name goes, or `{c}` as
CLIP_benchmark writes it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip

from cutline.errors import ConfigError

Names = list[list[str]]  # of each class its synonyms

PROMPTS: dict[str, list[str]] = {
    "openai": [t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES],  # the 80 of CLIP's paper (2103.00020)
    "simple": [t("{}") for t in open_clip.SIMPLE_IMAGENET_TEMPLATES],  # the best 7 of them
    "photo": ["a photo of a {}."],
    "name": ["{}"],
}


def prompts(given: str | Sequence[str]) -> list[str]:
    """Prompts by the name of a set ("openai", "simple", "photo", "name"), from a file of one a line, or as they are.

    Raises `ConfigError` for a prompt without `{}`, for none at all, and for a name that is neither.
    """
    if isinstance(given, str):
        inline = "{}" in given or "{c}" in given
        found = PROMPTS.get(given) or ([given] if inline else _lines(given, "prompts", ", ".join(PROMPTS)))
    else:
        found = list(given)
    found = [prompt.replace("{c}", "{}") for prompt in found]
    for prompt in found:
        if prompt.count("{}") != 1:
            raise ConfigError(f"the prompt {prompt!r} must hold {{}} once, where the name of the class goes.")
    if not found:
        raise ConfigError(f"there is no prompt in {given!r}. Give one such as 'a photo of a {{}}.'.")
    return found


def class_names(given: str | Sequence[str]) -> Names:
    """Names of classes: "imagenet" (open_clip's 1,000), a file of a class a line, `a; b, c; d` inline, or a list of classes.

    Synonyms are parted by commas, but for "imagenet" and in a list, whose names are whole. Raises `ConfigError` for no class
    at all, and for a name that two classes have.
    """
    if isinstance(given, str):
        if given == "imagenet":
            return unique([[name] for name in open_clip.IMAGENET_CLASSNAMES], double=True)
        lines = given.split(";") if ";" in given or not _is_path(given) else _lines(given, "classes", "imagenet")
        names = [[name.strip() for name in line.split(",") if name.strip()] for line in lines]
    else:
        names = [[name.strip()] for name in given]
        if [""] in names:
            raise ConfigError(f"class {names.index(['']) + 1} of {len(names)} has no name. Give it one.")
    return unique([n for n in names if n])


def spoken(classes: Sequence[str]) -> Names:
    """The names of a data set's classes as `class_names` has them, with spaces for underscores."""
    return class_names([name.replace("_", " ") for name in classes])


def several(given: str | Sequence[str]) -> Names:
    """`class_names`, of two classes or more: to choose from one says nothing."""
    names = class_names(given)
    if len(names) < 2:
        raise ConfigError(f"{given!r} is one class. Name two or more, parted by semicolons: 'a dog; grass, lawn; sky'.")
    return names


def unique(names: Names, double: bool = False) -> Names:
    """`names` as they are; raises `ConfigError` where there is none, and for a name of two classes unless `double`."""
    if not names:
        raise ConfigError("there is no class. Name some: 'a red apple; grass, lawn; sky', or a file of one a line.")
    owner: dict[str, int] = {}
    for i, synonyms in enumerate(names):
        for name in synonyms:
            first = owner.setdefault(name.casefold(), i)
            if first != i and not double:
                raise ConfigError(f"classes {first + 1} and {i + 1} are both called {name!r}. Give one another name.")
    return names


def _is_path(given: str) -> bool:
    """Whether one word is meant as a file and not as a class."""
    return "," not in given and (Path(given).suffix in (".txt", ".csv") or Path(given).is_file())


def _lines(path: str, what: str, known: str) -> list[str]:
    """The lines of a file that are not blank; a byte-order mark is not part of the first."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{what} {path!r} are no set ({known}) and no file of lines of UTF-8 text: {e}.") from e
    return [line.strip() for line in text.splitlines() if line.strip()]


def described(names: Names, templates: Sequence[str]) -> dict[str, Any]:
    """What a protocol says of prompts and names: their number, and fingerprints of both."""
    from cutline.record import fingerprint

    return {"prompts": len(templates), "prompts_hash": fingerprint(list(templates)), "names_hash": fingerprint(names)}
