"""Zero-shot classification against a plain loop with open_clip; kinds of data; what is refused."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from pairs_made import write_tar
from PIL import Image
from words_made import NAMES

from cutline import towers
from cutline.cli_output import folder_for
from cutline.errors import ConfigError, CutlineError, DataError
from cutline.pairs import create_from_rows
from cutline.record import Result, fingerprint
from cutline.scenes import Scenes, parse_spec
from cutline.zeroshot.classify import ClassifyConfig, classify
from cutline.zeroshot.retrieve import RetrieveConfig, retrieve


def encoded(seed: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(buffer, form)
    return buffer.getvalue()


def plain(model, root: Path) -> dict[str, float]:
    """Top-1, top-5 and the mean of classes by open_clip's own classifier, transform and one picture at a time."""
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=24)
    weights = open_clip.build_zero_shot_classifier(model, tokenizer, NAMES, open_clip.SIMPLE_IMAGENET_TEMPLATES)
    transform = open_clip.image_transform(model.visual.image_size, is_train=False)
    hits = []
    for path in sorted((root / "test").rglob("*.png")):
        with torch.no_grad():
            x = model.encode_image(transform(Image.open(path))[None], normalize=True)[0]
        ranked = [NAMES[i] for i in (x @ weights).argsort(descending=True)]
        hits.append((path.parent.name, ranked.index(path.parent.name)))
    return {
        "top1": np.mean([r == 0 for _, r in hits]),
        "top5": np.mean([r < 5 for _, r in hits]),
        "mean_class": np.mean([np.mean([r == 0 for n, r in hits if n == name]) for name in NAMES]),
    }


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_saved_model_scores_as_a_plain_loop_with_open_clip(kind, model_of, pictures, tmp_path):
    folder = towers.save(model_of(kind), tmp_path / "saved")
    config = ClassifyConfig(prompts="simple", batch=5, device="cpu")
    result = classify(str(folder), f"imagefolder:{pictures}", config, tmp_path / "out")
    expected = plain(model_of(kind), pictures)
    assert {k: result.metrics[k] for k in expected} == pytest.approx(expected)
    assert (result.metrics["pictures"], result.metrics["chance_top5"]) == (21, 5 / 7)
    assert Result.read(tmp_path / "out") == result
    assert (tmp_path / "out/samples.png").stat().st_size > 1000
    found = retrieve(str(folder), "scenes:n=6,size=48", RetrieveConfig(max_texts=2), out=tmp_path / "pairs")
    assert found.metrics["texts"] == 12
    assert (tmp_path / "pairs/samples.png").stat().st_size > 1000


def test_names_and_prompts_are_in_the_protocol_and_batches_are_not(model, pictures):
    spec = f"imagefolder:{pictures}"
    columns = [
        classify(model, spec, ClassifyConfig(**given)).protocol.column()
        for given in ({}, {"batch": 2}, {"prompts": "photo"}, {"names": [*NAMES[1:], "car"]}, {"pictures": 20})
    ]
    assert columns[0] == columns[1]
    assert len(set(columns)) == 4


def test_clip_benchmarks_layout_brings_its_names_and_prompts(model, tmp_path):
    (tmp_path / "test").mkdir()
    forms = {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}
    members = [m for i, (ext, form) in enumerate(forms.items())
               for m in ((f"s{i:07d}.{ext}", encoded(i, form)), (f"s{i:07d}.cls", str(i).encode()))]  # fmt: skip
    write_tar(tmp_path / "test/0.tar", members)
    (tmp_path / "test/nshards.txt").write_text("1")
    (tmp_path / "classnames.txt").write_text("\ufeffa bird, say\ncat\ndog\n", encoding="utf-8")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\n{c}\n")
    spec = f"webdataset:{tmp_path}"
    settings = classify(model, spec, ClassifyConfig()).protocol.settings
    assert settings["prompts_hash"] == fingerprint(["a photo of {}.", "{}"])
    assert settings["names_hash"] == fingerprint([["a bird, say"], ["cat"], ["dog"]])
    assert classify(model, spec, ClassifyConfig(prompts="name")).protocol.settings["prompts"] == 1
    with pytest.raises(ConfigError, match="names has 2 classes and .* has 3 .a bird, say, cat, dog."):
        classify(model, spec, ClassifyConfig(names="cat; dog"))
    (tmp_path / "classnames.txt").write_text("cat\ndog\nCat\n")
    with pytest.raises(ConfigError, match="classes 1 and 3 are both called 'Cat'.*names=FILE"):
        classify(model, spec, ClassifyConfig())
    assert classify(model, spec, ClassifyConfig(names="cat; dog, hound; owl")).per_class["accuracy"].keys() == {
        "cat", "dog", "owl",
    }  # fmt: skip
    (tmp_path / "classnames.txt").write_text("cat\n\ndog\n")
    with pytest.raises(DataError, match=r"classnames.txt is blank in line 2"):
        classify(model, spec, ClassifyConfig())


def test_imagenets_own_names_may_be_alike(model, tmp_path):
    (tmp_path / "test").mkdir()
    write_tar(tmp_path / "test/0.tar", [("a.png", encoded(0)), ("a.cls", b"999")])
    (tmp_path / "classnames.txt").write_text("\n".join(open_clip.IMAGENET_CLASSNAMES) + "\n")
    assert classify(model, f"webdataset:{tmp_path}", ClassifyConfig(prompts="name")).metrics["classes"] == 1000


