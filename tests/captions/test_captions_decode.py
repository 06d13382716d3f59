"""Cached decoding against a plain loop over open_clip's whole forward pass, row by row; the writer around it."""

import io
import pickle

import numpy as np
import pytest
import torch
from open_clip import CoCa
from PIL import Image
from torch import Tensor

from cutline import towers
from cutline.captions.coca import CocaWriter, plain
from cutline.captions.decode import CocaDecoder, Decoding
from cutline.captions.work import Failed
from cutline.errors import ConfigError
from cutline.train.stream.order import draws, key

START, END = 49406, 49407
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
COCA = {
    "embed_dim": 32, "custom_text": True, "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**TEXT, "layers": 3},
    "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 32, "layers": 1, "head_width": 16, "output_tokens": True},
}  # fmt: skip
POOLED = {**COCA, "vision_cfg": {**COCA["vision_cfg"], "width": 48, "attentional_pool": True, "attn_pooler_heads": 4}}
VOCABULARY = [0, START, END, *range(300, 330)]


# scale of the logits and a liking for the end, such that captions differ in words and lengths
@pytest.fixture(scope="module", params=[(COCA, 2, 10), (POOLED, 4, 3)], ids=["patches", "pooled"])
def model(request) -> towers.Model:
    torch.manual_seed(0)
    made = towers.build(towers.TowerConfig(custom=request.param[0])).double().eval()
    with torch.no_grad():
        made.text_decoder.text_projection *= request.param[1]
        made.text_decoder.ln_final.bias[0] += 1
        made.text_decoder.text_projection[0, END] += request.param[2]
        made.visual.transformer.resblocks[0].mlp.c_proj.weight *= 30
    return made


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


KEYS = [f"row {i}" for i in range(4)]


def written_plainly(model, picture: Tensor, how: Decoding, draw=None, vocabulary=VOCABULARY) -> list[int]:
    """One caption, the whole model anew for each token, and the options as their definitions say."""
    allowed = sorted(set(vocabulary) - {0, START})
    ids: list[int] = []
    while len(ids) < min(how.max_tokens, 18):
        with torch.no_grad():
            logits = CoCa.forward(model, picture[None], torch.tensor([[START, *ids]]), output_labels=False)["logits"]
        scores = {i: logits[0, -1, i].item() for i in allowed}
        for i in set(ids):
            scores[i] = scores[i] * how.repetition_penalty if scores[i] < 0 else scores[i] / how.repetition_penalty
        n = how.no_repeat_ngram
        grams = {tuple(ids[j : j + n]) for j in range(len(ids) - n + 1)} if n else set()
        scores = {i: s for i, s in scores.items() if not n or (*ids[len(ids) - n + 1 :], i) not in grams}
        if len(ids) < how.min_tokens:
            scores.pop(END)
        if not how.temperature:
            best = max(scores, key=lambda i: scores[i])
        else:
            weights = {i: np.exp(s / how.temperature) for i, s in scores.items()}
            total, kept, mass = sum(weights.values()), {}, 0.0
            for i in sorted(weights, key=lambda i: -weights[i]):
                if mass < how.top_p:
                    kept[i] = weights[i]
                mass += weights[i] / total
            at, below = draw() * sum(kept.values()), 0.0
            for best in sorted(kept):
                below += kept[best]
                if below > at:
                    break
        if best == END:
            return ids
        ids.append(best)
    return ids


