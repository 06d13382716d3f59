"""CLIPScore, RefCLIPScore and plain cosines against their formulas, through open_clip's own model, tokeniser, transform."""

import io

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cutline import towers
from cutline.captions.score.base import Asked
from cutline.captions.score.clip import ClipScores, harmonic_mean
from cutline.captions.work import Failed
from cutline.errors import ConfigError

CUSTOM = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "layers": 2, "heads": 2},
}
ALL = ("clip", "refclip", "cosine", "alt_cosine")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    built = towers.build(towers.TowerConfig(custom=CUSTOM))
    with torch.no_grad():
        for weights in (p for p in built.parameters() if p.dim() > 1):
            weights.normal_(0, 0.3)  # so that embeddings point anywhere, and cosines are of either sign
    towers.save(built, folder / "model")
    return str(folder)


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (3, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((50, 40)).save(buffer, "PNG")
    return buffer.getvalue()


ROWS = [
    {"key": "a", "image": picture(1), "c": "a brown dog", "r": ["a dog", "an old brown dog on grass"], "alt": "dog"},
    {"key": "b", "image": picture(2), "c": "two cats beside a car", "r": ["something else"], "alt": None},
    {"key": "c", "image": picture(3), "c": " ", "r": ["a dog"], "alt": "dog"},
    {"key": "d", "image": b"no picture", "c": "a horse", "r": ["a horse"], "alt": "a horse"},
    {"key": "e", "image": picture(5), "c": "a very long caption " * 9, "r": [], "alt": "a brown dog"},
    {"key": "f", "image": picture(6), "c": None, "r": None, "alt": None},
]


class Plain:
    """The formulas, one picture and one text at a time."""

    def __init__(self, model: str) -> None:
        self.model, _, self.transform = open_clip.create_model_and_transforms(f"local-dir:{model}/model")
        self.model.eval()
        self.tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=24)

    @torch.no_grad()
    def image(self, data: bytes) -> torch.Tensor:
        tensor = self.transform(Image.open(io.BytesIO(data)))[None]
        return F.normalize(self.model.encode_image(tensor), dim=-1)[0]

    @torch.no_grad()
    def text(self, text: str) -> torch.Tensor:
        return F.normalize(self.model.encode_text(self.tokenizer([text])), dim=-1)[0]

    def scores(self, row, caption, prompt="A photo depicts "):
        v, c, plain = self.image(row["image"]), self.text(prompt + caption), self.text(caption)
        clip = 2.5 * max(float(v @ c), 0.0)
        nearest = max((float(c @ self.text(prompt + r)) for r in row["r"]), default=None)
        ref = None if nearest is None else max(nearest, 0.0)
        return {
            "s_clip": clip,
            "s_refclip": None if ref is None else (2 * clip * ref / (clip + ref) if clip + ref else 0.0),
            "s_cosine": float(v @ plain),
            "s_alt_cosine": None if row["alt"] is None else float(plain @ self.text(row["alt"])),
        }


def made(model, rows, names=ALL, many=False, **options):
    work = ClipScores(Asked("c", "s", tuple(names), many), model, reference="r", device="cpu", **options)
    worker = work.load()
    return worker.make(worker.prepare(rows))


def close(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (got[name] is None) == (value is None), name
        assert got[name] == pytest.approx(value, abs=2e-6), name


@pytest.mark.parametrize("prompt", ["A photo depicts ", ""])
def test_scores_equal_their_formulas(model, prompt):
    plain, got = Plain(model), made(model, ROWS, prompt=prompt)
    for i in (0, 1, 4):
        close(got[i], plain.scores(ROWS[i], ROWS[i]["c"], prompt))
    assert got[3] == Failed("picture: not a picture")
    assert got[2] == got[5] == dict.fromkeys(("s_clip", "s_refclip", "s_cosine", "s_alt_cosine"))


def test_cosines_below_zero_score_zero_and_not_less(model):
    plain = Plain(model)
    rows = [{**ROWS[0], "image": picture(i), "c": f"thing number {i}"} for i in range(12)]
    got = made(model, rows)
    cosines = [float(plain.image(r["image"]) @ plain.text("A photo depicts " + r["c"])) for r in rows]
    assert min(cosines) < 0 < max(cosines)
    for cosine, scores in zip(cosines, got, strict=True):
        assert scores["s_clip"] == pytest.approx(max(2.5 * cosine, 0), abs=2e-6)
        assert scores["s_refclip"] == 0 if cosine < 0 else scores["s_refclip"] > 0


def test_every_caption_of_a_list_is_scored_and_the_picture_embedded_once(model, monkeypatch):
    plain = Plain(model)
    rows = [{**ROWS[0], "c": ["a brown dog", "", "a cat"]}, {**ROWS[1], "c": []}, {**ROWS[4], "c": ["a house"]}]
    worker = ClipScores(Asked("c", "s", ALL, True), model, reference="r", device="cpu").load()
    seen = []
    encode = worker.model.encode_image
    monkeypatch.setattr(worker.model, "encode_image", lambda x, **k: seen.append(len(x)) or encode(x, **k))
    got = worker.make(worker.prepare(rows))
    assert seen == [2]  # the row without captions needs no picture
    wanted = [plain.scores(rows[0], "a brown dog"), None, plain.scores(rows[0], "a cat")]
    for name in ("s_clip", "s_refclip", "s_cosine", "s_alt_cosine"):
        assert got[0][name] == [None if w is None else pytest.approx(w[name], abs=2e-6) for w in wanted]
    assert set(got[1].values()) == {None}
    assert got[2]["s_refclip"] == [None]


def test_batches_do_not_change_a_score(model):
    rows = [{**ROWS[0], "key": str(i), "image": picture(i), "c": f"a {i} dog"} for i in range(9)]
    whole = made(model, rows)
    for row, wanted in zip(rows, whole, strict=True):
        close(made(model, [row])[0], wanted)


def test_scores_of_texts_alone_read_no_picture(model):
    work = ClipScores(Asked("c", "s", ("alt_cosine",), False), model)
    assert work.reads == ["c", "alt"]
    worker = work.load()
    rows = [{"key": "a", "c": "a dog", "alt": "a dog"}, {"key": "b", "c": "a dog", "alt": " "}]
    got = worker.make(worker.prepare(rows))
    assert got[0]["s_alt_cosine"] == pytest.approx(1, abs=1e-6)
    assert got[1]["s_alt_cosine"] is None
    assert worker.make(worker.prepare([{"key": "c", "c": None, "alt": None}])) == [{"s_alt_cosine": None}]


def test_a_tower_without_text_is_refused():
    with pytest.raises(ConfigError, match="image tower alone"):
        ClipScores(Asked("c", "s", ("clip",), False), "scratch:resnet10t").load()


def test_harmonic_mean_of_nothing_is_nothing():
    assert harmonic_mean(0.0, 0.0) == harmonic_mean(1.0, 0.0) == 0.0
    assert harmonic_mean(1.0, 0.5) == pytest.approx(2 / 3)
