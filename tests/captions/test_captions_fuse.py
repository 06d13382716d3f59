"""Fusing: prompts and their placeholders, what is asked of a row, and what becomes of the answers."""

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, said
from works_made import fuse_work

from cutline.captions.fuse import PROMPTS, placeholders, read_prompts
from cutline.captions.rules import RulesFuse
from cutline.captions.work import Failed
from cutline.config import check
from cutline.errors import ConfigError, DataError

INPUTS = ["alt", "ours"]


@pytest.fixture
def server() -> Any:
    """Answers with the question itself, in quotes and with a preamble."""
    with ChatServer(lambda asked: said(f'Sure, here is the caption: "{asked.text}"')) as server:
        yield server


def fuse(
    server: ChatServer, prompt: str, rows: list[dict[str, Any]], inputs: list[str] = INPUTS, **sampling: Any
) -> list[Any]:
    work = fuse_work(
        f"openai:{server.url}#m", inputs, "fused", prompt, sampling=sampling, limit=500, options={"retries": 0}
    )
    worker = pickle.loads(pickle.dumps(work)).load()
    made = worker.make(worker.prepare([{"key": f"k{i}"} | row for i, row in enumerate(rows)]))
    return [m if isinstance(m, Failed) else m["fused"] for m in made]


def prompt_file(folder: Path, text: str) -> str:
    (folder / "prompt.txt").write_text(text)
    return str(folder / "prompt.txt")


def test_the_prompts_of_the_package_speak_of_the_two_inputs() -> None:
    for name, parts in zip(PROMPTS, (1, 4, 1), strict=True):
        prompts = read_prompts(name, INPUTS)
        assert len(prompts) == parts
        expected = ["*"] if name == "laclip" else INPUTS
        assert all(placeholders([p]) == expected for p in prompts)
        assert all("{" not in p.replace("{alt}", "").replace("{ours}", "").replace("{*}", "") for p in prompts)


def test_a_prompt_file_is_filled_with_the_columns_it_names(server: ChatServer, tmp_path: Path) -> None:
    prompt = prompt_file(tmp_path, 'Join {ours} + {alt}, as {{"json": 1}}.\n')
    assert fuse(server, prompt, [{"alt": "Rex {ours}", "ours": ["a dog", "a puppy"]}]) == [
        'Join a dog + Rex {ours}, as {"json": 1}.'
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Say something.", r"no placeholders. Write \{alt\} and \{ours\}"), ("", "is empty"),
        ("{alt} and {caption} of {ours}", r"speaks of \{caption\}, and the inputs are alt, ours"),
        ("Rewrite {alt}.", r"never speaks of the input 'ours'"), ("{alt} {ours}\n---\nNothing", "no placeholders"),
    ],
)  # fmt: skip
def test_a_prompt_that_does_not_fit_the_inputs_is_an_error_that_names_what(
    text: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        read_prompts(prompt_file(tmp_path, text), INPUTS)


def test_other_mistakes_are_said_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompt file 'vecilp'.*or take one of veclip, laclip, capsfusion\."):
        read_prompts("vecilp", INPUTS)
    with pytest.raises(ConfigError, match="fuses two texts"):
        read_prompts("veclip", ["alt"])
    with pytest.raises(ConfigError, match="names no model"):
        fuse_work("gpt", INPUTS, "fused")
    with pytest.raises(ConfigError, match="num=2 answers to 1 prompts"):
        fuse_work("hf:x", INPUTS, "fused", "veclip", sampling={"num": 2, "temperature": 0})
    with pytest.raises(ConfigError, match="inputs"):
        check(RulesFuse, {"inputs": ["alt"], "column": "fused"})


def test_rows_where_a_text_is_missing_or_says_nothing_ask_no_model(server: ChatServer) -> None:
    rows = [
        {"alt": None, "ours": "a dog <b>on</b> grass"}, {"alt": "IMG_1234.JPG", "ours": ["a cat"]},
        {"alt": "Rex", "ours": None}, {"alt": "click to enlarge", "ours": None}, {"alt": "", "ours": []},
        {"alt": "photo by Anna", "ours": "photo"},
    ]  # fmt: skip
    nothing = Failed("no text")
    assert fuse(server, "veclip", rows) == ["a dog on grass", "a cat", "Rex", nothing, nothing, nothing]
    assert server.asked == []


@pytest.mark.parametrize("value", [0, b"\xff\xd8", [0.5], [None, 1]])
def test_a_column_that_is_no_text_is_an_error_that_names_it(server: ChatServer, value: Any) -> None:
    with pytest.raises(DataError, match=r"the column 'ours' holds no text, but a (int|bytes|float)\."):
        fuse(server, "veclip", [{"alt": "Rex", "ours": value}])


def test_laclip_rewrites_what_is_there_in_a_style_chosen_by_the_key_or_in_all_four(server: ChatServer) -> None:
    rows = [{"alt": "Rex", "ours": "a dog"}, {"alt": None, "ours": "a cat"}] * 12
    got = fuse(server, "laclip", rows)
    assert got == fuse(server, "laclip", rows), "the style of a row is always the same"
    asked = [a.text for a in server.asked]
    assert sum("Caption: Rex; a dog\nRewritten:" in text for text in asked) == 24
    assert sum("Caption: a cat\nRewritten:" in text for text in asked) == 24
    styles = Counter(text.split("\n")[0] for text in asked)
    assert len(styles) == 4
    server.asked.clear()
    (all_four,) = fuse(server, "laclip", rows[:1], num=4)
    assert len(all_four) == 4
    assert {text.split("\n")[0] for text in (a.text for a in server.asked)} == set(styles)
    assert {a.body["temperature"] for a in server.asked} == {0.0}
    fuse(server, "laclip", rows[:1], num=5)
    assert server.asked[-1].body["temperature"] == 1.0


def test_refused_and_empty_answers_leave_the_row_null_with_the_reason() -> None:
    answers = {"a": "I'm sorry, but I can't help with that.", "b": "", "c": "Output: A dog named Rex on grass."}
    with ChatServer(lambda asked: said(answers[asked.text[-1]])) as server:
        work = fuse_work(f"openai:{server.url}#m", INPUTS, "fused", options={"retries": 0})
        worker = work.model_copy(update={"prompts": ["{alt} {ours}"]}).load()
        made = worker.make(worker.prepare([{"key": k, "alt": "Rex", "ours": f"dog {k}"} for k in "abc"]))
    assert made == [Failed("refused"), Failed("empty"), {"fused": "A dog named Rex on grass."}]


def test_what_has_an_influence_is_noted_and_where_the_server_was_is_not() -> None:
    def provenance(url: str, prompt: str, **sampling: Any) -> Any:
        return fuse_work(f"openai:{url}#m", INPUTS, "fused", prompt, sampling=sampling).provenance()

    one = provenance("http://a/v1", "veclip")
    assert one.same_work(provenance("http://b/v1", "veclip"))
    assert not one.same_work(provenance("http://a/v1", "capsfusion"))
    assert not one.same_work(provenance("http://a/v1", "veclip", max_new_tokens=7))
    assert one.how == "caption fuse"
    assert one.inputs == INPUTS
    assert "{alt}" in one.prompt
    rules = RulesFuse(inputs=INPUTS, column="fused")
    assert (rules.reads, rules.writes, rules.provenance().model) == (INPUTS, {"fused": "string"}, "rules")
