"""Tokens, trimming with equal outputs, and the last block for the pooled token alone."""

import copy
import shutil
from concurrent.futures import ThreadPoolExecutor

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutline import towers
from cutline.errors import CutlineError
from cutline.towers.droppath import set_drop_path
from cutline.towers.model import TextTower

START, END = 49406, 49407

# OpenAI's tokeniser with ftfy 6.3.1, worked out apart from open_clip.
TOKENS = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "a diagram": [320, 22697],
    "Hello World!": [3306, 1002, 256],
    "it's  a   DOG's life &amp; times": [585, 568, 320, 1929, 568, 970, 261, 1661],
    "naïve café 東京 😀": [1097, 35689, 563, 15304, 48338, 21078, 361, 7334],
    "3.14159 + 42": [274, 269, 272, 275, 272, 276, 280, 266, 275, 273],
    "a bad photo of the hermit crab.": [320, 2103, 1125, 539, 518, 43953, 11574, 269],
    "": [],
}


def build(**text):
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 32}
    options = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3, **text}
    cfg = {"embed_dim": 48, "vision_cfg": vision, "text_cfg": options, "custom_text": options.pop("custom", False)}
    return towers.build(towers.TowerConfig(custom=cfg))


@pytest.mark.parametrize("text", list(TOKENS))
def test_tokens_are_openais(text):
    expected = [START, *TOKENS[text], END]
    tokens = towers.Tokenizer(build())([text])
    assert tokens.shape == (1, 77)
    assert tokens[0].tolist() == expected + [0] * (77 - len(expected))


def test_no_texts_give_no_rows():
    assert towers.Tokenizer(build())([]).shape == (0, 77)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.sampled_from([1, 4, 8]), st.data())
