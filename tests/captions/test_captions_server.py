"""Writers and fusers by a server, against a real HTTP server that misbehaves."""

import contextlib
import io
import os
import pickle
import random
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import hf_made
import pytest
from chat_server import Asked, ChatServer, Reply, failed, hang, refuses, said
from PIL import Image
from works_made import fuse_work, write_work

from cutline.captions.engine import RunConfig, run
from cutline.captions.server import Server
from cutline.captions.vlm import VlmWriter, source_of
from cutline.captions.work import Failed
from cutline.config import check
from cutline.errors import ConfigError, DataError
from cutline.pairs import Pairs

QUICK = {"timeout": 5.0, "retries": 0}


def jpeg(width: int, height: int = 12, **options: Any) -> bytes:
    Image.new("RGB", (width, height), (width, 90, 200)).save(out := io.BytesIO(), "JPEG", **options)
    return out.getvalue()


def rows(n: int) -> list[dict[str, Any]]:
    """Each picture is as many pixels wide, above 16, as its number."""
    return [{"key": f"k{i}", "image": jpeg(16 + i)} for i in range(n)]


def wide(asked: Asked) -> int:
    return asked.picture.width - 16


def name(i: int) -> str:
    return f"a picture of number {i}"


def writer(server: ChatServer, options: dict[str, Any] | None = None, **sampling: Any) -> VlmWriter:
    return write_work(f"openai:{server.url}#tiny", "caption", sampling=sampling, options=QUICK | (options or {}))


def write(work: Any, rows: list[dict[str, Any]]) -> list[Any]:
    worker = work.load()
    return list(worker.make(worker.prepare(rows)))


def test_answers_in_any_order_belong_to_their_rows_and_requests_are_bounded() -> None:
    def reply(asked: Asked) -> Reply:
        time.sleep(random.random() * 0.05)
        return said(name(wide(asked)))

    given = rows(40)
    with ChatServer(reply) as server:
        worker = writer(server, {"concurrency": 8}).load()
        first, second = worker.prepare(given[:20]), worker.prepare(given[20:])
        got = [*worker.make(first), *worker.make(second)]
    assert got == [{"caption": name(i)} for i in range(40)]
    assert 2 < server.most <= 8
    assert worker.tokens == 40 * 7
    body = server.asked[0].body
    assert {k: body[k] for k in ("model", "temperature", "max_tokens")} == {
        "model": "tiny",
        "temperature": 0.0,
        "max_tokens": 100,
    }
    assert sorted(a.jpeg for a in server.asked) == sorted(r["image"] for r in given), "sent as they are stored"


def test_busy_and_failing_servers_are_tried_again() -> None:
    def reply(asked: Asked) -> Reply:
        if asked.nth > 1:
            return said(name(wide(asked)))
        return [failed(429, retry_after="0.2"), failed(500), failed(503), (0, {}, b"")][wide(asked) % 4]

    with ChatServer(reply) as server:
        begun = time.monotonic()
        assert write(writer(server, {"retries": 2}), rows(8)) == [{"caption": name(i)} for i in range(8)]
    assert len(server.asked) == 16
    assert 0.2 < time.monotonic() - begun < 5


