"""Building, loading and saving: open_clip's format both ways, activations, sizes, and what is refused."""

import json
import pickle
import subprocess
import sys

import open_clip
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from cutline import towers
from cutline.errors import ConfigError, DataError
from cutline.towers import PRESETS, TowerConfig
from cutline.towers.store import preprocess_of

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
VARIANTS = {
    "clip": TINY,
    "custom text": {**TINY, "custom_text": True},
    "quick gelu": {**TINY, "quick_gelu": True},
    "logit bias": {**TINY, "init_logit_bias": -10.0},
    "timm tower": {
        **TINY,
        "vision_cfg": {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear", "image_size": 64},
        "custom_text": True,
    },
}


def build(cfg=TINY, **options):
    torch.manual_seed(0)
    return towers.build(TowerConfig(custom=cfg, **options)).eval()


def outputs(model, size=32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, size, size, generator=generator)
    tokens = torch.zeros(2, 16, dtype=torch.long)
    tokens[:, :4] = torch.tensor([[49406, 320, 2368, 49407], [49406, 22697, 0, 49407]])
    with torch.no_grad():
        return model.encode_image(x, normalize=True), model.encode_text(tokens, normalize=True)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_saved_model_opens_in_open_clip_and_here_with_equal_outputs(variant, tmp_path):
    model = build(VARIANTS[variant])
    size = preprocess_of(model)["size"]
    expected = outputs(model, size)
    folder = towers.save(model, tmp_path / "model")
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert same(outputs(theirs.eval(), size), expected)
    assert f"size={size}" in repr(transform)
    for name in (str(folder), f"local-dir:{folder}", str(tmp_path)):  # the last as a run directory
        ours = towers.load(name)
        assert same(outputs(ours, size), expected)
        assert not ours.training
        assert preprocess_of(ours) == preprocess_of(model)
        assert ours.name == name
    assert towers.load_encoder(str(folder)).hash == towers.load_encoder(model).hash


def test_a_folder_that_open_clip_wrote_opens_here_with_equal_outputs(tmp_path):
    from open_clip.push_to_hf_hub import save_for_hf

    class NoFiles:
        def save_pretrained(self, folder):
            pass

    theirs = open_clip.CLIP(**TINY, quick_gelu=True).eval()
    preprocessing = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear"}
    open_clip.set_model_preprocess_cfg(theirs, preprocessing)
    save_for_hf(theirs, NoFiles(), {**TINY, "quick_gelu": True}, tmp_path)
    ours = towers.load(str(tmp_path))
    assert same(outputs(ours), outputs(theirs))
    encoder = towers.load_encoder(ours)
    assert (encoder.mean, encoder.std, encoder.size) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 32)


