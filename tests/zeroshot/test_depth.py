"""Depth from words: DepthCLIP by its formula, learned texts through the frozen tower, and training that leaves it alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from dense_made import save as save_picture
from PIL import Image
from torch import nn

from cutline import towers
from cutline.errors import ConfigError, CutlineError, DataError
from cutline.record import Result
from cutline.towers.config import TowerConfig
from cutline.towers.model import ImageModel
from cutline.towers.store import build
from cutline.transfer import store
from cutline.transfer.depth import score
from cutline.zeroshot.depth import config_for, depth, predict
from cutline.zeroshot.depthclip import METRES, NAMES, DepthClip, DepthClipConfig, attended, joint_map, resolved
from cutline.zeroshot.embedded import EmbeddedText, framed, room
from cutline.zeroshot.mirror import Mirror, MirrorConfig
from cutline.zeroshot.tokens import TokensConfig

VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "layers": 2, "heads": 2}
QUICK: dict[str, Any] = {
    "batch": 8, "lr": 5e-3, "max_depth": 7, "flip": False, "split": "train", "save_every": 1000,
}  # fmt: skip
SMALL: dict[str, Any] = {"channels": 16, "filters": 16, "tokens": 4, "deconvolutions": 1}


def made(vision: dict[str, Any] = VISION, **text: Any) -> towers.Model:
    torch.manual_seed(0)
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": {**TEXT, **text}}
    if text:
        config["custom_text"] = True
    return build(TowerConfig(custom=config)).eval()


@pytest.fixture(scope="module")
def model() -> towers.Model:
    return made()


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A ground that rises away from the camera, and a nearer box; a first row without a reading."""
    root = tmp_path_factory.mktemp("rooms")
    for split, count in (("train", 8), ("val", 4)):
        for i in range(count):
            rng = np.random.default_rng([i, len(split)])
            metres = np.linspace(6, 2, 32)[:, None].repeat(32, 1)
            image = (np.array([60, 160, 60]) + rng.integers(-15, 15, (32, 32, 3))).astype(np.uint8)
            top, left = rng.integers(2, 20, 2)
            metres[top : top + 12, left : left + 12] = 1
            image[top : top + 12, left : left + 12] = (220, 40, 40)
            metres[0] = 0
            save_picture(root / split / "images" / f"{i}.png", image)
            save_picture(root / split / "depth" / f"{i}.png", (metres * 1000).astype(np.uint16))
    return f"folder:{root}"