def test_what_goes_wrong_with_one_row_is_that_rows_reason_alone() -> None:
    def wrong_row(asked: Asked) -> Reply:
        status, _, body = said("of another")
        return status, {"X-Request-Id": "cutline-0123456789abcdef"}, body

    cases: list[tuple[Any, Any]] = [
        (said("Sure, here is a caption: a dog"), {"caption": "a dog"}),
        (failed(400, "image 17 is 3 pixels too small"), Failed("server: HTTP 400: image # is # pixels too small")),
        (failed(500), Failed("server: HTTP 500", again=True)),
        (failed(429), Failed("server: HTTP 429", again=True)),
        (hang, Failed("server: timeout", again=True)),
        ((200, {}, b'{"choices": [{"mess'), Failed("server: broken answer (JSONDecodeError)", again=True)),
        (
            (200, {"Content-Type": "text/html"}, b"<html>busy"),
            Failed("server: broken answer (JSONDecodeError)", again=True),
        ),
        ((200, {}, b'["a", "list"]'), Failed("server: broken answer (AttributeError)", again=True)),
        (said("x", choices=[]), Failed("server: no choices", again=True)),
        (said("x", choices=[{"index": 0}]), Failed("server: broken answer (KeyError)", again=True)),
        (said(None), Failed("empty")),
        (said("I'm sorry, I can't help with that."), Failed("refused")),
        (said(None, choices=[{"message": {"content": None, "refusal": "No."}}]), Failed("refused")),
        (
            said(None, choices=[{"finish_reason": "length", "message": {"content": None, "reasoning": "Hm, a"}}]),
            Failed("no answer within max_new_tokens"),
        ),
        (said(None, choices=[{"finish_reason": "length", "message": {"content": "a dog"}}]), {"caption": "a dog"}),
        (failed(403, "blocked by policy 7"), Failed("server: HTTP 403: blocked by policy #")),
        (failed(404, "no such picture"), Failed("server: HTTP 404: no such picture")),
        ((400, {}, b'{"error": {"message": "bad \\ud800 char"}}'), Failed("server: HTTP 400: bad ? char")),
        (said("dog " * 70), Failed("repeats itself")),
        (said("A dog on grass. " + " ".join(map(str, range(2300)))), {"caption": "A dog on grass."}),
        ((0, {}, b""), Failed("server: no connection (RemoteProtocolError)", again=True)),
        (wrong_row, Failed("server: the answer to another row", again=True)),
        (said("a cat", id="chatcmpl-cutline-0123"), Failed("server: the answer to another row", again=True)),
        (lambda a: said("a cat", id="chatcmpl-" + a.headers["X-Request-Id"]), {"caption": "a cat"}),
    ]

    def reply(asked: Asked) -> Reply:
        case = cases[wide(asked)][0]
        return case(asked) if callable(case) else case

    given = [*rows(len(cases)), {"key": "bad", "image": b"no picture"}]
    with ChatServer(reply) as server:
        got = write(writer(server, {"timeout": 0.7}), given)
    assert got == [*(expected for _, expected in cases), Failed("picture: not a picture")]
    assert len(server.asked) == len(cases)


def test_a_server_that_is_away_or_refuses_all_stops_the_run() -> None:
    with ChatServer(lambda asked: said("a dog")) as server:
        work = writer(server)
        assert write(work, rows(1)) == [{"caption": "a dog"}]
    with pytest.raises(DataError, match=r"does not answer .*run the same command again"):
        write(work, rows(3))
    for status, words in [(401, "OPENAI_API_KEY"), (403, "HTTP 403: no"), (404, "the model 'tiny'")]:
        with ChatServer(lambda asked, status=status: failed(status)) as server, pytest.raises(DataError, match=words):
            write(writer(server), rows(2))


def test_an_answer_lost_to_a_busy_server_is_asked_for_again_and_equal_answers_are_one() -> None:
    def reply(asked: Asked) -> Reply:
        with_seeds.setdefault(wide(asked), set()).add(asked.body["seed"])
        return failed(503) if wide(asked) == 1 and len(with_seeds[1]) > 1 else said("a dog")

    with_seeds: dict[int, set[int]] = {}
    with ChatServer(reply) as server:
        got = write(writer(server, {"concurrency": 1}, num=3), rows(2))
    assert got == [{"caption": ["a dog"]}, Failed("server: HTTP 503", again=True)]
    assert len(with_seeds[0]) == 3


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    ("names", "num", "left"),
    [
        (["max_tokens"], 1, {"temperature", "max_completion_tokens"}),
        (["temperature", "max_tokens", "top_p"], 2, {"seed", "max_completion_tokens"}),
    ],
)
def test_options_that_a_model_refuses_are_left_out(names: list[str], num: int, left: set[str]) -> None:
    with ChatServer(refuses(names, "a dog")) as server:
        worker = writer(server, num=num).load()
        with pytest.warns(UserWarning, match="does not take") if num > 1 else contextlib.nullcontext():
            made = worker.make(worker.prepare(rows(8)))
        assert made == [{"caption": "a dog" if num == 1 else ["a dog"]}] * 8
        before = len(server.asked)
        worker.make(worker.prepare(rows(8)))
    assert len(server.asked) - before == 8 * num, "it is remembered"
    body = server.asked[-1].body
    assert body.keys() - {"model", "messages"} == left
    assert body["max_completion_tokens"] == 100


