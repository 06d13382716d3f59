"""CoCa: trimming with equal outputs, presets that open in open_clip, its decoder."""

import open_clip
import pytest
import torch

from cutline import towers
from cutline.errors import ConfigError
from cutline.towers.presets import coca


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return towers.build(towers.TowerConfig(model="coca-tiny-64")).double().eval()


@pytest.mark.parametrize("correct_mask", [False, True])
def test_trimmed_captions_give_the_embeddings_tokens_and_gradients_of_untrimmed_ones(model, correct_mask):
    model.text.correct_cls_mask = correct_mask
    tokenizer = towers.Tokenizer(model)
    assert tokenizer.trimmable
    for texts in (["two dogs", "a cat!! on a mat", ""], ["a red cup on a tile", "dogs"], ["word " * 37, "a"]):
        tokens = tokenizer(texts)
        cut = tokenizer.trimmed(tokens)
        written = cut != 0
        results = []
        for given in (tokens, cut):
            embedding, each = model.text_and_tokens(given)
            each = each[:, : cut.shape[1]][written]
            (embedding[:, 0].sum() + each[:, 0].sum()).backward()
            results.append((embedding.detach(), each.detach(), model.text.positional_embedding.grad.clone()))
            model.zero_grad()
        for whole, short in zip(*results, strict=True):
            torch.testing.assert_close(short, whole, rtol=1e-9, atol=1e-11)
    model.text.correct_cls_mask = False


def test_a_coca_without_a_stem_opens_in_open_clip_with_equal_logits(tmp_path):
    torch.manual_seed(1)
    ours = towers.build(towers.TowerConfig(custom=coca(64, 8, 128, 2, 2))).eval()
    towers.save(ours, tmp_path)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    x = torch.randn(2, 3, 64, 64)
    tokens = towers.Tokenizer(ours)(["a red apple", "two cups"])
    with torch.no_grad():
        embedding, each = ours.image_and_tokens(x)
        logits = ours.decode(each, ours.text_and_tokens(tokens)[1]) @ ours.text_decoder.text_projection
        out = theirs(x, tokens, output_labels=False)
    torch.testing.assert_close(logits, out["logits"])
    torch.testing.assert_close(embedding, out["image_features"])
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ["coca-tiny-64", "coca-tiny-112"])
def test_presets_with_a_stem_come_back_as_saved_and_are_encoders(name, tmp_path):
    torch.manual_seed(1)
    ours = towers.build(towers.TowerConfig(model=name)).eval()
    towers.save(ours, tmp_path)
    size = ours.visual.image_size[0]
    x = torch.randn(2, 3, size, size)
    again = towers.load(str(tmp_path)).eval()
    assert again.gives_tokens
    with torch.no_grad():
        for mine, saved in zip(ours.image_and_tokens(x), again.image_and_tokens(x), strict=True):
            torch.testing.assert_close(saved, mine)
    encoder = towers.load_encoder(str(tmp_path))
    grid = size // encoder.strides[-1]
    assert encoder(x)[-1].shape == (2, ours.visual.transformer.width, grid, grid)


def test_a_shorter_context_is_refused(model, tmp_path):
    towers.save(model, tmp_path)
    with pytest.raises(ConfigError, match="context_length=20.*CoCa"):
        towers.build(towers.TowerConfig(model=str(tmp_path), context_length=20))
