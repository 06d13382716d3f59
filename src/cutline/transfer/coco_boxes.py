"""Objects in COCO's JSON: `coco:PATH` in COCO's own layout, and `folder:PATH` with a boxes.json beside the pictures.

    coco:PATH      PATH/[annotations/]instances_{train,val[,test]}*.json, pictures in PATH/[images/]train2017 and so on
    folder:PATH    PATH/{train,val[,test]}/images and PATH/{train,val[,test]}/boxes.json

Boxes are [x, y, width, height]; "segmentation" is a list of polygons or run lengths; "iscrowd" objects neither count
nor harm. Classes are the "categories" of train, in the order of their ids; the other splits must have the same. Objects
have masks where all of train's have. The fingerprint is of the JSON and of the names and sizes in bytes of the pictures.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cutline.errors import DataError
from cutline.record import fingerprint, hash_files
from cutline.transfer import objects
from cutline.transfer.data import DenseData, Task
from cutline.transfer.objects import Listed, Tidy
from cutline.transfer.targets import header_size

SPLITS = ("train", "val", "test")
Files = Mapping[str, tuple[Path, Path]]  # split → its JSON and the folder of its pictures


def open(rest: str, task: Task) -> DenseData:
    """Open `coco:PATH`."""
    root, files = Path(rest), {}
    if not root.is_dir():
        raise DataError(f"coco:{rest}: there is no such folder.")
    for name in SPLITS:
        found = [p for folder in (root / "annotations", root) for p in sorted(folder.glob(f"instances_{name}*.json"))]
        if len(found) > 1:
            raise DataError(f"coco:{rest} has {len(found)} files of {name}: {', '.join(map(str, found))}. Keep one.")
        if found:
            part = found[0].stem.removeprefix("instances_")
            places = [root / part, root / "images" / part, root / part / "images"]
            files[name] = found[0], next((p for p in places if p.is_dir()), places[0])
    layout = f"{root}/annotations/instances_{{train,val}}2017.json and {root}/{{train,val}}2017"
    return build(f"coco:{rest}", files, layout)


def open_folder(rest: str) -> DenseData:
    """Open `folder:PATH` for detection."""
    root = Path(rest)
    files = {s: (root / s / "boxes.json", root / s / "images") for s in SPLITS if (root / s / "boxes.json").is_file()}
    return build(f"folder:{rest}", files, f"{root}/{{train,val}}/boxes.json and {root}/{{train,val}}/images")


def build(spec: str, files: Files, layout: str) -> DenseData:
    """Detection data of one JSON for each split; raises `DataError`."""
    for name in ("train", "val"):
        if name not in files:
            raise DataError(f"{spec} has no annotations of {name}. The layout is {layout}.")
    for name, (_, folder) in files.items():
        if not folder.is_dir():
            raise DataError(f"{spec} has no pictures of {name}: there is no folder {folder}. The layout is {layout}.")
    read = {name: _read(path) for name, (path, _) in files.items()}
    categories = {name: _categories(path, read[name]) for name, (path, _) in files.items()}
    for name in files:
        objects.same_classes(spec, name, categories["train"], categories[name])
    ids = {number: place for place, (number, _) in enumerate(categories["train"])}
    listed, notes = {}, {}
    for name, (path, folder) in files.items():
        tidy = Tidy(name)
        listed[name] = _listed(path, read[name], folder, ids, tidy)
        notes[name] = tidy.report()
    masks = objects.have_masks("train", listed["train"])
    pictures = [(e.path.name, e.path.stat().st_size) for found in listed.values() for e in found if e.path.is_file()]
    contents = fingerprint({name: hash_files([path]) for name, (path, _) in files.items()}, pictures)
    splits = {name: objects.split(name, found, masks) for name, found in listed.items()}
    classes = [name for _, name in categories["train"]]
    return DenseData("detect", spec, splits, classes, contents, notes={"masks": masks, "put_right": notes})


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        missing = [key for key in ("images", "annotations", "categories") if not isinstance(content.get(key), list)]
    except (OSError, ValueError, AttributeError) as e:
        raise DataError(f"{path} cannot be read as COCO JSON: {e}.") from e
    if missing:
        raise DataError(f"{path} is no COCO instances file: it has no list {', '.join(map(repr, missing))}.")
    if not content["images"]:
        raise DataError(f"{path} lists no pictures.")
    return content


def _categories(path: Path, content: dict[str, Any]) -> list[tuple[int, str]]:
    try:
        found = sorted((int(c["id"]), str(c["name"])) for c in content["categories"])
    except (KeyError, TypeError, ValueError) as e:
        raise DataError(f'{path}: every category needs an "id" and a "name", and one gave {e!r}.') from e
    columns: dict[str, list[Any]] = {"id": [i for i, _ in found], "name": [n for _, n in found]}
    for what, values in columns.items():
        twice = next((v for v in values if values.count(v) > 1), None)
        if twice is not None:
            raise DataError(f"{path}: two categories have the {what} {twice!r}.")
    if not found:
        raise DataError(f"{path} has no categories.")
    return found


def _listed(path: Path, content: dict[str, Any], folder: Path, ids: Mapping[int, int], tidy: Tidy) -> list[Listed]:
    pictures: dict[Any, Listed] = {}
    try:
        for image in content["images"]:
            file = folder / image["file_name"]
            known = image.get("height"), image.get("width")
            pictures[image["id"]] = Listed(file, (known[0], known[1]) if all(known) else header_size(file))
    except (KeyError, TypeError) as e:
        raise DataError(f'{path}: every picture needs an "id" and a "file_name", and one gave {e!r}.') from e
    for i, found in enumerate(content["annotations"]):
        what = f"{path.name}, annotation {found.get('id', f'number {i}')}"
        picture, label = pictures.get(found.get("image_id")), ids.get(found.get("category_id"))
        box, segment = found.get("bbox"), found.get("segmentation") or None
        if picture is None:
            tidy.drop("unknown picture", f"{what} is of picture {found.get('image_id')!r}, which is not listed.")
        elif label is None:
            tidy.drop("unknown category", f"{what} has category {found.get('category_id')!r}, which is not listed.")
        elif not isinstance(box, list) or len(box) != 4:
            tidy.drop("box unreadable", f'{what} has the "bbox" {box!r}: [x, y, width, height] is wanted.')
        else:
            corners = (box[0], box[1], box[0] + box[2], box[1] + box[3])
            crowd = bool(found.get("iscrowd", 0))
            tidy.add(picture, f"{what} of {picture.path.name}", corners, label, crowd, found.get("area"), segment)
    return list(pictures.values())
