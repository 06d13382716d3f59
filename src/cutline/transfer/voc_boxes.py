"""Objects in VOC's XML: `voc:PATH`, PATH/{JPEGImages,Annotations,ImageSets/Main/{train,val[,test]}.txt}.

PATH may also be the VOCdevkit folder around one year. Boxes count pixels from 1 and both ends; they become x0 - 1, y0 -
1, x1, y1. Objects marked difficult neither count nor harm, by COCO's rule for crowds (any box mostly inside of one is
forgiven), and are left out of training. Classes are the lines of classes.txt if there is one, VOC's twenty where train
has no other names, and else the names in train. There are no masks of objects here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from cutline.errors import DataError
from cutline.record import fingerprint, hash_files
from cutline.transfer import objects
from cutline.transfer.data import DenseData, Task
from cutline.transfer.objects import Listed, Tidy
from cutline.transfer.targets import header_size

LAYOUT = "PATH/{JPEGImages,Annotations,ImageSets/Main/{train,val[,test]}.txt}"
SPLITS = ("train", "val", "test")
VOC = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()


@dataclass
class Parsed:
    """What one XML says: (height, width), and name, corners and difficult of each object; or why it cannot be read."""

    size: tuple[int, int] | None = None
    found: list[tuple[str, list[float], bool]] = field(default_factory=list)
    problem: str | None = None


def open(rest: str, task: Task) -> DenseData:
    """Open `voc:PATH`."""
    root = _root(Path(rest))
    lists = {s: root / "ImageSets" / "Main" / f"{s}.txt" for s in SPLITS}
    stems = {s: _stems(path) for s, path in lists.items() if path.is_file()}
    for needed in ("train", "val"):
        if not stems.get(needed):
            raise DataError(f"voc:{rest} has no pictures of {needed}: {lists[needed]} is missing or empty.")
    xml = {s: [root / "Annotations" / f"{stem}.xml" for stem in found] for s, found in stems.items()}
    parsed = {s: [_parse(path) for path in paths] for s, paths in xml.items()}
    classes = _classes(root, {name for one in parsed["train"] for name, _, _ in one.found})
    listed, notes = {}, {}
    for s, found in parsed.items():
        tidy = Tidy(s)
        pictures = [root / "JPEGImages" / f"{stem}.jpg" for stem in stems[s]]
        listed[s] = [_listed(p, x, one, classes, tidy) for p, x, one in zip(pictures, xml[s], found, strict=True)]
        notes[s] = tidy.report()
    files = [p for paths in xml.values() for p in paths if p.is_file()]
    sizes = [(e.path.name, e.path.stat().st_size) for found in listed.values() for e in found if e.path.is_file()]
    contents = fingerprint(hash_files(files), stems, classes, sizes)
    splits = {s: objects.split(s, found, masks=False) for s, found in listed.items()}
    return DenseData("detect", f"voc:{rest}", splits, classes, contents, notes={"masks": False, "put_right": notes})


def _root(path: Path) -> Path:
    years = [path] if (path / "Annotations").is_dir() else [p.parent for p in sorted(path.glob("VOC*/Annotations"))]
    if len(years) != 1:
        found = f"several years ({', '.join(p.name for p in years)}): name one" if years else "no Annotations folder"
        raise DataError(f"voc:{path} has {found}. The layout is {LAYOUT}.")
    return years[0]


def _stems(path: Path) -> list[str]:
    return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _parse(path: Path) -> Parsed:
    try:
        tree = ElementTree.parse(path).getroot()
        sides = [int(float(tree.findtext(f"size/{side}") or 0)) for side in ("height", "width")]
        found = [
            (
                (o.findtext("name") or "").strip(),
                [float(o.findtext(f"bndbox/{c}") or "nan") for c in ("xmin", "ymin", "xmax", "ymax")],
                (o.findtext("difficult") or "0").strip() == "1",
            )
            for o in tree.iter("object")
        ]
    except (OSError, ElementTree.ParseError, ValueError) as e:
        return Parsed(problem=f"{path} cannot be read as VOC XML: {e}.")
    return Parsed((sides[0], sides[1]) if all(sides) else None, found)


def _classes(root: Path, names: set[str]) -> list[str]:
    file = root / "classes.txt"
    if file.is_file():
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise DataError(f"{root} has no object in train, so nothing says its classes: name them in classes.txt.")
    return VOC if names <= set(VOC) else sorted(names)


def _listed(picture: Path, xml: Path, parsed: Parsed, classes: Sequence[str], tidy: Tidy) -> Listed:
    entry = Listed(picture, parsed.size or header_size(picture), problem=parsed.problem)
    for name, (x0, y0, x1, y1), difficult in parsed.found:
        what = f"{xml.name}, {name or 'an object without a name'}"
        if name not in classes:
            tidy.drop("unknown category", f"{what}: the classes are {', '.join(classes[:5])}, …")
        else:
            tidy.add(entry, what, (x0 - 1, y0 - 1, x1, y1), classes.index(name), difficult, None, None)
    return entry