def test_more_of_the_requests_body_is_sent_and_noted() -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    with ChatServer(lambda asked: said("a dog")) as server:
        one, other = writer(server, {"extra": extra}), writer(server)
        write(one, rows(1))
        fuser = fuse_work(f"openai:{server.url}#tiny", ["a", "b"], "c", options={"extra": extra})
    assert server.asked[0].body["chat_template_kwargs"] == {"enable_thinking": False}
    assert not one.provenance().same_work(other.provenance())
    assert fuser.provenance().settings["extra"] == extra
    assert "extra" not in other.provenance().settings


def test_a_run_goes_on_where_a_server_died_and_asks_for_nothing_twice(table: Pairs) -> None:
    died = []

    def reply(asked: Asked) -> Reply:
        if len(server.asked) > 50:
            died.append(asked)
            return 0, {}, b""
        return said(f"caption of {len(asked.jpeg)} bytes")

    config = RunConfig(batch=16)
    with ChatServer(reply) as server, pytest.raises(DataError, match="does not answer"):
        run(table, writer(server, {"concurrency": 4}), "caption", config, show=False)
    with ChatServer(lambda asked: said(f"caption of {len(asked.jpeg)} bytes")) as other:  # at another port
        done, report = run(table, writer(other), "caption", config, show=False)
    assert report.rows == 120
    assert len(other.asked) == 120 - 50, "the rest, and the broken ones again"
    read = done.read(range(120), ["image", "caption"])
    assert [r["caption"] for r in read] == [f"caption of {len(r['image'])} bytes" for r in read]


def test_several_captions_are_several_requests_with_seeds_of_their_own() -> None:
    with ChatServer(lambda asked: said(f"caption {asked.body['seed']}")) as server:
        work = writer(server, num=3)
        assert work.writes == {"caption": "list<string>"}
        one, other = write(work, rows(2)), write(work, rows(2))
        assert one == other
        assert len({c for row in one for c in row["caption"]}) == 6
        assert server.asked[0].body["top_p"] == 0.9
        assert write(writer(server, num=3, seed=1), rows(2)) != one


def test_pictures_are_sent_upright_as_jpeg_and_no_larger_than_asked() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("L", (30, 10)).save(png := io.BytesIO(), "PNG")
    given = [
        {"key": "a", "image": jpeg(200, 100)},
        {"key": "b", "image": jpeg(60, 20, exif=exif)},
        {"key": "c", "image": png.getvalue()},
    ]
    with ChatServer(lambda asked: said("a dog")) as server:
        write(writer(server, {"max_side": 100, "concurrency": 1}), given)
    assert [(a.picture.size, a.picture.mode) for a in server.asked] == [
        ((100, 50), "RGB"),
        ((20, 60), "RGB"),
        ((30, 10), "RGB"),
    ]
    assert writer(server, {"max_side": 100}).provenance().settings["max_side"] == 100


def test_a_picture_too_long_for_jpeg_is_sent_as_png_and_one_that_cannot_be_sent_fails_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = [Image.new("RGB", (1, side)) for side in (70_000, 20)]
    for i, picture in enumerate(made):
        picture.save(out := io.BytesIO(), "PNG")
        made[i] = {"key": f"{i}", "image": out.getvalue()}
    with ChatServer(lambda asked: said("a dog")) as server:
        assert write(writer(server), made) == [{"caption": "a dog"}] * 2
        assert {a.picture.format: a.picture.size for a in server.asked} == {"PNG": (1, 70_000), "JPEG": (1, 20)}
        monkeypatch.setattr("cutline.captions.server.MAX_JPEG", 100_000)
        lost, good = write(writer(server), made)
        assert lost.reason.startswith("picture: cannot be sent (")
        assert good == {"caption": "a dog"}


def test_the_key_is_taken_from_the_environment_and_noted_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with ChatServer(lambda asked: said("a dog")) as server:
        work = write_work(f"openai:{server.url.replace('//', '//user:sk-secret@')}#tiny", "c", options=QUICK)
        write(work, rows(1))
    assert "sk-secret" in server.asked[0].headers["Authorization"] or server.asked[0].headers[
        "Authorization"
    ].startswith("Basic")
    assert "secret" not in work.provenance().model_dump_json()
    with pytest.raises(DataError) as error:
        write(work, rows(1))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("key", ["sk-a\nb", "ключ"])
