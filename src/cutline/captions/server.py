"""Generation by a server with OpenAI's protocol: vLLM, SGLang, Ollama, `transformers serve`, or OpenAI's own.

Many requests are in flight at once, up to a bound, and while one batch is waited for the next one's are sent already.
`openai`'s client tries again, with back-off and jitter, or when the server says (Retry-After), after 408, 409, 429, 5xx,
timeouts and broken connections. What fails all the same fails for its row alone; when no request of a batch reaches the
server, or the server refuses us altogether (key, model), the run stops.

An answer belongs to the request whose connection it came on, never to its place in time. Each request also bears an
X-Request-Id of its row; a server (or a proxy before it) that gives back the id of another row is not believed.
"""

import asyncio
import base64
import io
import json
import os
import re
import threading
import weakref
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

from PIL import Image
from pydantic import Field

from cutline import record
from cutline.captions.generator import Ask, Sampling, brief
from cutline.captions.work import Failed
from cutline.config import Config
from cutline.errors import ConfigError, DataError
from cutline.pairs.headers import jpeg_orientation, kind_of

ID = "cutline-"  # how our request ids begin
QUALITY = 90  # of JPEGs that are made here

T = TypeVar("T")


class Server(Config):
    """A server. url: its base, such as http://localhost:8000/v1; model: by the server's name of it.

    concurrency: requests in flight; timeout: seconds for one try; retries: further tries; max_side: pixels, to which the
    longer side of larger pictures is reduced (None: sent as they are). The key is OPENAI_API_KEY of the environment.
    """

    kind: Literal["openai"] = "openai"
    url: str = Field(pattern=r"^https?://")
    model: str = ""
    concurrency: int = Field(16, ge=1)
    timeout: float = Field(60.0, gt=0)
    retries: int = Field(4, ge=0)
    max_side: int | None = Field(None, ge=16)

    def name(self) -> str:
        """Without the URL: a server may move while a run goes on, and a URL may hold secrets."""
        return f"openai:{self.model}"

    def noted(self) -> dict[str, Any]:
        return {"max_side": self.max_side}

    def load(self, sampling: Sampling, sees: bool) -> "ServerGenerator":
        return ServerGenerator(self, sampling)

    def resolved(self) -> "Server":
        """With a model: the only one that the server has, if none is named. Raises `DataError` or `ConfigError`."""
        if self.model:
            return self
        import openai

        try:
            client = openai.OpenAI(base_url=self.url, api_key=_key(), timeout=self.timeout, max_retries=self.retries)
            names = sorted(str(m.id) for m in client.models.list())
        except Exception as e:  # openai's errors, broken JSON, a page of HTML
            raise DataError(
                f"the server at {_shown(self.url)} does not say which models it has ({type(e).__name__}). Check the URL "
                "(it mostly ends in /v1) and that the server runs, or name the model: openai:URL#MODEL."
            ) from e
        if len(names) != 1:
            have = f"has {len(names)} models: {', '.join(names[:20])}" if names else "lists no model"
            raise ConfigError(f"the server at {_shown(self.url)} {have}. Say which: openai:{_shown(self.url)}#MODEL.")
        return self.model_copy(update={"model": names[0]})


AWAY = "server: no connection"  # how the reason begins where the server was not reached


