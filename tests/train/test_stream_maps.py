"""Label maps in the stream: what is stored is read back, and every label stays on the pixel that it is of."""

import io
from typing import Any

import numpy as np
import pytest
import reinforce_made
from PIL import Image

from cutline.captions.reinforce import ReinforceConfig, reinforce_work
from cutline.errors import ConfigError, DataError
from cutline.objectives.base import Map
from cutline.pairs import Provenance
from cutline.train.stream import Augment, Augmentation, Stream
from cutline.train.stream import maps as maps_
from cutline.train.stream.randaugment import MOVING, OPERATIONS
from cutline.train.stream.replay import DRAWN, from_stored

SIZES = [(40, 64), (64, 40), (33, 33)]


def position_picture(height: int, width: int) -> np.ndarray:
    """Red says the column and green the row of a pixel, four grey levels a step."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([x * 3 + 20, y * 3 + 20, np.full_like(x, 100)], 2).astype(np.uint8)


def position_labels(height: int, width: int) -> dict[str, np.ndarray]:
    """Ids count the pixels; depth is the column + 1 in metres; normals lean to the right with the column."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    lean = x / width
    normals = np.stack([lean, np.zeros_like(lean), -np.sqrt(1 - lean**2)], 2)
    return {
        "ids": (y * width + x).astype(np.int32),
        "depth": (x + 1).astype(np.float32),
        "normals": normals.astype(np.float32),
    }