def test_trimming_keeps_every_text_and_rounds_the_longest_up(lengths, multiple, data):
    tokens = torch.zeros(len(lengths), 20, dtype=torch.long)
    for i, n in enumerate(lengths):
        if n:  # id 0 ("!") may stand inside a text, not at its end
            tokens[i, :n] = torch.tensor([*data.draw(st.lists(st.integers(0, 9), min_size=n - 1, max_size=n - 1)), 9])
    cut = towers.trim(tokens, multiple)
    most = max(max(lengths), 1)
    assert cut.shape[1] == min(-(-most // multiple) * multiple, 20)
    assert torch.equal(torch.nn.functional.pad(cut, (0, 20 - cut.shape[1])), tokens)


def test_texts_longer_than_the_context_are_counted_and_those_that_just_fit_are_not():
    tokenizer = towers.Tokenizer(build(context_length=8))
    texts = ["dog " * 5, "dog " * 6, "dog " * 7, "dog " * 50, ""]
    tokens = tokenizer(texts)
    assert tokenizer.truncated(texts) == tokenizer.truncated(texts, tokens) == 2
    assert tokens[3, -1] == END


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("text", [{}, {"custom": True}, {"custom": True, "pool_type": "first"}], ids=str)
def test_trimmed_captions_give_the_embeddings_and_gradients_of_untrimmed_ones(text, mode):
    model = build(**text)
    model.train(mode == "train")
    tokenizer = towers.Tokenizer(model)
    tokens = tokenizer(["two brown dogs on a beach", "a cat!! on a mat", "", "wow " * 20])
    assert tokenizer.trimmable
    outputs, gradients = [], []
    for given_tokens in (tokens, tokenizer.trimmed(tokens)):
        model.zero_grad()
        embedded = model.encode_text(given_tokens, normalize=True)
        (embedded * torch.linspace(-1, 1, embedded.numel()).view_as(embedded)).sum().backward()
        outputs.append(embedded.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert tokenizer.trimmed(tokens).shape == (4, 24)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "text",
    [
        {"custom": True, "no_causal_mask": True},
        {"custom": True, "pool_type": "last"},
        {"no_causal_mask": True},
    ],
    ids=str,
)
def test_towers_that_look_at_the_padding_are_left_untrimmed_and_refuse_short_captions(text):
    model = build(**text).eval()
    tokenizer = towers.Tokenizer(model)
    tokens = tokenizer(["a cat", "a dog"])
    assert not tokenizer.trimmable
    assert tokenizer.trimmed(tokens) is tokens
    assert model.encode_text(tokens).shape == (2, 48)
    with pytest.raises(CutlineError, match="exactly .* 77 tokens and was given 8"):
        model.encode_text(tokens[:, :8])


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(CutlineError, match="at most 77 tokens and was given 80"):
        build().encode_text(torch.ones(1, 80, dtype=torch.long))


def test_an_image_tower_alone_has_no_texts():
    with pytest.raises(CutlineError, match="without a text tower"):
        towers.load("scratch:convnext_atto").encode_text(torch.ones(1, 77, dtype=torch.long))


@pytest.mark.parametrize("text", [{}, {"custom": True}, {"custom": True, "no_causal_mask": True}], ids=str)
def test_finishing_the_pooled_token_alone_changes_neither_embeddings_nor_gradients(text):
    model = build(**text)
    x = torch.randn(3, 3, 32, 32)
    tokens = towers.Tokenizer(model)(["a cat", "two dogs run", ""])
    found = {}
    for training in (True, False):  # only training takes the short way
        model.train(training)
        model.zero_grad()
        image, words = model.encode_image(x, normalize=True), model.encode_text(tokens, normalize=True)
        weights = torch.linspace(-1, 1, image.numel()).view_as(image)
        ((image + words) * weights).sum().backward()
        found[training] = (image.detach(), words.detach(), {n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(found[True][0], found[False][0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[True][1], found[False][1], rtol=0, atol=1e-6)
    for name, gradient in found[False][2].items():
        if gradient is not None:
            torch.testing.assert_close(found[True][2][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_short_way_computes_less_and_gives_way_to_gradient_checkpointing():
    from torch.utils.flop_counter import FlopCounterMode

    model = build().train()
    x = torch.randn(2, 3, 32, 32)

    def work() -> int:
        with FlopCounterMode(display=False) as counter:
            model.encode_image(x)
        return counter.get_total_flops()

    short = work()
    model.visual.set_grad_checkpointing(True)
    whole = work()
    assert 0.65 < short / whole < 0.78  # 10 of 12 parts of the last of 3 blocks: 1 − 10/36, and attention


def test_drop_path_reaches_the_last_block_on_the_short_way_too():
    model = build().train()
    set_drop_path(model.visual, 0.9)
    x = torch.randn(1, 3, 32, 32)
    torch.manual_seed(0)
    with torch.no_grad():
        assert len({round(float(model.encode_image(x).sum()), 4) for _ in range(20)}) > 1


def test_text_towers_keep_open_clips_names_and_values():
    model = build(custom=True).eval()
    theirs = open_clip.CustomTextCLIP(**{k: v for k, v in copy.deepcopy(model.model_cfg).items() if k != "custom_text"})
    theirs.load_state_dict(model.state_dict())
    tokens = towers.Tokenizer(model)(["a cat", "a dog"])
    assert isinstance(model.text, TextTower)
    assert torch.equal(theirs.eval().encode_text(tokens), model.encode_text(tokens))


@pytest.fixture(params=["[PAD]", "[END]"])
def hub_tokenizer(tmp_path, request):
    """A word-level tokeniser in Hugging Face's format: no network, padding 1 or as in SigLIP's the end token 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    transformers = pytest.importorskip("transformers")
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "[END]": 2, "a": 3, "cat": 4, "dog": 5}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A [END]", special_tokens=[("[END]", 2)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token=request.param, eos_token="[END]"
    )
    fast.save_pretrained(tmp_path / "hub")
    return str(tmp_path / "hub")


def test_a_hugging_face_tokeniser_is_safe_in_threads(hub_tokenizer):
    model = build(no_causal_mask=True, context_length=6, vocab_size=8, custom=True, hf_tokenizer_name=hub_tokenizer)
    tokenizer = towers.Tokenizer(model)
    texts = ["a cat"] * 4 + ["dog " * 9] * 4
    expected = tokenizer(texts)

    def work(_: int) -> bool:
        return torch.equal(tokenizer(texts), expected) and tokenizer.truncated(texts) == 4

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(600)))


def test_a_hugging_face_tokeniser_travels_with_the_model(hub_tokenizer, tmp_path):
    text = {"custom": True, "no_causal_mask": True, "context_length": 6, "vocab_size": 8}
    model = build(**text, hf_tokenizer_name=hub_tokenizer).eval()
    tokenizer = towers.Tokenizer(model)
    texts = ["a cat", "dog dog dog dog dog", "dog dog dog dog dog dog", "bird"]
    tokens = tokenizer(texts)
    assert tokens.tolist()[0] == [3, 4, 2, *[tokenizer.padding] * 3]
    assert tokenizer.truncated(texts) == 1
    assert tokenizer.trimmed(tokens) is tokens
    folder = towers.save(model, tmp_path / "model")
    ours = towers.load(str(folder))
    assert torch.equal(towers.Tokenizer(ours)(texts), tokens)
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{folder}")(texts), tokens)
    assert ours.model_cfg["text_cfg"]["hf_tokenizer_name"] == hub_tokenizer  # no path of this machine creeps in
    again = towers.save(ours, tmp_path / "again")
    assert torch.equal(towers.Tokenizer(towers.load(str(again)))(texts), tokens)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    shutil.rmtree(hub_tokenizer)
    with pytest.raises(CutlineError, match="cannot read the tokeniser.*Check the network, or put its files"):
        towers.Tokenizer(towers.load(str(folder)))
