"""Names and prompts: what is read, what is refused; the text classifier against a plain loop and open_clip's."""

import open_clip
import pytest
import torch

from cutline import towers
from cutline.errors import ConfigError, CutlineError
from cutline.towers.config import TowerConfig
from cutline.zeroshot import texts
from cutline.zeroshot.prompts import class_names, prompts, spoken
from cutline.zeroshot.texts import TextClassifier, open_joint, text_classifier


@pytest.fixture(scope="module")
def model() -> towers.Model:
    torch.manual_seed(0)
    return towers.build(TowerConfig(model="vit-tiny-64")).eval()


def test_the_sets_are_those_of_open_clip():
    assert len(prompts("openai")) == 80
    assert prompts("openai")[0] == "a bad photo of a {}."
    assert len(prompts("simple")) == 7
    assert len(class_names("imagenet")) == 1000


def test_names_inline_and_in_a_file_with_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\ufeffa red apple\n\ngrass, lawn\nsky \n", encoding="utf-8")
    assert (
        class_names(str(path))
        == class_names("a red apple; grass, lawn; sky;")
        == [["a red apple"], ["grass", "lawn"], ["sky"]]
    )
    assert class_names("sky") == [["sky"]]
    path.write_text("\ufeffa photo of a {}.\n\na {c}\n", encoding="utf-8")
    assert prompts(str(path)) == ["a photo of a {}.", "a {}"]


def test_two_classes_of_one_name_and_no_class_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="classes 1 and 3 are both called 'Sky'"):
        class_names("sky; tree; Sky")
    (tmp_path / "none.txt").write_text("\ufeff\n \n", encoding="utf-8")
    for nothing in (" ; ", "", [], str(tmp_path / "none.txt")):
        with pytest.raises(ConfigError, match="there is no class"):
            class_names(nothing)
    with pytest.raises(ConfigError, match="there is no prompt"):
        prompts(str(tmp_path / "none.txt"))


def test_a_class_whose_name_is_blank_is_refused_and_no_other_takes_its_place():
    with pytest.raises(ConfigError, match="class 2 of 3 has no name"):
        spoken(["red_apple", "_", "sky"])
    assert spoken(["red_apple", "sky"]) == [["red apple"], ["sky"]]


def test_prompts_without_a_place_for_the_name_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'a photo' must hold \{\}"):
        prompts(["a photo"])
    with pytest.raises(ConfigError, match="no set"):
        prompts(str(tmp_path / "none.txt"))


def test_the_classifier_equals_open_clips(model):
    names, templates = ["cat", "dog", "red panda"], prompts("simple")
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=40)
    theirs = open_clip.build_zero_shot_classifier(model, tokenizer, names, open_clip.SIMPLE_IMAGENET_TEMPLATES)
    ours = text_classifier(model, [[n] for n in names], templates)
    torch.testing.assert_close(ours.weights, theirs.T, atol=1e-5, rtol=0)


def test_the_best_synonym_counts():
    classifier = TextClassifier(torch.eye(3), torch.tensor([0, 1, 1]), ["a", "b"])
    x = torch.tensor([[0.1, 0.3, -0.2], [0.5, -0.6, 0.2]])
    assert classifier(x).tolist() == [[x[0, 0], x[0, 1]], [x[1, 0], x[1, 2]]]


def test_the_second_time_no_text_is_embedded(model, monkeypatch):
    first = text_classifier(model, [["owl"], ["fox"]], ["{}"])
    monkeypatch.setattr(texts, "_embed", lambda *_: pytest.fail("embedded again"))
    assert torch.equal(text_classifier(model, [["owl"], ["fox"]], ["{}"]).weights, first.weights)


def test_other_weights_or_names_are_not_found_in_the_cache(model):
    first = text_classifier(model, [["owl"]], ["{}"])
    torch.manual_seed(1)
    other = towers.build(TowerConfig(model="vit-tiny-64")).eval()
    assert not torch.equal(text_classifier(other, [["owl"]], ["{}"]).weights, first.weights)
    assert not torch.equal(text_classifier(model, [["fox"]], ["{}"]).weights, first.weights)


def test_an_image_tower_alone_knows_no_words():
    with pytest.raises(CutlineError, match="can be transferred"):
        open_joint("scratch:resnet18")
