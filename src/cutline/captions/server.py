"""Generation by a server with OpenAI's protocol: vLLM, SGLang, Ollama, `transformers serve`, or OpenAI's own.

Many requests are in flight at once, up to a bound, and while one batch is waited for the next one's are sent already.
`openai`'s client tries again, with back-off and jitter, or when the server says (Retry-After), after 408, 409, 429, 5xx,
timeouts and broken connections. What fails all the same fails for its row alone; when no request of a batch reaches the
server, or the server refuses us altogether (key, model), the run stops. Options that the model does not take (OpenAI's
newer ones: max_tokens, temperature) are left out once it has said so.

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
import warnings
import weakref
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from PIL import Image
from pydantic import Field, PrivateAttr, field_validator

from cutline import record
from cutline.captions.generator import Ask, Sampling, brief
from cutline.captions.work import Failed
from cutline.config import Config
from cutline.errors import ConfigError, DataError
from cutline.pairs.headers import jpeg_orientation, kind_of

ID = "cutline-"  # how our request ids begin
QUALITY, MAX_JPEG = 90, 65_500  # of JPEGs that are made here, and the longest side (pixels) that libjpeg writes
AWAY = "server: no connection"  # how the reason begins where the server was not reached
REFUSED = ("server: HTTP 403", "server: HTTP 404")  # by a policy for this row, or by a wrong key or model for all rows
OPTIONAL = ("max_tokens", "temperature", "top_p", "seed")  # what can be left out where a model refuses it

T = TypeVar("T")


class Server(Config):
    """A server. url: its base, such as http://localhost:8000/v1; model: by the server's name of it.

    No model is the only one that the server has. concurrency: requests in flight, at most; there are never more than those
    of two batches, 2 × batch × num, so a larger number wants larger batches. timeout: seconds for one try; retries: further
    tries; max_side: pixels, to which the longer side of larger pictures is reduced (None: sent as they are). extra: more of
    the request's body, such as {chat_template_kwargs: {enable_thinking: false}} for a model that thinks aloud; it is part
    of the provenance, so no place for secrets. The key is OPENAI_API_KEY of the environment.
    """

    kind: Literal["openai"] = "openai"
    url: str = Field(pattern=r"^https?://")
    model: str = ""
    concurrency: int = Field(16, ge=1)
    timeout: float = Field(60.0, gt=0)
    retries: int = Field(4, ge=0)
    max_side: int | None = Field(None, ge=16)
    extra: dict[str, Any] = Field(default_factory=dict)
    _found: str = PrivateAttr("")

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        """Here, since what the client would raise is no error for users."""
        try:
            parts = urlsplit(url)
            if not parts.hostname or parts.port == 0 or re.search(r"\s", url):
                raise ValueError("it has no host or port, or it has a space")
        except ValueError as e:  # also of brackets and ports
            # A ConfigError, since pydantic shows the value with ValueErrors, and it may hold a password.
            raise ConfigError(
                f"{_shown(url)!r} is no URL of a server: {e}. Write it as http://localhost:8000/v1."
            ) from e
        return url

    def name(self) -> str:
        """Without the URL: a server may move while a run goes on, and a URL may hold secrets."""
        return f"openai:{self.named()}"

    def noted(self, sees: bool) -> dict[str, Any]:
        return ({"max_side": self.max_side} if sees else {}) | ({"extra": self.extra} if self.extra else {})

    def load(self, sampling: Sampling, sees: bool) -> "ServerGenerator":
        return ServerGenerator(self, sampling)

    def named(self) -> str:
        """The model; if none is given, the server is asked once for the only one it has.

        Raises `DataError` for a server that does not say, and `ConfigError` for one that has several.
        """
        if self.model or self._found:
            return self.model or self._found
        import openai

        key = _key()
        try:
            client = openai.OpenAI(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=self.retries)
            names = sorted(str(m.id) for m in client.models.list())
        except Exception as e:  # openai's errors, broken JSON, a page of HTML
            raise DataError(
                f"the server at {_shown(self.url)} does not say which models it has ({type(e).__name__}). Check the URL "
                "(it mostly ends in /v1) and that the server runs, or name the model: openai:URL#MODEL."
            ) from e
        if len(names) != 1:
            have = f"has {len(names)} models: {', '.join(names[:20])}" if names else "lists no model"
            raise ConfigError(f"the server at {_shown(self.url)} {have}. Say which: openai:{_shown(self.url)}#MODEL.")
        self._found = names[0]
        return self._found


class ServerGenerator:
    """The client, and the event loop that its requests live in, in a thread of its own."""

    def __init__(self, server: Server, sampling: Sampling) -> None:
        import openai

        self.tokens, self.server, self.sampling, self.model = 0, server, sampling, server.named()
        self.answered, self.refused = False, set[str]()  # whether ever; of OPTIONAL, what the model does not take
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
        failed = [a.reason for answer in answers for a in answer if isinstance(a, Failed)]
        away = [reason for reason in failed if reason.startswith(AWAY)]
        if len(away) == len(answers) * self.sampling.num:
            raise DataError(
                f"the server at {_shown(self.server.url)} does not answer ({away[0].removeprefix('server: ')}). What is "
                "done is kept. Start the server, and run the same command again: it goes on from there."
            )
        refused = [reason for reason in failed if reason.startswith(REFUSED)]
        if refused and not self.answered:  # else one row that a content policy blocks would stop every run
            raise self._refusal(refused[0].removeprefix("server: "))
        return answers

    def _refusal(self, said: str) -> DataError:
        return DataError(
            f"the server at {_shown(self.server.url)} refuses all requests ({said}). Check the URL, the model "
            f"{self.model!r} and OPENAI_API_KEY. What is done is kept; the same command goes on from there."
        )

    def _run(self, what: Coroutine[Any, Any, T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(what, self.loop)

    async def _all(self, asks: Sequence[tuple[Ask, str | Failed | None]]) -> list[list[str | Failed]]:
        """The answers to each ask. Several to one are several requests: not all servers know `n`."""
        num = self.sampling.num
        flat = await asyncio.gather(*(self._one(ask, url, i) for ask, url in asks for i in range(num)))
        return [flat[i : i + num] for i in range(0, len(flat), num)]

    async def _one(self, ask: Ask, url: str | Failed | None, number: int) -> str | Failed:
        import openai

        if isinstance(url, Failed):
            return url
        async with self.slots:
            try:
                return await self._request(ask, url, number)
            except openai.APITimeoutError:
                return Failed("server: timeout", again=True)
            except openai.APIConnectionError as e:
                return Failed(f"{AWAY} ({type(e.__cause__ or e).__name__})", again=True)
            except openai.AuthenticationError as e:
                raise self._refusal(f"HTTP {e.status_code}: {brief(_said(e))}") from e
            except openai.APIStatusError as e:
                again = e.status_code >= 500 or e.status_code in (408, 409, 429)
                return Failed(f"server: HTTP {e.status_code}" + ("" if again else f": {brief(_said(e))}"), again=again)
            except (openai.APIError, ValueError, AttributeError, TypeError, LookupError, RecursionError) as e:
                return Failed(f"server: broken answer ({type(e).__name__})", again=True)

    async def _request(self, ask: Ask, url: str | None, number: int) -> str | Failed:
        mark = record.fingerprint(ask.key, ask.prompt, number)
        content: Any = ask.prompt
        if url is not None:
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": ask.prompt}]
        raw = await self._sent(content, mark)
        answer: Any = json.loads(raw.http_response.content)
        echoed = {raw.headers.get("x-request-id"), answer.get("id")}
        if any(ID in str(e) and ID + mark not in str(e) for e in echoed):
            return Failed("server: the answer to another row", again=True)
        self.tokens += int((answer.get("usage") or {}).get("total_tokens") or 0)
        self.answered, choices = True, answer.get("choices")
        if not choices:
            return Failed("server: no choices", again=True)
        text = choices[0]["message"].get("content")
        if choices[0]["message"].get("refusal"):
            return Failed("refused")
        if not text and choices[0].get("finish_reason") == "length":  # all was spent on thinking
            return Failed("no answer within max_new_tokens")
        return text if isinstance(text, str) else Failed("empty")

    async def _sent(self, content: Any, mark: str) -> Any:
        """The raw reply to a request, which is sent again without an option that the model says it does not take."""
        import openai

        while True:
            options = self._options(mark)
            try:
                return await self.client.chat.completions.with_raw_response.create(
                    model=self.model, messages=[{"role": "user", "content": content}], extra_body=self.server.extra,
                    extra_headers={"X-Request-Id": ID + mark}, **options,
                )  # fmt: skip
            except openai.BadRequestError as e:
                name = _unsupported(e, options)
                if name is None:
                    raise
                if name not in self.refused and name != "max_tokens":  # which only has another name
                    warnings.warn(
                        f"{self.model!r} does not take {name}: it is left out, and the server's own value holds, which the "
                        "provenance does not know.",
                        stacklevel=2,
                    )
                self.refused.add(name)

    def _options(self, mark: str) -> dict[str, Any]:
        s = self.sampling
        options: dict[str, Any] = {"max_tokens": s.max_new_tokens, "temperature": s.heat}
        if s.heat:
            options |= {"top_p": s.top_p, "seed": int(record.fingerprint(s.seed, mark), 16) % (1 << 31)}
        if "max_tokens" in self.refused:
            options["max_completion_tokens"] = s.max_new_tokens
        return {name: value for name, value in options.items() if name not in self.refused}


def _unsupported(error: Any, options: dict[str, Any]) -> str | None:
    """Which of the options the server says that the model does not support."""
    said = str(_said(error))[:200]  # further on, some servers repeat the request
    if not re.search("unsupported|not support", said, re.IGNORECASE):
        return None
    return next((name for name in OPTIONAL if name in options and re.search(rf"\b{name}\b", said)), None)


def _close(client: Any, loop: asyncio.AbstractEventLoop) -> None:
    closed = asyncio.run_coroutine_threadsafe(client.close(), loop)
    closed.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))


def _key() -> str:
    """For the client, which wants one; servers of one's own mostly ask for none. Raises `ConfigError`."""
    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
    if not key.isascii() or not key.isprintable():  # it goes into a header
        raise ConfigError(
            "OPENAI_API_KEY holds a line break or a letter that no key has. Copy the key again: export OPENAI_API_KEY=sk-…"
        )
    return key


def _shown(url: str) -> str:
    """A URL without a password or a query that may hold a key."""
    return re.sub(r"//[^/@]*@", "//", url).split("?")[0]


def _said(error: Any) -> object:
    """What the server says."""
    body = error.body if isinstance(error.body, dict) else {}
    return body.get("message") or body.get("detail") or body.get("error") or error.message


def _data_url(ask: Ask, max_side: int | None) -> str | Failed | None:
    """The picture of an ask: a JPEG as it is stored if it is upright and not too large, else a new one (or a PNG)."""
    if ask.picture is None:
        return None
    kind, data, small = "jpeg", ask.encoded, max_side is None or max(ask.picture.size) <= max_side
    if not (data and small and kind_of(data) == "jpeg" and jpeg_orientation(data) == 1):
        picture = ask.picture
        if max_side is not None and not small:
            picture = picture.copy()
            picture.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
        kind, out = "jpeg" if max(picture.size) <= MAX_JPEG else "png", io.BytesIO()
        try:
            picture.save(out, kind, quality=QUALITY)
        except Exception as e:  # whatever Pillow raises
            return Failed(f"picture: cannot be sent ({brief(e) or type(e).__name__})")
        data = out.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