@torch.no_grad()
def test_depthclip_is_the_plain_formula(model: towers.Model) -> None:
    """Softmax over a thousand cosines, the mean of the bins, and the mean with the mirror image; in float64."""
    twice = made().double()
    texts = twice.encode_text(open_clip.tokenize([f"This object is {w}" for w in NAMES], context_length=16))
    texts = texts / texts.norm(dim=-1, keepdim=True)
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)

    def plain(x: torch.Tensor) -> torch.Tensor:
        v: Any = twice.visual
        patches = v.ln_post(v.transformer(v._embeds(x)))[:, 1:] @ v.proj  # (3, 16, 32)
        patches = patches / patches.norm(dim=-1, keepdim=True)
        shares = (100 * patches @ texts.T / 0.1).softmax(-1)
        return (shares * torch.tensor(METRES, dtype=torch.float64)).sum(-1).view(3, 1, 4, 4)

    ours = DepthClip(twice, DepthClipConfig()).double()
    torch.testing.assert_close(ours.head(ours.features(x)), plain(x), atol=1e-4, rtol=1e-4)
    ours.head.texts = texts  # those from the cache are in single precision
    torch.testing.assert_close(ours.head(ours.features(x)), plain(x), atol=1e-12, rtol=0)

    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    single = DepthClip(model, DepthClipConfig())
    batch = single.normalise(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    both = [single.eval()(b).flip(3) if f else single(b) for f, b in ((0, batch), (1, batch.flip(3)))]
    for found, expected in zip(single.predict(pictures), ((both[0] + both[1]) / 2)[:, 0], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@torch.no_grad()
def test_names_of_bins_may_have_synonyms_the_nearest_of_which_counts(model: towers.Model, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\ufeffnear, close by\n\nfar\n", encoding="utf-8")
    one, two = (
        DepthClip(model, DepthClipConfig(names=names, bins=[1, 3], temperature=5))
        for names in (str(tmp_path / "names.txt"), "near, close by; far")
    )
    joint = torch.randn(2, 32, 3, 4)
    cosine = nn.functional.normalize(joint, dim=1).flatten(2).transpose(1, 2) @ two.head.texts.T  # near, close by, far
    best = torch.stack([cosine[..., :2].amax(-1), cosine[..., 2]], -1)
    expected = ((20 * best).softmax(-1) * torch.tensor([1.0, 3.0])).sum(-1).view(2, 1, 3, 4)
    torch.testing.assert_close(two.head([joint]), expected)
    assert one.notes == two.notes
    assert one.notes["names"] == [["near", "close by"], ["far"]]


def test_pictures_smaller_than_a_patch_have_a_depth_of_their_size(model: towers.Model) -> None:
    small = [np.zeros((2, 3, 3), np.uint8), np.full((1, 40, 3), 9, np.uint8)]
    assert [metres.shape for metres in DepthClip(model, DepthClipConfig()).predict(small)] == [(2, 3), (1, 40)]


@torch.no_grad()
def test_every_token_of_the_attention_pooling_attends_as_its_mean_does() -> None:
    pool = open_clip.modified_resnet.AttentionPool2d(3, 32, 4, 16).double()
    last = torch.rand(2, 32, 3, 3, dtype=torch.float64)
    attention = nn.MultiheadAttention(32, 4, dtype=torch.float64)
    attention.in_proj_weight.copy_(torch.cat([pool.q_proj.weight, pool.k_proj.weight, pool.v_proj.weight]))
    attention.in_proj_bias.copy_(torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]))
    attention.out_proj = pool.c_proj
    x = last.flatten(2).permute(2, 0, 1)
    x = torch.cat([x.mean(0, keepdim=True), x]) + pool.positional_embedding[:, None]
    expected = attention(x, x, x)[0]
    torch.testing.assert_close(expected[0], pool(last), atol=1e-12, rtol=0)
    torch.testing.assert_close(attended(pool, last).flatten(2).permute(2, 0, 1), expected[1:], atol=1e-12, rtol=0)
    resnet = towers.load_encoder(made({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}))
    assert joint_map(resnet, torch.rand(1, 3, 96, 64)).shape == (1, 32, 3, 2)


@torch.no_grad()
def test_a_tower_that_pools_by_attention_gives_each_cell_pooled_alone() -> None:
    model = ImageModel(
        timm.create_model("vit_tiny_patch16_224", depth=1, global_pool="map", num_classes=8)
    )  # as SigLIP's
    open_clip.set_model_preprocess_cfg(model, {"size": 224, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    encoder = towers.load_encoder(model.eval())
    x = torch.rand(1, 3, 32, 48)
    trunk: Any = encoder.visual.trunk
    expected = trunk.head(trunk.attn_pool(encoder.last(x)[:, :, 1, 2][:, None]))
    torch.testing.assert_close(joint_map(encoder, x)[:, :, 1, 2], expected)


@pytest.mark.parametrize(
    "text", [{}, {"no_causal_mask": True, "pool_type": "last"}, {"embed_cls": True}], ids=["CLIP", "SigLIP's", "CoCa's"]
)
@torch.no_grad()
def test_learned_vectors_of_a_real_text_are_that_text(text: dict[str, Any]) -> None:
    model = made(**text)
    prompt = "a photo of two cats"
    tokenizer = towers.Tokenizer(model)
    ids, first = framed(model, 5)
    tower: Any = EmbeddedText(model, ids, first)
    real = tokenizer([prompt])
    words = real[0, first : first + 5]
    embeddings = getattr(model, "text", model).token_embedding(words)
    expected = model.encode_text(tokenizer.trimmed(real), normalize=True)
    torch.testing.assert_close(tower(embeddings[None]), expected)
    assert not torch.allclose(tower(embeddings[None].flip(1)), expected)
    torch.testing.assert_close(model.encode_text(tokenizer.trimmed(real), normalize=True), expected)  # no hook is left
    assert tower.model.visual is None
    assert room(model) == 14
    with pytest.raises(ConfigError, match="at most 14"):
        framed(model, 15)


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


@pytest.mark.parametrize(
    ("config", "learned"),
    [
        (MirrorConfig(**{**QUICK, "lr": 1e-2}, **SMALL, steps=50), ("mirror", "reduce", "film", "decoder")),
        (TokensConfig(**QUICK, steps=80, count=6, temperature=1.0), ("context", "words")),
    ],
    ids=["mirror", "tokens"],
)
def test_training_learns_and_leaves_both_towers_as_they_are(
    model: towers.Model, rooms: str, tmp_path: Path, config: Any, learned: tuple[str, ...]
) -> None:
    before = weights(model)
    untrained = depth(model, rooms, config.model_copy(update={"steps": 1, "lr": 1e-9}))
    result = depth(model, rooms, config, tmp_path)
    assert result.metrics["rmse"] < untrained.metrics["rmse"] * (0.3 if config.method == "mirror" else 0.8)
    kept: Any = store.load(tmp_path)
    assert score(kept, rooms).metrics == result.metrics
    assert {n.split(".")[1] for n, p in kept.named_parameters() if p.requires_grad} == set(learned)
    assert all(n.startswith("head.") for n, p in kept.named_parameters() if p.requires_grad)
    for name, value in kept.state_dict().items():
        original = name.removeprefix("head.text.model.").removeprefix("encoder.")
        if original in before:
            assert torch.equal(value, before[original]), name
    assert sum(n.startswith("head.text.model.transformer") for n in kept.state_dict()) > 0
    assert (tmp_path / "samples.png").exists()
    assert result == Result.read(tmp_path)
    assert depth(model, rooms, config, tmp_path, resume=True) == result  # and trains nothing
    other = made()
    other.text_projection.data += 1  # type: ignore[operator]
    with pytest.raises(ConfigError, match="another config, encoder or data"):
        depth(other, rooms, config, tmp_path, resume=True)


def test_resume_after_a_kill_gives_the_same_model(
    model: towers.Model, rooms: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MirrorConfig(**{**QUICK, "flip": True, "save_every": 2}, **SMALL, steps=4, scale=(0.8, 1.2), crop=(32, 32))
    depth(model, rooms, config, tmp_path / "whole")
    original, left = torch.optim.AdamW.step, [4]

    def step(self: Any, *args: Any, **kw: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return original(self, *args, **kw)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(KeyboardInterrupt):
        depth(model, rooms, config, tmp_path / "half")
    depth(model, rooms, config, tmp_path / "half", resume=True)
    whole, resumed = (store.load(tmp_path / name).state_dict() for name in ("whole", "half"))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_bins_of_the_data_are_quantiles_and_the_protocol_says_that_labels_were_used(
    model: towers.Model, rooms: str
) -> None:
    config = DepthClipConfig(names=["near", "far"], bins="data", max_depth=5.9)
    result = depth(model, rooms, config)
    readings = []
    for path in sorted(Path(rooms.removeprefix("folder:")).glob("train/depth/*.png")):
        metres = np.asarray(Image.open(path)) / 1000
        readings += metres[(metres > 1e-3) & (metres <= 5.9)].tolist()  # row 0 has no reading; some lie beyond
    readings.sort()
    bins = [readings[len(readings) // 4], readings[len(readings) * 3 // 4]]
    assert result.protocol.settings["bins"] == pytest.approx(bins, rel=1e-3)
    assert result.protocol.settings["bins_from"] == "quantiles of training depth"
    assert result.protocol.settings["trained"] == 8
    given = depth(model, rooms, config.model_copy(update={"bins": result.protocol.settings["bins"]}))
    assert given.metrics == result.metrics
    assert given.protocol.settings["trained"] == 0
    assert given.protocol.column() != result.protocol.column()


def test_readings_outside_the_range_do_not_count(model: towers.Model, rooms: str) -> None:
    """A constant of 3 m is as far off as its formula says, over readings within the range."""
    found = depth(model, rooms, DepthClipConfig(names=["a", "b"], bins=[2.9999999, 3.0], min_depth=1.5, max_depth=5))
    errors = []
    for path in Path(rooms.removeprefix("folder:")).glob("val/depth/*.png"):
        metres = np.asarray(Image.open(path)) / 1000
        errors.append(np.sqrt(np.mean((metres[(metres > 1.5) & (metres <= 5)] - 3) ** 2)))
    assert found.metrics["rmse"] == pytest.approx(np.mean(errors), rel=1e-5)
    with pytest.raises(DataError, match=r"between 0\.001 and 0\.5 m"):
        depth(model, rooms, DepthClipConfig(max_depth=0.5))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["bins=[1,2]"], "7 names and 2 bins"),
        (["bins=[3]", "names=[far]"], "one bin gives one depth"),
        (["names=[far]", "bins=data"], "one name gives one depth"),
        (["names=[far,near]", "bins=[2,1]"], "must be positive and rise"),
        (["method=tokens", "bins=[2,2]"], "must be positive and rise"),
        (["names=[far,'']", "bins=[1,2]"], "class 2 of 2 has no name"),
        (["stride=16"], "test=whole has no windows: leave stride out"),
        (["crop=32"], "test=whole has no windows: leave crop out"),
        (["lr=0.1"], "method=depthclip trains nothing: leave lr out"),
        (["labels=10"], "only bins=data looks at labels"),
        (["method=mirror", "temperature=1"], "temperature"),
        (["method=mirror", "frozen=false"], "frozen"),
        (["method=mirror", "pyramid=taps"], "unknown key 'pyramid'"),
        (["method=mirror", "pyramid_channels=64"], "unknown key 'pyramid_channels'"),
        (["method=tokens", "channels=64"], "unknown key 'channels'"),
        (["method=magic"], "none of depthclip, tokens, mirror"),
        (["min_depth=3", "max_depth=2"], "must be below max_depth"),
    ],
)
def test_options_that_cannot_be_are_refused(given: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config_for(given)


def test_bad_models_words_and_data_are_told(model: towers.Model, rooms: str, tmp_path: Path) -> None:
    with pytest.raises(CutlineError, match="image tower without a text tower"):
        depth("scratch:resnet18", rooms, DepthClipConfig())
    with pytest.raises(ConfigError, match="both called 'Far'"):
        depth(model, rooms, DepthClipConfig(names=["far", "Far"], bins=[1, 2]))
    cut = depth(model, rooms, DepthClipConfig(prompts="it is {} " + "and so on " * 9, pictures=1))
    assert cut.metrics["truncated"] == 7
    assert "truncated" not in cut.protocol.settings
    with pytest.raises(ConfigError, match="must hold {} once"):
        depth(model, rooms, DepthClipConfig(prompts=["no place"]))
    with pytest.raises(ConfigError, match="trains nothing: leave --resume out"):
        depth(model, rooms, DepthClipConfig(), tmp_path, resume=True)
    with pytest.raises(ConfigError, match="Take at most 14"):
        depth(model, rooms, MirrorConfig(tokens=15))
    with pytest.raises(ConfigError, match="bins=data needs --data"):
        resolved(DepthClipConfig(bins="data"), None)
    for split in ("train", "val"):
        save_picture(tmp_path / split / "images" / "a.png", np.zeros((32, 32, 3), np.uint8))
        save_picture(tmp_path / split / "depth" / "a.png", np.full((32, 32), 2000, np.uint16))
    with pytest.raises(DataError, match="7 quantiles of its depth are no 7 depths"):
        depth(model, f"folder:{tmp_path}", DepthClipConfig(bins="data"))


def test_the_command_scores_trains_and_looks_at_pictures(
    model: towers.Model, rooms: str, tmp_path: Path, here: Callable[..., Any]
) -> None:
    towers.save(model, tmp_path / "run")
    run, photo = str(tmp_path / "run"), f"{rooms.removeprefix('folder:')}/val/images/0.png"
    done = here("zeroshot", "depth", "--model", run, "--data", rooms, "--out", str(tmp_path / "words"), "max_depth=7")
    assert done.returncode == 0, done.stderr
    assert f"Next: cutline zeroshot depth --model {run} --picture PICTURE" in done.stdout
    assert Result.read(tmp_path / "words").protocol.settings["method"] == "depthclip"
    assert (tmp_path / "words/samples.png").exists()
    options = ("method=mirror", "steps=2", "batch=4", "channels=16", "max_depth=7")
    done = here("zeroshot", "depth", "--model", run, "--data", rooms, "--out", str(tmp_path / "mirror"), *options)
    assert done.returncode == 0, done.stderr
    for source, found in ((run, DepthClip), (str(tmp_path / "mirror"), Mirror)):
        out = tmp_path / f"seen-{found.__name__}"
        done = here("zeroshot", "depth", "--model", source, "--picture", photo, "--out", str(out))
        assert done.returncode == 0, done.stderr
        assert sorted(p.name for p in out.iterdir()) == ["0.depth.png", "0.png"]
    kept = store.load(tmp_path / "mirror")
    seen = np.asarray(Image.open(tmp_path / "seen-Mirror/0.depth.png")) / 1000
    np.testing.assert_allclose(seen, kept.predict([np.asarray(Image.open(photo))])[0], atol=6e-4)
    assert here("zeroshot", "depth", "--model", run).returncode == 1
    with pytest.raises(ConfigError, match="holds no trained model of method=mirror"):
        predict(run, [photo], ["method=mirror"])