class Positions:
    """Pictures whose colours say where a pixel is, with labels that say the same."""

    fingerprint = "positions"
    columns = ("key", "image", "ids", "depth", "normals", "half")

    def __len__(self) -> int:
        return 24

    def read(self, rows: Any, columns: Any) -> list[dict[str, Any]]:
        out = []
        for row in rows:
            height, width = SIZES[row % 3]
            values = position_labels(height, width)
            half = None if row == 0 else position_labels(height // 2, width // 2)["ids"]
            whole = {"key": str(row), "image": position_picture(height, width), **values, "half": half}
            out.append({c: whole[c] for c in columns})
        return out


def request(column: str, kind: str, size: int = 32, **more: Any) -> Map:
    return Map.model_validate(
        {"column": column, "kind": kind, "size": size, "classes": 4096, "by": "objectives.experts.x"} | more
    )


def stream(source: Any, maps: list[Map], **options: Any) -> Stream:
    defaults = {"batch": 8, "size": 32, "mean": (0, 0, 0), "std": (1 / 255,) * 3, "threads": 0, "maps": maps}
    return Stream(source, **(defaults | options))


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_labels_stay_with_their_pixels(flip, threads):
    """The picture's colour says which column and row a pixel of the view is of, and so must its id, depth and normal."""
    wanted = [request("ids", "segment"), request("depth", "depth"), request("normals", "normals")]
    augment = Augment(scale=(0.2, 1.0), flip=flip, interpolation="bilinear")
    mirrored = 0
    for batch in stream(Positions(), wanted, augment=augment, threads=threads).batches(9):
        for i, key in enumerate(batch.keys):
            width = SIZES[int(key) % 3][1]
            view = batch.views["image"][i].numpy()
            x, y = (view[0] - 20) / 3, (view[1] - 20) / 3
            ids = batch.columns["ids"][i].numpy()
            inner = np.s_[1:-1, 1:-1]  # at the border of a picture antialiasing has nothing to average with
            assert np.abs(ids % width - x)[inner].max() <= 1.01
            assert np.abs(ids // width - y)[inner].max() <= 1.01
            assert np.abs(batch.columns["depth"][i].numpy() - 1 - x)[inner].max() <= 0.5
            turned = x[0, -1] < x[0, 0]
            mirrored += turned
            normals = batch.columns["normals"][i].numpy()
            assert np.abs(normals[0] * (-1 if turned else 1) - x / width)[inner].max() < 0.05
            assert np.allclose(np.linalg.norm(normals, axis=0), 1, atol=1e-5)
    assert (mirrored > 10) == (flip > 0)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_ids_equal_the_same_augmentation_of_an_id_picture_to_the_pixel(size, flip):
    """Where the view enlarges nothing and shrinks nothing, resampling has no say."""
    height, width = size
    ids = position_labels(height, width)["ids"]
    how = Augmentation(5, 7, 24, 24, size, flip)
    picture = np.repeat((ids % 251)[..., None], 3, 2).astype(np.uint8)
    view = Augment().apply(picture, how, 24)
    assert (maps_.aligned(ids, "segment", how, (24, 24)) % 251 == view[0]).all()
    # and at twice the size: each label twice, to the pixel
    double = maps_.aligned(ids, "segment", how, (48, 48))
    assert (double[::2, ::2] % 251 == view[0]).all()
    assert (double[1::2, 1::2] == double[::2, ::2]).all()


def test_a_map_of_half_the_size_lies_on_the_same_places():
    """A crop that does not fall on whole pixels of the map is not rounded to them."""
    how = Augmentation(3, 5, 30, 26, (64, 40), True)
    whole, half = (maps_.aligned(position_labels(*s)["ids"], "segment", how, (60, 52)) for s in ((64, 40), (32, 20)))
    assert (whole // 40 // 2 == half // 20).all()
    assert (whole % 40 // 2 == half % 20).all()


def test_depth_is_interpolated_between_readings_alone():
    values = np.array([[2.0, 0.0, 4.0, 4.0]] * 4, np.float32)
    view = maps_.aligned(values, "depth", Augmentation(0, 0, 4, 4, (4, 4), False), (4, 8))
    assert view[0].tolist() == pytest.approx([2, 2, 0, 0, 4, 4, 4, 4])
    assert (
        maps_.aligned(np.zeros((4, 4), np.float32), "depth", Augmentation(0, 0, 4, 4, (4, 4), True), (3, 3)).max() == 0
    )


@pytest.mark.parametrize(("classes", "dtype"), [(103, np.uint8), (255, np.uint8), (256, np.uint16), (1000, np.uint16)])
def test_class_ids_are_read_back(classes, dtype):
    ids = np.arange(-1, 99).reshape(10, 10) % classes
    ids[0, 0], ids[0, 1] = -1, classes - 1
    data = maps_.encode_classes(ids, classes)
    assert np.asarray(Image.open(io.BytesIO(data))).dtype == dtype
    assert (maps_.decode_map(data, "segment") == ids).all()


def test_depth_and_normals_are_read_back():
    depth = np.array([[0.0, 0.4996, np.nan], [70.0, -1.0, 1e-5]], np.float32)
    found = maps_.decode_map(maps_.encode_depth(depth), "depth")
    assert found.ravel().tolist() == pytest.approx([0, 0.5, 0, 65.535, 0, 0.001])
    relative = maps_.decode_map(maps_.encode_relative(np.array([[-3.0, 0.0, 7.0, np.inf]])), "depth", 1 / 65535)
    assert relative.ravel().tolist() == pytest.approx([0, 0.3, 1, 0], abs=2e-5)
    assert relative[0, 0] > 0  # the least value is a reading, too
    assert maps_.decode_map(maps_.encode_relative(np.full((2, 2), 5.0)), "depth", 1 / 65535).min() > 0
    normals = np.random.default_rng(0).normal(size=(5, 6, 3))
    normals /= np.linalg.norm(normals, axis=2, keepdims=True)
    normals[2, 3] = 0
    found = maps_.decode_map(maps_.encode_normals(normals), "normals")
    assert np.abs(found - normals).max() < 0.008
    assert (found[2, 3] == 0).all()


@pytest.mark.parametrize("data", [b"", b"no picture", maps_.encode_normals(np.ones((2, 2, 3)) / 3**0.5)])
def test_bytes_that_are_no_map_are_told(data):
    with pytest.raises(DataError, match="label map"):
        maps_.decode_map(data, "depth")


@pytest.mark.parametrize(
    ("height", "width", "side", "size"), [(64, 64, 128, (64, 64)), (480, 640, 64, (64, 85)), (3, 900, 1, (1, 300))]
)
def test_maps_are_never_larger_than_the_picture(height, width, side, size):
    assert maps_.label_size(height, width, side) == size


def test_a_row_without_a_map_has_no_label():
    batch = next(stream(Positions(), [request("half", "segment")], batch=24).batches(1))
    at = batch.keys.index("0")
    assert (batch.columns["half"][at] == -1).all()
    assert (batch.columns["half"][(at + 1) % 24] >= 0).all()


def test_a_map_of_another_size_than_its_picture_is_counted_and_stops_the_run():
    class Turned(Positions):
        def read(self, rows, columns):
            read = super().read(rows, columns)
            return [r | {"ids": r["ids"].T} if r["ids"].shape[0] != r["ids"].shape[1] else r for r in read]

    with pytest.raises(DataError, match=r"label map of another size than the picture.*ids 40x64 of 64x40"):
        list(stream(Turned(), [request("ids", "segment")], max_bad=0.0, batch=24).batches(5))
    larger = Augmentation(0, 0, 8, 8, (20, 20), False)
    labels = maps_.LabelMaps(Positions(), [request("ids", "segment")], Augment(), False)
    with pytest.raises(maps_.Unusable, match="another size"):
        labels.of({"key": "k", "ids": np.zeros((40, 40), np.int32)}, larger)


def test_what_does_not_fit_is_told_before_training(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"objectives.experts.x needs a column.*no column 'seg'.*cutline label PAIRS --expert segment --with MODEL --as seg",
    ):
        stream(Positions(), [request("seg", "segment")])
    with pytest.raises(ConfigError, match=r"RandAugment.*data.augment.operations=0"):
        stream(Positions(), [request("ids", "segment")], augment=Augment(operations=2))
    with pytest.raises(DataError, match=r"'ids' holds class \d+, and objectives.experts.x.classes is 7"):
        list(stream(Positions(), [request("ids", "segment", classes=7)]).batches(1))


def test_stored_augmentations_that_move_pixels_are_refused_and_others_are_not():
    labels = maps_.LabelMaps(Positions(), [request("ids", "segment")], Augment(), True)
    row = {"key": "k", "ids": position_labels(64, 40)["ids"]}
    for name in OPERATIONS:
        how = Augmentation(0, 0, 32, 32, (64, 40), False, (("Color", 0.1), (name, 0.0)))
        if name in MOVING:
            with pytest.raises(ConfigError, match=f"stored augmentations.*{name}"):
                labels.of(row, how)
        else:
            labels.of(row, how)
    assert {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"} == MOVING


def test_maps_follow_stored_augmentations(tmp_path):
    """With `data.replay` the view is one of the stored crops, and so is the map."""
    config = ReinforceConfig(
        teachers=[reinforce_made.teacher(tmp_path, 32, 24, 0.4)], augmentations=3,
        augment=Augment(scale=(0.1, 0.6), flip=0.5),
    )  # fmt: skip
    pairs = reinforce_made.table(tmp_path / "t.lance")
    sizes = [(r["height"], r["width"]) for r in pairs.read(range(12), ["height", "width"])]
    ids = [position_labels(*maps_.label_size(*size, 50))["ids"] for size in sizes]
    pairs = reinforce_made.run(pairs, reinforce_work(pairs, config))
    settings = {"expert": "segment", "classes": list(map(str, range(9999)))}
    provenance = Provenance(how="label", settings=settings)
    data = [maps_.encode_classes(i, 9999) for i in ids]
    pairs = pairs.add_column("seg", data, type="binary", provenance=provenance)
    stored = {r["key"]: (r["dr_augment"], i) for i, r in enumerate(pairs.read(range(12), ["key", "dr_augment"]))}
    flips = 0
    for batch in stream(pairs, [request("seg", "segment", classes=9999)], replay="dr", batch=6).batches(6):
        for key, drawn, found in zip(batch.keys, batch.columns[DRAWN].tolist(), batch.columns["seg"], strict=True):
            augmentations, row = stored[key]
            how = from_stored(augmentations[drawn], sizes[row])
            flips += how.flip
            assert (found.numpy() == maps_.aligned(ids[row], "segment", how, (32, 32))).all()
    assert flips


def test_the_provenance_is_compared_with_the_recipe(tmp_path):
    pairs = reinforce_made.table(tmp_path / "t.lance", 4)
    for name, settings in {
        "seg": {"expert": "segment", "classes": ["a", "b", "c"]},
        "depth": {"expert": "depth", "unit": "relative", "scale": 1 / 65535},
    }.items():
        pairs = pairs.add_column(name, [b"x"] * 4, provenance=Provenance(how="label", settings=settings), type="binary")
    with pytest.raises(
        ConfigError, match=r"'seg' has 3 classes, and objectives.experts.x.classes is 4096: set it to 3"
    ):
        stream(pairs, [request("seg", "segment")], batch=2)
    with pytest.raises(ConfigError, match=r"needs a map of depth, and the column 'seg' holds segment"):
        stream(pairs, [request("seg", "depth")], batch=2)
    with pytest.raises(ConfigError, match=r"holds relative depth: set objectives.experts.x.relative=true"):
        stream(pairs, [request("depth", "depth")], batch=2)
    stream(pairs, [request("seg", "segment", classes=3), request("depth", "depth", relative=True)], batch=2)