class ServerGenerator:
    """The client, and the event loop that its requests live in, in a thread of its own."""

    def __init__(self, server: Server, sampling: Sampling) -> None:
        import openai

        self.tokens, self.server, self.sampling = 0, server, sampling
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="openai", daemon=True).start()
        self.client: Any = openai.AsyncOpenAI(
            base_url=server.url, api_key=_key(), timeout=server.timeout, max_retries=server.retries
        )
        self.slots = asyncio.Semaphore(server.concurrency)
        weakref.finalize(self, _close, self.client, self.loop).atexit = False

    def prepare(self, asks: list[Ask]) -> "Future[list[list[str | Failed]]]":
        """Sends the requests."""
        return self._run(self._all([(ask, _data_url(ask, self.server.max_side)) for ask in asks]))

    def answer(self, prepared: "Future[list[list[str | Failed]]]") -> list[list[str | Failed]]:
        """Waits for the answers."""
        answers = prepared.result()
        failed = [a.reason for answer in answers for a in answer if isinstance(a, Failed) and a.reason.startswith(AWAY)]
        if len(failed) == len(answers) * self.sampling.num:
            raise DataError(
                f"the server at {_shown(self.server.url)} does not answer ({failed[0].removeprefix('server: ')}). What is "
                "done is kept. Start the server, and run the same command again: it goes on from there."
            )
        return answers

    def _run(self, what: Coroutine[Any, Any, T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(what, self.loop)

    async def _all(self, asks: Sequence[tuple[Ask, str | None]]) -> list[list[str | Failed]]:
        """The answers to each ask. Several to one are several requests: not all servers know `n`."""
        num = self.sampling.num
        flat = await asyncio.gather(*(self._one(ask, url, i) for ask, url in asks for i in range(num)))
        return [flat[i : i + num] for i in range(0, len(flat), num)]

    async def _one(self, ask: Ask, url: str | None, number: int) -> str | Failed:
        import openai

        async with self.slots:
            try:
                return await self._request(ask, url, number)
            except openai.APITimeoutError:
                return Failed("server: timeout", again=True)
            except openai.APIConnectionError as e:
                return Failed(f"{AWAY} ({type(e.__cause__ or e).__name__})", again=True)
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as e:
                raise DataError(
                    f"the server at {_shown(self.server.url)} refuses all requests: {_message(e)} Check the URL, the model "
                    f"{self.server.model!r} and OPENAI_API_KEY. What is done is kept; the same command goes on from there."
                ) from e
            except openai.APIStatusError as e:
                again = e.status_code >= 500 or e.status_code in (408, 409, 429)
                return Failed(f"server: HTTP {e.status_code}" + ("" if again else f": {_message(e)}"), again=again)
            except (openai.APIError, ValueError, AttributeError, TypeError, LookupError, RecursionError) as e:
                return Failed(f"server: broken answer ({type(e).__name__})", again=True)

    async def _request(self, ask: Ask, url: str | None, number: int) -> str | Failed:
        s, mark = self.sampling, record.fingerprint(ask.key, ask.prompt, number)
        content: Any = ask.prompt
        if url is not None:
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": ask.prompt}]
        drawn = {"top_p": s.top_p, "seed": int(record.fingerprint(s.seed, mark), 16) % (1 << 31)} if s.heat else {}
        raw = await self.client.chat.completions.with_raw_response.create(
            model=self.server.model, messages=[{"role": "user", "content": content}], max_tokens=s.max_new_tokens,
            temperature=s.heat, extra_headers={"X-Request-Id": ID + mark}, **drawn,
        )  # fmt: skip
        answer: Any = json.loads(raw.http_response.content)
        echoed = {raw.headers.get("x-request-id"), answer.get("id")}
        if any(ID in str(e) and ID + mark not in str(e) for e in echoed):
            return Failed("server: the answer to another row", again=True)
        self.tokens += int((answer.get("usage") or {}).get("total_tokens") or 0)
        choices = answer.get("choices")
        if not choices:
            return Failed("server: no choices", again=True)
        text = choices[0]["message"].get("content")
        if choices[0]["message"].get("refusal"):
            return Failed("refused")
        return text if isinstance(text, str) else Failed("empty")


def _close(client: Any, loop: asyncio.AbstractEventLoop) -> None:
    closed = asyncio.run_coroutine_threadsafe(client.close(), loop)
    closed.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))


def _key() -> str:
    """For the client, which wants one; servers of one's own mostly ask for none."""
    return os.environ.get("OPENAI_API_KEY") or "none"


def _shown(url: str) -> str:
    """A URL without a password or a query that may hold a key."""
    return re.sub(r"//[^/@]*@", "//", url).split("?")[0]


def _message(error: Any) -> str:
    """What the server says."""
    body = error.body if isinstance(error.body, dict) else {}
    said = body.get("message") or body.get("detail") or body.get("error") or error.message
    return brief(said)


def _data_url(ask: Ask, max_side: int | None) -> str | None:
    """The picture of an ask: a JPEG as it is stored if it is upright and not too large, else a new JPEG."""
    if ask.picture is None:
        return None
    data, small = ask.encoded, max_side is None or max(ask.picture.size) <= max_side
    if not (data and small and kind_of(data) == "jpeg" and jpeg_orientation(data) == 1):
        picture = ask.picture
        if max_side is not None and not small:
            picture = picture.copy()
            picture.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=QUALITY)
        data = out.getvalue()
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
