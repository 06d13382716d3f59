"""Classification by the words of captions, against the formula with loops, on one process and on two."""

import json
from pathlib import Path

import pytest
import torch
from objectives_made import same_values_and_gradients
from processes import LEAVE, on_two_processes

from cutline import towers
from cutline.errors import ConfigError
from cutline.objectives.base import Batch, Features, Texts
from cutline.objectives.catlip import Config, Objective

TOWER = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
COCA = TOWER | {
    "vision_cfg": TOWER["vision_cfg"] | {"output_tokens": True}, "custom_text": True, "multimodal_cfg": TOWER["text_cfg"],
    "text_cfg": TOWER["text_cfg"] | {"embed_cls": True, "output_tokens": True},
}  # fmt: skip
WORDS = ["cat", "dog", "car"]  # one token each
TEXTS = ["a dog beside a car", "", "a cat and a cat", "the sky"]
THERE = [[0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0]]


@pytest.fixture
def classes(tmp_path) -> str:
    tokens = towers.Tokenizer(towers.build(towers.TowerConfig(custom=TOWER)))(WORDS)[:, 1].tolist()
    (tmp_path / "classes.json").write_text(json.dumps(tokens))
    return str(tmp_path / "classes.json")


def made(custom, classes, **options):
    torch.manual_seed(0)
    model = towers.build(towers.TowerConfig(custom=custom)).double()
    order = torch.tensor(json.loads(Path(classes).read_text())).argsort()  # classes go by their ids
    return model, Objective(Config(classes=classes, **options), model).double(), order


def plain(logits, there, positive):
    """The docstring's formula, picture by picture and class by class."""
    total = 0.0
    for row, labels in zip(logits, there, strict=True):
        for z, label in zip(row, labels, strict=True):
            p = 1 / (1 + (-z).exp())
            total = total - (positive * p.log() if label else (1 - p).log())
    return total / len(there)


@pytest.mark.parametrize("custom", [TOWER, COCA], ids=["pooled", "tokens"])
def test_loss_equals_the_formula(custom, classes):
    model, objective, order = made(custom, classes, positive=3.0)
    pictures = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    batch = Batch({"image": pictures}, {"text": Texts(towers.Tokenizer(model)(TEXTS), torch.arange(4))})

    def expected():
        if custom is TOWER:
            embedding = model.encode_image(pictures, normalize=True)
            logits = objective.head(embedding * embedding.shape[1] ** 0.5)
        else:
            logits = objective.head(model.image_and_tokens(pictures)[1]).amax(1)
        return plain(logits[:, order.argsort()], THERE, 3.0)

    ours = lambda: objective(batch, Features(model, batch))["classes"]  # noqa: E731
    named = same_values_and_gradients(model, objective, [ours, expected], rtol=1e-9, atol=1e-12)
    assert {"head.weight", "head.bias", "conv1.weight"} <= named


def test_the_first_column_with_a_text_is_the_one_that_counts(classes):
    _, objective, order = made(TOWER, classes, texts=["caption", "alt"])
    assert not objective.needs_text
    assert objective.columns() == ["caption", "alt"]
    columns = {"caption": [["a dog", "a car"], None, "a cat", []], "alt": ["a cat", "my dog", "a dog", None]}
    labels = objective.labels(Batch({}, {}, columns), 4)
    assert labels.int().tolist() == torch.tensor([[0, 1, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]])[:, order].tolist()


def test_classes_may_be_words_of_which_every_token_is_one(classes):
    _, from_file, _ = made(TOWER, classes)
    model = towers.build(towers.TowerConfig(custom=TOWER))
    objective = Objective(Config(classes=["car", "cat", "dog", "hot dog"]), model)
    hot = towers.Tokenizer(model)(["hot"])[0, 1].item()
    assert set(objective.place.lt(4).nonzero().flatten().tolist()) == {
        *from_file.place.lt(3).nonzero().flatten().tolist(), hot,
    }  # fmt: skip
    assert objective.head.out_features == 4
    for none in ([], [""]):
        with pytest.raises(ConfigError, match="has no word in it"):
            Objective(Config(classes=none), model)


TWO = """
import json, sys, torch, torch.distributed as dist
sys.path[:0] = sys.argv[3:]
from test_catlip import COCA, TEXTS, made
from cutline import towers
from cutline.objectives.base import Batch, Features, Texts
dist.init_process_group("gloo")
rank = dist.get_rank()
model, objective, _ = made(COCA, sys.argv[1], positive=3.0)
pictures = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
mine = slice(2 * rank, 2 * rank + 2)
batch = Batch({"image": pictures[mine]}, {"text": Texts(towers.Tokenizer(model)(TEXTS[mine]), torch.arange(2))})
loss = objective(batch, Features(model, batch))["classes"]
loss.backward()
grads = torch.cat([p.grad.flatten() for p in [*objective.parameters(), *model.visual.parameters()] if p.grad is not None])
both = torch.cat([loss.detach()[None], grads])
dist.all_reduce(both)
torch.save(both / 2, sys.argv[2])
""" + LEAVE + "leave()\n"  # fmt: skip


def test_two_processes_equal_one_on_the_joined_batch(classes, tmp_path):

    here = Path(__file__).parent
    on_two_processes(TWO, classes, str(tmp_path / "two.pt"), str(here), str(here.parent), folder=tmp_path)
    model, objective, _ = made(COCA, classes, positive=3.0)
    pictures = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    batch = Batch({"image": pictures}, {"text": Texts(towers.Tokenizer(model)(TEXTS), torch.arange(4))})
    loss = objective(batch, Features(model, batch))["classes"]
    loss.backward()
    used = [*objective.parameters(), *model.visual.parameters()]
    grads = torch.cat([p.grad.flatten() for p in used if p.grad is not None])
    torch.testing.assert_close(torch.load(tmp_path / "two.pt"), torch.cat([loss.detach()[None], grads]))