def test_saving_again_replaces_the_weights_and_leaves_nothing_behind(tmp_path):
    model = build()
    towers.save(model, tmp_path)
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
    towers.save(model.to(memory_format=torch.channels_last), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["open_clip_config.json", "open_clip_model.safetensors"]
    assert float(load_file(tmp_path / "open_clip_model.safetensors")["logit_scale"]) == 1.5


def test_a_run_goes_on_from_another_models_folder(tmp_path):
    model = build()
    towers.save(model, tmp_path / "model")
    started = towers.build(TowerConfig(model=str(tmp_path)))
    assert same(outputs(started.eval()), outputs(model))
    assert started.model_cfg == model.model_cfg
    with pytest.raises(ConfigError, match="brings its own weights"):
        towers.build(TowerConfig(model=str(tmp_path), pretrained="openai"))


@pytest.fixture
def openai_weights(tmp_path, monkeypatch):
    """ViT-B-32's tag "openai" without a network: weights of a model that has QuickGELU, and the tag says so."""
    cfg = {**TINY, "quick_gelu": True}
    folder = towers.save(build(cfg), tmp_path / "hub")
    tag = {"quick_gelu": True, "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0), "interpolation": "bicubic"}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, t: tag if t == "openai" else {})
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: _named(name))
    monkeypatch.setattr(
        "cutline.towers.store.download_pretrained", lambda cfg: str(folder / "open_clip_model.safetensors")
    )
    return build(cfg)


def _named(name):
    if name not in ("ViT-B-32", "ViT-B-32-quickgelu"):
        return None
    return {**TINY, "quick_gelu": name.endswith("quickgelu"), "text_cfg": {**TINY["text_cfg"]},
            "vision_cfg": {**TINY["vision_cfg"]}}  # fmt: skip


def test_a_tag_with_another_activation_is_refused_with_the_way_out(openai_weights):
    for call in (
        lambda: towers.load("ViT-B-32:openai"),
        lambda: towers.build(TowerConfig(model="ViT-B-32", pretrained="openai")),
    ):
        with pytest.raises(ConfigError, match="QuickGELU") as e:
            call()
        assert "quick_gelu: true" in str(e.value)
        assert "ViT-B-32-quickgelu" in str(e.value)
    with pytest.raises(ConfigError, match="quick_gelu: true"):
        towers.build(TowerConfig(model="ViT-B-32-quickgelu", pretrained="openai", quick_gelu=False))
    expected = outputs(openai_weights)
    assert same(outputs(towers.load("ViT-B-32-quickgelu:openai")), expected)
    model = towers.build(TowerConfig(model="ViT-B-32", pretrained="openai", quick_gelu=True)).eval()
    assert same(outputs(model), expected)
    assert model.model_cfg["quick_gelu"] is True
    assert preprocess_of(model)["mean"] == (0.1, 0.2, 0.3)


def test_a_folder_with_another_activation_is_refused(tmp_path):
    towers.save(build({**TINY, "quick_gelu": True}), tmp_path)
    with pytest.raises(ConfigError, match="trained with QuickGELU, and this config would run it with GELU"):
        towers.build(TowerConfig(model=str(tmp_path), quick_gelu=False))
    weights = str(tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ConfigError, match="Set quick_gelu: true"):
        towers.build(TowerConfig(custom=TINY, pretrained=weights))


def test_a_weights_file_alone_needs_its_activation_said(tmp_path):
    model = build()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="does not say which activation"):
        towers.build(TowerConfig(custom=TINY, pretrained=str(tmp_path / "weights.pt")))
    ours = build(TINY, pretrained=str(tmp_path / "weights.pt"), quick_gelu=False)
    assert same(outputs(ours), outputs(model))


class Payload:
    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_is_unpickled(tmp_path, capsys):
    with open(tmp_path / "weights.pt", "wb") as f:
        pickle.dump(Payload(), f)
    torch.save({"state_dict": Payload()}, tmp_path / "zip.pt")
    for name in ("weights.pt", "zip.pt"):
        with pytest.raises(DataError, match="do not fit"):
            towers.build(TowerConfig(custom=TINY, pretrained=str(tmp_path / name), quick_gelu=False))
    assert "unpickled" not in capsys.readouterr().out


def test_weights_of_another_architecture_are_refused_by_name(tmp_path):
    weights = towers.save(build(), tmp_path) / "open_clip_model.safetensors"
    wide = {**TINY, "vision_cfg": {**TINY["vision_cfg"], "width": 64}}
    with pytest.raises(DataError, match=r"open_clip_model.safetensors.*class_embedding"):
        towers.build(TowerConfig(custom=wide, pretrained=str(weights)))


def test_an_image_size_override_interpolates_the_positions_of_a_checkpoint(tmp_path):
    weights = towers.save(build(), tmp_path) / "open_clip_model.safetensors"
    large = build(TINY, pretrained=str(weights), image_size=48)
    assert large.visual.positional_embedding.shape[0] == 1 + 6 * 6
    encoder = towers.load_encoder(build())
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():  # the same interpolation as an Encoder's at that size
        torch.testing.assert_close(large.encode_image(x), encoder.pooled(x))
    again = towers.load(str(towers.save(large, tmp_path / "large")))
    assert (preprocess_of(again)["size"], again.model_cfg["vision_cfg"]["image_size"]) == (48, 48)


def test_a_size_that_the_patch_does_not_divide_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"100 is no multiple of the patch size 8. The nearest is 96"):
        build(TINY, image_size=100)


def test_a_tower_of_fixed_size_refuses_another_and_a_convolutional_one_takes_it():
    with pytest.raises(ConfigError, match="vit_base_mci_224 is made for 224 px"):
        towers.build(TowerConfig(model="MobileCLIP-B", image_size=256))
    model = build(VARIANTS["timm tower"], image_size=96)
    assert towers.load_encoder(model).size == 96


