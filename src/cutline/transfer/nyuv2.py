"""NYU Depth v2 (Silberman et al., ECCV 2012), 480x640, up to 10 m, with the official 654 pictures to test on.

Two layouts. The folders of BTS, GLPDepth and the MIM protocol: frames under sync/ to train on (24,231), the official
pictures under official_splits/test, depth in 16-bit PNG of millimetres, by the lists nyu_{train,test}.txt (or BTS's and
GLPDepth's own names for them), or without lists every rgb_*.jpg. Or the labelled set alone, nyu_depth_v2_labeled.mat
(`pip install h5py`), with the official split of 795 and 654 in splits.mat beside it (`pip install scipy`).

Of the .mat, depths=raw, the default, are the sensor's readings and depths=filled the in-painted ones; the published
figures are of raw ones (GLPDepth's and BTS's extraction of the test pictures), whose pictures have their frame, where
depth and colour do not meet, made black, as here.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cutline.errors import DataError
from cutline.record import fingerprint, hash_files
from cutline.transfer.data import DenseData, Sample, Skip, Split, Task
from cutline.transfer.files import Row, build, choice, listed, missing, parse, scale_of, serves
from cutline.transfer.targets import read_depth

LAYOUT = (
    "nyu_depth_v2_labeled.mat with splits.mat, or sync/SCENE/{rgb_*.jpg,sync_depth_*.png} and "
    "official_splits/test/SCENE/{rgb_*.jpg,sync_depth_*.png}, with or without nyu_{train,test}.txt of `picture depth [focal]`"
)
LISTS = ("nyu_{}.txt", "nyudepthv2_{}_files_with_gt.txt", "{}_list.txt")
FOLDERS = {"train": (".", "sync"), "test": (".", "official_splits/test")}
MAT, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
FRAME = (slice(7, 474), slice(7, 632))  # rows and columns inside of the frame
MAX_DEPTH = 10.0


def open(rest: str, task: Task) -> DenseData:
    """Open `nyuv2:PATH[,scale=0.001]` or `nyuv2:FILE.mat[,depths=raw|filled][,splits=FILE]`."""
    spec = f"nyuv2:{rest}"
    serves("nyuv2", task, "depth")
    path = Path(rest.split(",")[0])
    rows = {split: _rows(path, split) for split in FOLDERS}
    mat = path / MAT if path.is_dir() and not any(rows.values()) else path
    if mat.suffix == ".mat" and mat.is_file():
        _, options = parse("nyuv2", rest, depths="filled", splits="splits.mat")
        depths = choice(spec, options, "depths", "raw", "filled")
        return _labelled(spec, mat, Path(options.get("splits", mat.parent / SPLITS)), depths)
    _, options = parse("nyuv2", rest, scale="0.001")
    for split, found in rows.items():
        if not found:
            raise missing(spec, path, f"list or picture to {split} on", LAYOUT)
    scale = scale_of(spec, options) or 0.001
    return build(spec, task, rows, partial(read_depth, scale=scale), notes={"scale": scale}, max_depth=MAX_DEPTH)


def _rows(root: Path, split: str) -> list[Row]:
    folders = [root / name for name in FOLDERS[split]]
    path = next((p for name in LISTS if (p := root / name.format(split)).is_file()), None)
    if path is not None:
        return listed(path, folders, folders)
    rows = []
    for picture in sorted(folders[-1].glob("**/rgb_*.jpg")):
        depth = picture.with_name(picture.name.replace("rgb_", "sync_depth_")).with_suffix(".png")
        key = str(picture.relative_to(folders[-1]).with_suffix(""))
        rows.append(Row(key, picture, depth))
    return rows


def _labelled(spec: str, path: Path, splits: Path, depths: str) -> DenseData:
    """The .mat: HDF5 with images (N, 3, W, H) uint8, and depths and rawDepths (N, W, H) float32 in metres."""
    try:
        import h5py
    except ImportError as e:
        raise DataError(f"{spec}: {path.name} is HDF5: `pip install h5py` to read it.") from e
    name = "rawDepths" if depths == "raw" else "depths"
    try:
        file = h5py.File(path, "r")
        images, targets = file["images"], file[name]
    except (OSError, KeyError) as e:
        raise DataError(f"{spec}: {path} is not the labelled set with images and {name}: {e}") from e
    chosen = _official(spec, splits, len(images))

    def split(part: str, places: NDArray[np.int64]) -> Split:
        def read(row: int) -> Sample:
            place = int(places[row])
            image = np.zeros((*images.shape[:1:-1], 3), np.uint8)
            image[FRAME] = np.transpose(images[place], (2, 1, 0))[FRAME]
            metres = np.ascontiguousarray(np.transpose(targets[place])).astype(np.float32)
            metres[~np.isfinite(metres) | (metres < 0)] = 0
            if not metres.any():
                raise Skip("target empty", f"picture {place + 1} of {path} has no reading.")
            return Sample(f"{place:05d}", image, metres)

        keys = [f"{place:05d}" for place in places.tolist()]
        return Split(part, keys, read, size=lambda _: (images.shape[3], images.shape[2]))

    notes: dict[str, Any] = {"depths": depths}
    contents = fingerprint(hash_files([path, splits]), notes)
    parts = {part: split(part, places) for part, places in chosen.items()}
    return DenseData("depth", spec, parts, [], contents, max_depth=MAX_DEPTH, notes=notes)


def _official(spec: str, path: Path, count: int) -> dict[str, NDArray[np.int64]]:
    """Places in the .mat of the official split, from trainNdxs and testNdxs, which count from 1."""
    if not path.is_file():
        raise DataError(
            f"{spec}: the official split is not at {path}. Get splits.mat (indoor_seg_sup of the data set's page), "
            "put it beside the .mat, or name it with splits=FILE."
        )
    try:
        from scipy.io import loadmat
    except ImportError as e:
        raise DataError(f"{spec}: `pip install scipy` to read {path.name}.") from e
    try:
        stored = loadmat(path)
        places = {part: stored[f"{part}Ndxs"].ravel().astype(np.int64) - 1 for part in ("train", "test")}
    except (OSError, ValueError, KeyError, NotImplementedError) as e:
        raise DataError(f"{spec}: {path} holds no trainNdxs and testNdxs: {e}") from e
    for part, found in places.items():
        if not len(found) or found.min() < 0 or found.max() >= count:
            raise DataError(f"{spec}: {part}Ndxs of {path} do not fit the {count} pictures of the .mat.")
    return places