def test_a_key_that_no_header_takes_is_an_error_that_does_not_show_it(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    for work in (write_work("openai:http://localhost:1/v1#m", "c"), write_work("openai:http://localhost:1/v1", "c")):
        with pytest.raises(ConfigError, match="Copy the key again") as error:
            work.load()
        assert key not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", " sk-good\n")
    with ChatServer(lambda asked: said("a dog")) as server:
        write(writer(server), rows(1))
    assert server.asked[0].headers["Authorization"] == "Bearer sk-good"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://", "no host"), ("http://exa mple/v1", "space"), ("http://[::1/v1", "IPv6"), ("http://a:0/v1", "no host"),
        ("http://me:secret@localhost:99999/v1", "Port out of range"), ("http://localhost:x/v1", "Port"), ("ftp://x", "url"),
    ],
)  # fmt: skip
def test_a_url_of_no_server_is_said_before_anything_runs(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        source_of(f"openai:{url}#m")
    assert "secret" not in str(error.value)
    assert check(Server, {"url": "http://me:p@[::1]:8000/v1"}).model == ""


def test_a_server_is_asked_for_its_model_if_none_is_named() -> None:
    def models(*names: str) -> ChatServer:
        return ChatServer(lambda asked: said("a dog"), names)

    with models("only/one") as server:
        work = write_work(f"openai:{server.url}", "c")
        assert work.provenance().model == "openai:only/one"
        work = pickle.loads(pickle.dumps(work))
        write(work, rows(1))
        assert server.asked[0].body["model"] == "only/one"
    assert work.provenance().model == "openai:only/one", "asked once, also for the processes of a cluster"
    begun = time.monotonic()
    with pytest.raises(DataError, match="does not say which models"):
        write_work(f"openai:{server.url}", "c", options=QUICK).provenance()
    assert time.monotonic() - begun < 3, "with the retries of the overrides"
    with models("b", "a") as server, pytest.raises(ConfigError, match=r"has 2 models: a, b\. Say which"):
        source_of(f"openai:{server.url}").name()
    with pytest.raises(ConfigError, match="url"):
        source_of("openai:localhost:8000#x")


def test_a_fuser_asks_with_texts_alone() -> None:
    with ChatServer(lambda asked: said(asked.text.upper())) as server:
        work = fuse_work(f"openai:{server.url}#tiny", ["alt", "ours"], "fused", "capsfusion", options=QUICK)
        (got,) = write(work, [{"key": "a", "alt": "Rex", "ours": "a dog on grass"}])
    assert "Raw text: Rex\nSynthetic caption: a dog on grass\n" in server.asked[0].text
    assert isinstance(got, dict)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "llama"])
def test_transformers_serve_says_what_the_same_model_says_here(family: str, tmp_path: Path) -> None:
    for package in ("fastapi", "uvicorn", "accelerate"):
        pytest.importorskip(package, reason=f"transformers serve needs {package}")
    folder, sampling = getattr(hf_made, family)(tmp_path / family), {"max_new_tokens": 8}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}/v1"
    command = [Path(sys.executable).with_name("transformers"), "serve", folder, "--port", url[17:-3], "--device", "cpu"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log, env=env) as server:
        try:
            _wait(f"{url}/models", seconds=120)
            works: list[Any] = []
            for spec in (f"openai:{url}", f"hf:{folder}"):
                if family == "llava":
                    works.append(write_work(spec, "c", "describe", sampling=sampling))
                else:
                    works.append(fuse_work(spec, ["a", "b"], "c", "veclip", sampling=sampling))
            given = [row | {"a": "red ball", "b": f"a dog and cat {row['key']}"} for row in rows(6)]
            for row in given:  # which must differ for a model with random weights
                row["image"] = random.Random(row["key"]).randbytes(24 * 24 * 3)
                Image.frombytes("RGB", (24, 24), row["image"]).save(out := io.BytesIO(), "JPEG")
                row["image"] = out.getvalue()
            served, local = (write(work, given) for work in works)
            assert served == local
            assert any(isinstance(made, dict) for made in served)
        finally:
            server.terminate()


def _wait(url: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1):
            return
        time.sleep(0.2)
