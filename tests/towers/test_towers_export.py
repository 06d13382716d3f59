"""Pretrained models in other formats: what was written, read by its own program, gives the model's values."""

import json

import numpy as np
import onnxruntime
import open_clip
import pytest
import timm
import torch

from cutline import towers
from cutline.errors import ConfigError, CutlineError
from cutline.towers import programs
from cutline.towers.export import export


def noise(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3))


def run(path, name, x):
    if path.suffix == ".pt2":
        return [y.detach().numpy() for y in torch.export.load(path).module()(x)]
    return onnxruntime.InferenceSession(path).run(None, {name: x.numpy()})


@pytest.mark.parametrize("kind", ["vit", "vit-sincos", "timm-vit-joint", "convnext"])
def test_timm_opens_the_folder_with_the_same_embedding(kind, model_of, tmp_path):
    model = model_of(kind)
    export(model, tmp_path / "out", "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    size = model.visual.preprocess_cfg["size"]
    x = noise(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), model.encode_image(x), rtol=1e-4, atol=1e-4)
    assert tuple(theirs.pretrained_cfg["mean"]) == tuple(model.visual.preprocess_cfg["mean"])
    assert tuple(theirs.pretrained_cfg["input_size"]) == (3, size, size)
    assert (tmp_path / "out/model.safetensors").is_file()
    assert (tmp_path / "out/config.json").is_file()


@pytest.mark.parametrize("kind", ["resnet", "vit-avg-scale", "vit-attention-pool"])
def test_towers_that_timm_has_no_place_for_are_told_where_to_go(kind, model_of, tmp_path):
    with pytest.raises(CutlineError, match="--to open_clip, --to onnx"):
        export(model_of(kind), tmp_path / "out", "timm")
    assert not list(tmp_path.iterdir())


def test_open_clip_opens_the_folder_with_the_same_embeddings(model_of, tmp_path):
    model = model_of("vit")
    assert export(model, tmp_path, "open_clip")["largest_difference"] == 0
    theirs = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")[0].eval()
    x = noise(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(theirs.encode_image(x), model.encode_image(x))


@pytest.mark.parametrize(("name", "message"), [("timm-vit", "without a joint space"), ("coca-tiny-64", "conv_stem")])
def test_open_clip_refuses_what_it_could_not_open(name, message, model_of, tmp_path):
    model = model_of(name) if name == "timm-vit" else towers.load(f"scratch:{name}")
    with pytest.raises(CutlineError, match=message):
        export(model, tmp_path / "out", "open_clip")


@pytest.mark.parametrize("to", ["onnx", "torch_export"])
def test_programs_take_uint8_pictures_and_texts_of_any_batch(to, model_of, tmp_path):
    model = model_of("vit")
    export(model, tmp_path, to, size=(24, 40))
    encoder, suffix = towers.load_encoder(model), programs.SUFFIXES[to]
    mean, std = (np.array(v)[None, :, None, None] for v in (encoder.mean, encoder.std))
    for batch in (1, 5):
        pictures = (noise(batch, 3, 24, 40) * 256).to(torch.uint8)
        tokens = torch.randint(1, 49408, (batch, 40), generator=torch.Generator().manual_seed(1))
        normalised = torch.from_numpy((pictures.numpy() / 255 - mean) / std).float()
        embedding, last = run(tmp_path / f"image{suffix}", "pictures", pictures)
        (text,) = run(tmp_path / f"text{suffix}", "tokens", tokens)
        with torch.no_grad():
            np.testing.assert_allclose(embedding, encoder.pooled(normalised), atol=1e-4)
            np.testing.assert_allclose(last, encoder.last(normalised), atol=1e-4)
            np.testing.assert_allclose(text, model.encode_text(tokens), atol=1e-4)
    said = json.loads((tmp_path / "export.json").read_text())
    assert said["image"]["input"] == {"name": "pictures", "dtype": "uint8", "shape": ["batch", 3, 24, 40]}
    assert said["image"]["outputs"]["map"]["shape"] == ["batch", 64, 3, 5]
    assert said["logit_scale"] == pytest.approx(1 / 0.07)
    assert said["image"]["largest_difference"] < programs.TOLERANCE
    assert len(said["source_hash"]) == 16


def test_positions_made_for_a_size_are_those_interpolated_for_it(model_of):
    from cutline.towers.export import at_size

    for kind in ("vit", "timm-vit", "timm-registers", "timm-rope"):
        encoder = towers.load_encoder(model_of(kind))
        size = (5 * encoder.multiple, 8 * encoder.multiple)
        x = noise(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(at_size(encoder, size).last(x), encoder.last(x), rtol=1e-4, atol=1e-4)


def test_a_program_that_differs_is_not_kept_and_leaves_the_old_one(model_of, tmp_path, monkeypatch):
    model, out = model_of("vit"), tmp_path / "out"
    out.mkdir()
    (out / "image.pt2").write_bytes(b"an older one")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    # As an exporter does that bakes a value in: what is compared to is no longer what was written.
    run = programs._run
    monkeypatch.setattr(programs, "_run", lambda *a: [y + 0.1 for y in run(*a)])
    with pytest.raises(CutlineError, match="another image_embedding than the model"):
        export(model, out, "torch_export")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_infinities_agree_and_nan_never_does():
    inf, nan = float("inf"), float("nan")
    assert programs.compare(("y",), [torch.tensor([-inf, 2.0])], [torch.tensor([-inf, 2.001])], "x") < 1e-3
    for wrong in (nan, inf, 2.1):
        with pytest.raises(CutlineError, match="another y"):
            programs.compare(("y",), [torch.tensor([-inf, 2.0])], [torch.tensor([-inf, wrong])], "x")


def test_a_missing_package_is_named_with_its_remedy(model_of, tmp_path, monkeypatch):
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else True)
    with pytest.raises(CutlineError, match=r"needs onnxscript: pip install 'cutline\[onnx\]'"):
        export(model_of("vit"), tmp_path / "out", "onnx")


def test_wrong_words_are_told(model_of, tmp_path):
    with pytest.raises(ConfigError, match="none of timm, open_clip, onnx, torch_export"):
        export(model_of("vit"), tmp_path / "out", "tflite")
    with pytest.raises(ConfigError, match="keeps the size"):
        export(model_of("vit"), tmp_path / "out", "timm", size=(64, 64))
    assert programs.parse_size("480x640") == (480, 640)
    assert programs.parse_size("224") == (224, 224)
    for wrong in ("1x2x3", "a", "0", "x5"):
        with pytest.raises(CutlineError, match="height x width"):
            programs.parse_size(wrong)
