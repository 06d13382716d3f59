"""Writers and language models of transformers: real classes with tiny random weights, against a bare `generate`."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import hf_made
import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from works_made import fuse_work, write_work

from cutline.captions.clean import clean
from cutline.captions.generator import Ask, Sampling
from cutline.captions.huggingface import HfModel
from cutline.captions.vlm import VlmWriter, source_of
from cutline.captions.work import Failed
from cutline.errors import ConfigError, DataError

SIZES = [(60, 20), (33, 64), (40, 40), (90, 31)]  # width, height
NEW = 8  # tokens
FAMILIES = ["blip", "git", "blip2", "florence2", "paligemma", "llava", "qwen2_vl", "vit_gpt"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's folder, made when it is first asked for."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = getattr(hf_made, family)(tmp_path_factory.mktemp(family))
        return made[family]

    return folder


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


def rows() -> list[dict[str, Any]]:
    """Pictures as PNG, which keeps their pixels."""
    made = []
    for i, picture in enumerate(pictures()):
        picture.save(out := io.BytesIO(), "PNG")
        made.append({"key": f"{i}", "image": out.getvalue()})
    return made


def bare(folder: Path, family: str, picture: Image.Image, prompt: str) -> str:
    """One picture through the model as its documentation shows it."""
    model = hf.AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = hf.AutoProcessor.from_pretrained(folder)
    if family in ("llava", "qwen2_vl"):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
    elif family in ("florence2", "paligemma"):
        inputs = processor(text=prompt, images=picture, return_tensors="pt")
    elif family == "vit_gpt":
        inputs = hf.AutoImageProcessor.from_pretrained(folder)(images=picture, return_tensors="pt")
    else:
        inputs = processor(images=picture, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    if family in ("llava", "qwen2_vl", "paligemma"):  # decoders, which repeat the prompt
        out = out[:, inputs["input_ids"].shape[1] :]
    return str(getattr(processor, "tokenizer", processor).decode(out[0], skip_special_tokens=True))


def write(work: Any, rows: list[dict[str, Any]]) -> list[Any]:
    worker = work.load()
    return list(worker.make(worker.prepare(rows)))


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_of_a_batch_equal_a_bare_generate_of_each_picture(family: str, model: Any) -> None:
    prompt = {
        "florence2": "<CAPTION>",
        "paligemma": "<image>caption en",
        "llava": "describe the image",
        "qwen2_vl": "describe",
    }
    folder, ask = model(family), prompt.get(family, "")
    generator = HfModel(model=str(folder)).load(Sampling(max_new_tokens=NEW), sees=True)
    given = ask if family in ("llava", "qwen2_vl") else ""  # the others know their own
    got = generator.answer(generator.prepare([Ask(str(i), given, p) for i, p in enumerate(pictures())]))
    expected = [bare(folder, family, p, ask) for p in pictures()]
    assert [text for (text,) in got] == expected
    assert len(set(expected)) > 1, "the model sees nothing, so the test shows nothing"
    assert generator.tokens > 0


def test_the_worker_cleans_what_the_model_says(model: Any) -> None:
    folder = model("blip")
    work = write_work(f"hf:{folder}", "caption", sampling={"max_new_tokens": NEW})
    assert work.reads == ["image"]
    assert work.writes == {"caption": "string"}
    expected = [clean(bare(folder, "blip", p, "")) for p in pictures()]
    got = write(pickle.loads(pickle.dumps(work)), rows())
    assert got == [e if isinstance(e, Failed) else {"caption": e} for e in expected]
    assert Failed("repeats itself") in got
    assert sum(isinstance(g, dict) for g in got) == 3


@pytest.mark.parametrize("family", ["blip", "git"])
def test_a_prompt_is_a_beginning_that_is_gone_on_with_and_left_out_of_the_caption(family: str, model: Any) -> None:
    folder = model(family)
    net = hf.AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = hf.AutoProcessor.from_pretrained(folder)
    ids = torch.tensor([[2, *processor.tokenizer("a dog on", add_special_tokens=False).input_ids]])
    if family == "blip":  # whose generate drops the last token, the end mark
        ids = torch.cat([ids, torch.tensor([[3]])], dim=1)
    pixels = processor(images=pictures()[1], return_tensors="pt").pixel_values
    out = net.generate(pixel_values=pixels, input_ids=ids, max_new_tokens=NEW, do_sample=False)
    expected = processor.tokenizer.decode(out[0], skip_special_tokens=True)
    generator = HfModel(model=str(folder)).load(Sampling(max_new_tokens=NEW), sees=True)
    asks = [Ask(str(i), "a dog on", p) for i, p in enumerate(pictures())]
    (got,) = generator.answer(generator.prepare(asks))[1]
    assert "a dog on " + got.strip() == expected


@pytest.mark.parametrize("family", ["blip", "qwen2_vl"])
def test_several_captions_are_drawn_by_the_rows_keys(family: str, model: Any) -> None:
    def drawn(**sampling: Any) -> list[Any]:
        settings = {"num": 3, "max_new_tokens": NEW, **sampling}
        generator = HfModel(model=str(model(family))).load(Sampling(**settings), sees=True)
        return list(generator.answer(generator.prepare([Ask(str(i), "", p) for i, p in enumerate(pictures())])))

    first = drawn()
    assert all(len(texts) == 3 for texts in first)
    assert any(len(set(texts)) == 3 for texts in first)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert drawn() == first, "the same rows give the same captions"
    assert torch.equal(torch.get_rng_state(), before), "and leave the global generator alone"
    assert drawn(seed=1) != first
    work = VlmWriter(source=HfModel(model="x"), column="c", sampling=Sampling(num=3))
    assert work.writes == {"c": "list<string>"}
    assert work.sampling.heat == 1


def test_pictures_that_cannot_be_used_fail_alone(model: Any) -> None:
    some = rows()
    some[1]["image"] = b"\xff\xd8\xffnothing"
    some[2] = {"key": "2", "image": None, "error": "missing: gone.jpg"}
    Image.new("RGB", (4000, 1)).save(out := io.BytesIO(), "PNG")  # no patch fits into it
    some.append({"key": "4", "image": out.getvalue()})
    work = write_work(f"hf:{model('qwen2_vl')}", "caption", sampling={"max_new_tokens": NEW})
    got, alone = write(work, some), write(work, rows())
    assert got[0] == alone[0]
    assert got[3] == alone[3]
    assert got[1] == Failed("picture: not a picture")
    assert got[2].reason.startswith("picture cannot be read")
    assert got[4].reason.startswith("refused by the processor")
    assert write(work, some[1:3])[0] == Failed("picture: not a picture"), "a batch of which nothing is left"


@pytest.mark.parametrize("chat", [True, False])
def test_language_models_fuse_by_chat_template_or_by_completion(chat: bool, tmp_path: Path) -> None:
    folder = hf_made.llama(tmp_path / "llama", chat)
    (tmp_path / "prompt.txt").write_text("one sentence of {alt} and {caption} :")
    work = fuse_work(
        f"hf:{folder}", ["alt", "caption"], "fused", str(tmp_path / "prompt.txt"), sampling={"max_new_tokens": NEW}
    )
    texts = [("red ball", "a dog sits on grass"), ("green car", "a car and a large house under a tree")]
    net, words = hf.AutoModelForCausalLM.from_pretrained(folder).eval(), hf.AutoTokenizer.from_pretrained(folder)
    expected = []
    for alt, caption in texts:
        prompt = f"one sentence of {alt} and {caption} :"
        prompt = f"user: {prompt} assistant:" if chat else prompt
        inputs = words(prompt, return_tensors="pt", return_token_type_ids=False)
        out = net.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        expected.append(clean(words.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)))
    got = write(work, [{"key": str(i), "alt": a, "caption": c} for i, (a, c) in enumerate(texts)])
    assert got == [e if isinstance(e, Failed) else {"fused": e} for e in expected]


def test_a_prompt_longer_than_the_models_context_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("one sentence of {alt} and {caption} :")
    work = fuse_work(
        f"hf:{hf_made.gpt2(tmp_path / 'gpt2', positions=32)}", ["alt", "caption"], "fused", str(tmp_path / "prompt.txt"),
        sampling={"max_new_tokens": NEW},
    )  # fmt: skip
    given = [{"key": str(n), "alt": "dog " * n, "caption": "a cat"} for n in (1, 17, 18, 90)]  # with 7 words more
    got = write(work, given)
    assert got[2:] == [Failed("prompt longer than the model's context")] * 2
    assert Failed("prompt longer than the model's context") not in got[:2]


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_models_that_think_are_told_not_to(
    family: str, tmp_path: Path, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    quiet = "{% if enable_thinking is defined and not enable_thinking %}no {% endif %}"
    thinking = getattr(hf_made, family)(tmp_path / family, template=hf_made.CHAT + quiet)
    source = {"sampling": Sampling(), "sees": family != "llama"}
    assert HfModel(model=str(thinking)).load(**source)._text("a dog").endswith("assistant:no ")
    hf.utils.logging.enable_propagation()  # pytest hears of warnings through the root logger
    assert HfModel(model=str(model(family))).load(**source)._text("a dog").endswith("assistant:")
    hf.utils.logging.disable_propagation()
    assert "Kwargs" not in caplog.text, "which a processor says of words that its template does not know"


def test_a_chat_template_of_the_tokeniser_alone_is_none_of_the_models(model: Any, tmp_path: Path) -> None:
    some = rows()
    folder = hf_made.blip2(tmp_path / "blip2", chat_template=hf_made.CHAT)
    written = [write_work(f"hf:{f}", "c", sampling={"max_new_tokens": NEW}) for f in (folder, model("blip2"))]
    assert write(written[0], some) == write(written[1], some)


def test_a_model_that_sees_can_fuse_too(model: Any) -> None:
    work = fuse_work(f"hf:{model('qwen2_vl')}", ["alt", "cap"], "fused", "veclip", sampling={"max_new_tokens": NEW})
    (got,) = write(work, [{"key": "a", "alt": "red ball", "cap": "a dog sits"}])
    assert isinstance(got, dict) or got.reason == "repeats itself"


def test_provenance_names_the_weights_and_what_has_an_influence(model: Any, tmp_path: Path) -> None:
    one = write_work(f"hf:{model('blip')}", "c").provenance()
    assert one.same_work(write_work(f"hf:{model('blip')}", "c", options={"device": "cpu"}).provenance())
    assert one.inputs == ["image"]
    assert one.sampling == {"num": 1, "temperature": 0.0, "max_new_tokens": 100}
    other = hf_made.blip(tmp_path / "blip")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"changed": 1}))
    assert one.model.split()[0] != write_work(f"hf:{other}", "c").provenance().model.split()[0]
    assert one.model.split()[-1] != write_work(f"hf:{other}", "c").provenance().model.split()[-1]


def test_models_that_cannot_be_used_say_what_to_do(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for spec, words in [
        (f"hf:{tmp_path / 'nowhere'}", "Check the name"),
        (f"hf:{hf_made.llama(tmp_path / 'llama')}", "does not know that it can describe pictures"),
        (f"hf:{_foreign(tmp_path)}", "code of its own"),
        (f"hf:{_torn(tmp_path)}", "does not hold all weights"),
    ]:
        with pytest.raises(DataError, match=words):
            write_work(spec, "c").load()
    with pytest.raises(DataError, match="hf download"):
        write_work("hf:nobody/nothing", "c").provenance()
    with pytest.raises(ConfigError, match="takes pictures alone"):
        write(write_work(f"hf:{model('vit_gpt')}", "c", "a dog"), rows())
    with pytest.raises(ConfigError, match="names no model"):
        source_of("blip")
    with pytest.raises(ConfigError, match="temperature=0"):
        write_work("hf:x", "c", sampling={"num": 2, "temperature": 0})


def _foreign(folder: Path) -> Path:
    """A model that brings its own code."""
    (folder / "foreign").mkdir()
    config = {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Config", "AutoModelForImageTextToText": "mine.Model"},
    }
    (folder / "foreign" / "config.json").write_text(json.dumps(config))
    return folder / "foreign"


def _torn(folder: Path) -> Path:
    """A BLIP without its text decoder."""
    blip = hf_made.blip(folder / "torn")
    net = hf.BlipForConditionalGeneration.from_pretrained(blip)
    net.save_pretrained(blip, state_dict={k: v for k, v in net.state_dict().items() if "text_decoder" not in k})
    return blip