@pytest.mark.parametrize("custom_text", [False, True])
def test_a_shorter_context_cuts_positions_and_keeps_the_embeddings_of_captions_that_fit(custom_text, tmp_path):
    model = build({**TINY, "custom_text": custom_text})
    weights = towers.save(model, tmp_path) / "open_clip_model.safetensors"
    short = build({**TINY, "custom_text": custom_text}, pretrained=str(weights), context_length=8)
    long, cut = (towers.Tokenizer(m)(["a cat", "a diagram"]) for m in (model, short))
    assert cut.shape == (2, 8)
    with torch.no_grad():
        torch.testing.assert_close(short.encode_text(cut), model.encode_text(long), rtol=1e-5, atol=1e-6)
    again = towers.load(str(towers.save(short, tmp_path / "short")))
    assert torch.equal(again.encode_text(cut), short.encode_text(cut))


def test_a_shorter_context_is_refused_where_padding_counts(tmp_path):
    cfg = {**TINY, "custom_text": True, "text_cfg": {**TINY["text_cfg"], "no_causal_mask": True}}
    weights = towers.save(build(cfg), tmp_path) / "open_clip_model.safetensors"
    with pytest.raises(ConfigError, match="attends to padding"):
        build(cfg, pretrained=str(weights), context_length=8)
    assert build(cfg, context_length=8).context_length == 8  # from scratch it is only a smaller tower


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "vit-small-112"])
def test_presets_build_and_embed_both_sides(name):
    model = towers.build(TowerConfig(model=name)).eval()
    size = preprocess_of(model)["size"]
    tokens = towers.Tokenizer(model)(["a red ball left of a dog"])
    with torch.no_grad():
        image, text = model.encode_image(torch.randn(1, 3, size, size)), model.encode_text(tokens)
    assert image.shape == text.shape == (1, PRESETS[name]["embed_dim"])
    assert str(size) in name


def test_scratch_models_follow_the_seed():
    torch.manual_seed(3)
    a = towers.load("scratch:vit-tiny-64")
    torch.manual_seed(3)
    b = towers.load("scratch:vit-tiny-64")
    c = towers.load("scratch:vit-tiny-64")
    hashes = [towers.load_encoder(m).hash for m in (a, b, c)]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": "ViT-B-23"}, "'ViT-B-23' is no run directory.*Near: .*ViT-B-32"),
        ({"model": "ViT-B-32", "pretrained": "nowhere"}, "neither a file nor a tag of ViT-B-32.*laion2b_s34b_b79k"),
        ({"custom": {"embed_dim": 8}}, "vision_cfg is missing"),
        ({"custom": {**TINY, "vision_cfg": None}}, "vision_cfg of custom is a mapping, and here it is None"),
        ({"custom": {**TINY, "vision_cfg": {"widht": 3}}}, "unknown key 'widht' in vision_cfg: did you mean 'width'"),
        ({"custom": {**TINY, "embed": 3}}, "cannot build this model config.*embed"),
    ],
)
def test_configs_that_name_nothing_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        towers.build(TowerConfig(**config))


@pytest.mark.parametrize("config", [{}, {"model": "vit-tiny-64", "custom": TINY}])
def test_a_config_names_exactly_one_model(config):
    with pytest.raises(ValidationError, match="exactly one of model"):
        TowerConfig(**config)


def test_names_without_weights_say_what_to_add():
    with pytest.raises(ConfigError, match=r"without weights.*laion2b_s34b_b79k.*'scratch:ViT-B-32'"):
        towers.load("ViT-B-32")
    with pytest.raises(ConfigError, match="no run directory"):
        towers.load("no/such/run")


def test_folders_without_a_model_say_so(tmp_path):
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(DataError, match="holds no model"):
        towers.load(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(DataError, match="not an open_clip config"):
        towers.load(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY}))
    with pytest.raises(DataError, match="no weights"):
        towers.load(str(tmp_path))


def test_a_timm_tower_alone_is_not_written_in_open_clips_format(tmp_path):
    with pytest.raises(DataError, match="timm image tower"):
        towers.save(towers.load("scratch:convnext_atto"), tmp_path)


def test_importing_the_package_and_its_config_costs_no_torch():
    code = "import sys, cutline.towers, cutline.towers.config; assert not {'torch', 'open_clip', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