OPTIONS = [
    {"min_tokens": 0, "no_repeat_ngram": 0},
    {"min_tokens": 5, "no_repeat_ngram": 2, "max_tokens": 9},
    {"min_tokens": 2, "no_repeat_ngram": 0, "repetition_penalty": 1.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_greedy_equals_the_whole_model_run_anew_for_each_token(model, pictures, options):
    how = Decoding(**options)
    captions = CocaDecoder(model, how, VOCABULARY)(pictures, KEYS)
    assert captions == [[written_plainly(model, p, how)] for p in pictures]
    assert len({tuple(c[0]) for c in captions}) > 1


@pytest.mark.parametrize("options", [{**o, "temperature": t, "top_p": p} for o, t, p in zip(OPTIONS, (1.0, 3.0, 0.7), (0.9, 0.6, 1.0))], ids=str)  # fmt: skip
def test_sampling_equals_the_plain_loop_with_the_same_draws(model, pictures, options):
    how = Decoding(**options)
    captions = CocaDecoder(model, how, VOCABULARY)(pictures, KEYS, num=2, seed=7)
    for picture, name, row in zip(pictures, KEYS, captions, strict=True):
        assert row == [written_plainly(model, picture, how, draws(7, i, key(name), "caption")) for i in range(2)]
    lengths = {len(c) for row in captions for c in row}
    assert len(lengths) > 1  # rows that end early stand beside rows that go on


def test_a_caption_does_not_depend_on_its_batch_or_on_how_many_there_are(model, pictures):
    decoder = CocaDecoder(model, Decoding(temperature=1.0), VOCABULARY)
    together = decoder(pictures, KEYS, num=3, seed=1)
    assert decoder(pictures[2:3], KEYS[2:3], num=1, seed=1)[0] == together[2][:1]
    assert decoder(pictures.flip(0), KEYS[::-1], num=3, seed=1)[::-1] == together
    assert decoder(pictures, KEYS, num=3, seed=2) != together


def test_padding_start_and_what_is_outside_the_vocabulary_are_never_written(model, pictures):
    for vocabulary in (VOCABULARY, None):
        captions = CocaDecoder(model, Decoding(temperature=10.0, top_p=1.0), vocabulary)(pictures, KEYS, num=8)
        written = {i for row in captions for c in row for i in c}
        assert not written & {0, START, END}
        assert vocabulary is None or written <= set(vocabulary)
    assert max(len(c) for row in captions for c in row) == 18  # what the context leaves beside start and end


def test_a_row_that_may_write_nothing_more_ends(model, pictures):
    how = Decoding(no_repeat_ngram=1, min_tokens=9)
    captions = CocaDecoder(model, how, [300, 301])(pictures, KEYS)
    assert all(sorted(c[0]) == [300, 301] for c in captions)


def test_models_without_a_decoder_are_refused():
    clip = towers.build(towers.TowerConfig(model="vit-tiny-64"))
    clip.name = "my-clip"
    with pytest.raises(ConfigError, match="'my-clip' is no captioner: it is a ClipModel"):
        CocaDecoder(clip, Decoding())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("captioner")
    towers.save(towers.build(towers.TowerConfig(custom=COCA)), folder / "model")
    (folder / "vocabulary.json").write_text(str([*VOCABULARY, 269]))  # 269: the full stop
    return str(folder)


def jpeg(shade: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, 90, 200 - shade)).save(data, "JPEG")
    return data.getvalue()


ROWS = [
    {"key": "a", "image": jpeg(10)},
    {"key": "b", "image": None, "error": "no such file: x"},
    {"key": "c", "image": jpeg(190)},
    {"key": "d", "image": b"no picture"},
]


def test_writer_gives_captions_and_reasons_row_by_row(folder):
    work = pickle.loads(pickle.dumps(CocaWriter(folder, "caption", num=3, seed=4, device="cpu")))
    assert (work.reads, work.writes) == (["image"], {"caption": "list<string>"})
    worker = work.load()
    made = worker.make(worker.prepare(ROWS))
    assert [isinstance(m, Failed) for m in made] == [False, True, False, True]
    assert made[1].reason.startswith("picture")
    for i in (0, 2):
        texts = made[i]["caption"]
        assert 1 <= len(texts) == len(set(texts)) <= 3
        assert all(t == plain(t) for t in texts)
        alone = worker.make(worker.prepare([ROWS[i]]))[0]
        assert alone == made[i]
    assert worker.tokens > 0
    assert worker.make(worker.prepare([ROWS[1]])) == [made[1]]


def test_one_caption_is_greedy_and_a_string_and_may_be_cut_at_the_first_stop(folder):
    whole = CocaWriter(folder, "c", device="cpu").load()
    cut = CocaWriter(folder, "c", device="cpu", first_sentence=True).load()
    for worker in (whole, cut):
        worker.decoder.projection[:, worker.decoder.ids.tolist().index(269)] += 0.05  # a liking for full stops
    a, b = (w.make(w.prepare([ROWS[0]]))[0] for w in (whole, cut))
    assert isinstance(a, Failed) or b == Failed("empty caption") or a["c"].split(".")[0].strip() == b["c"]


def test_a_caption_without_a_word_is_a_failure(folder):
    worker = CocaWriter(folder, "c", device="cpu", min_tokens=0).load()
    assert worker._value([[269, 269], []]) == Failed("empty caption")


def test_provenance_names_the_weights_and_everything_that_is_drawn(folder, tmp_path):
    work = CocaWriter(folder, "c", num=2, seed=3)
    first = work.provenance()
    assert first.same_work(CocaWriter(folder, "c", num=2, seed=3).provenance())
    assert not first.same_work(CocaWriter(folder, "c", num=2, seed=4).provenance())
    assert not first.same_work(CocaWriter(folder, "c", num=2, seed=3, first_sentence=True).provenance())
    assert (
        CocaWriter(folder, "c", seed=1).provenance().same_work(CocaWriter(folder, "c", seed=2).provenance())
    )  # greedy
    torch.manual_seed(5)
    towers.save(towers.build(towers.TowerConfig(custom=COCA)), tmp_path / "model")
    assert CocaWriter(str(tmp_path), "c", num=2, seed=3).provenance().model != first.model


def test_options_that_contradict_each_other_are_refused(folder):
    with pytest.raises(ConfigError, match="num=2 captions with temperature=0"):
        CocaWriter(folder, "c", num=2, temperature=0)


@pytest.mark.parametrize(
    ("decoded", "text"),
    [
        ("a boy 's t - shirt , ( red ) isn 't new . ", "a boy's t-shirt, (red) isn't new."),
        ("2 3 . 5 % of 1 0 dogs : yes !", "23.5% of 10 dogs: yes!"),
        ("two   cups ... and a dog", "two cups... and a dog"),
    ],
)
def test_decoded_tokens_become_plain_text(decoded, text):
    assert plain(decoded) == text
    tokenizer = towers.Tokenizer(towers.build(towers.TowerConfig(custom=COCA))).tokenizer
    assert tokenizer.encode(plain(decoded)) == tokenizer.encode(decoded)