def test_all_rows_of_a_table_or_those_of_its_test(model, tmp_path):
    rows = [{"key": f"k{i}", "image": encoded(i), "alt": "x", "what": "cat" if i % 2 else "dog",
             "part": "test" if i < 4 else "train"} for i in range(10)]  # fmt: skip
    create_from_rows(tmp_path / "t.lance", rows)
    whole = classify(model, f"pairs:{tmp_path}/t.lance,label=what", ClassifyConfig())
    assert (whole.metrics["pictures"], whole.protocol.split) == (10, "all")
    part = classify(model, f"pairs:{tmp_path}/t.lance,label=what,split=part", ClassifyConfig())
    assert (part.metrics["pictures"], part.protocol.split) == (4, "test")
    with pytest.raises(DataError, match="leave val= out"):
        classify(model, f"pairs:{tmp_path}/t.lance,label=what,val=0.5", ClassifyConfig())


def test_folders_of_classes_without_parts_and_scenes_without_train(model, pictures):
    result = classify(model, f"imagefolder:{pictures}/test", ClassifyConfig(prompts="name"))
    assert (result.metrics["pictures"], result.protocol.split) == (21, "all")
    scenes = classify(model, "scenes:n=1,size=48,objects=24", ClassifyConfig(prompts="name", pictures=3, split="val"))
    assert (scenes.metrics["classes"], scenes.metrics["pictures"]) == (24, 3)
    (pictures / "nothing").mkdir()
    with pytest.raises(DataError, match="has no picture with a class"):
        classify(model, f"imagefolder:{pictures}/nothing", ClassifyConfig())
    with pytest.raises(DataError, match="no split 'train'; it has val, test"):
        classify(model, "scenes:size=48,objects=24", ClassifyConfig(split="train"))


def test_bad_pictures_are_counted_and_named_and_too_many_stop(model, pictures, capsys):
    (pictures / "test/sky/1.png").write_bytes(b"")
    (pictures / "test/sand/2.png").write_bytes((pictures / "test/sand/1.png").read_bytes()[:60])
    result = classify(model, f"imagefolder:{pictures}", ClassifyConfig(prompts="name"))
    assert (result.metrics["pictures"], result.metrics["skipped: picture broken"]) == (19, 2)
    assert "sky/1.png" in capsys.readouterr().err
    (pictures / "test/wine/0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="3 of 21 pictures skipped[\\s\\S]*More than 10%"):
        classify(model, f"imagefolder:{pictures}", ClassifyConfig(prompts="name"))


def test_a_picture_smaller_than_a_patch(model, pictures):
    Image.new("RGB", (2, 3), "red").save(pictures / "test/wine/0.png")
    assert classify(model, f"imagefolder:{pictures}", ClassifyConfig(prompts="name")).metrics["pictures"] == 21


def test_an_image_tower_alone_is_told_what_it_can_do():
    with pytest.raises(CutlineError, match="no words. It can be transferred"):
        classify("scratch:resnet18", "scenes:size=48", ClassifyConfig())
    with pytest.raises(CutlineError, match="no words. It can be transferred"):
        retrieve("scratch:resnet18", Scenes(parse_spec("scenes:n=4")), RetrieveConfig())


def test_prompts_cut_at_the_context_are_counted(model, pictures):
    result = classify(model, f"imagefolder:{pictures}", ClassifyConfig(prompts=["{} " + "and so on " * 9]))
    assert result.metrics["truncated"] == 7


def test_the_command_scores_data_and_names_one_picture(here, model, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    towers.save(model, "run/model")
    done = here("zeroshot", "classify", "--model", "run", "--data", f"imagefolder:{pictures}", "prompts=name")
    assert done.returncode == 0, done.stderr
    folder = folder_for("run", "zeroshot-classify", f"imagefolder:{pictures}", ["prompts=name"])
    assert f"Written: {folder}" in done.stdout
    shutil.copy(pictures / "test/sky/0.png", "photo.png")
    command = ["zeroshot", "classify", "--model", "run", "--picture", "photo.png"]
    done = here(*command, "--classes", "a red apple; grass, lawn; sky", "--out", "seen")
    assert done.returncode == 0, done.stderr
    shares = json.loads(Path("seen/photo.json").read_text())
    assert sum(shares.values()) == pytest.approx(1)
    assert set(shares) == {"a red apple", "grass", "sky"}
    assert Path("seen/photo.png").stat().st_size > 1000
    for wrong, message in (([], "--classes"), (["--classes", "a; b", "names=a"], "names is of --data"),
                           (["--classes", " ; "], "there is no class"), (["--classes", "a; A"], "both called 'A'"),
                           (["--classes", "a, b"], "is one class"),
                           (["--classes", "a; b", "prompts=[a photo]"], "must hold {} once")):  # fmt: skip
        done = here(*command, *wrong)
        assert (done.returncode, message in done.stderr) == (1, True), done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-16-SigLIP"])
def test_architectures_with_real_weights_load_and_run(name, pictures, tmp_path):
    torch.manual_seed(0)
    cfg = open_clip.get_model_config(name)
    if cfg["text_cfg"].pop("hf_tokenizer_name", None):  # whose files are not here
        cfg["text_cfg"].pop("tokenizer_kwargs", None)
        cfg["text_cfg"]["vocab_size"] = 49408
    folder = towers.save(towers.build(towers.TowerConfig(custom=cfg)), tmp_path / "saved")
    result = classify(str(folder), f"imagefolder:{pictures}", ClassifyConfig(prompts="photo"))
    assert result.metrics["pictures"] == 21
    assert retrieve(str(folder), "scenes:n=4,size=48", RetrieveConfig(max_texts=1)).metrics["texts"] == 4
