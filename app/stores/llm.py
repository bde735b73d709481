"""Writes tips with a language model behind an OpenAI-compatible chat-completions endpoint.

A request holds a model, two messages, `stream: false` and a JSON schema for the answer. No other option is sent,
because some endpoint would refuse it.

Invariants:
- `write` ends within `patience_s`, whatever the endpoint does, including retries and pauses. A request is repeated at
  most once after 429, 5xx or a failed connection. It is also repeated once without the schema, if the endpoint refuses
  the schema.
- At most `MOST_BYTES` of an answer are read, and no compressed answer, because it could expand to a large one.
- A redirect is not followed: it would send prompt and key to another address.
- Proxy variables and `.netrc` are ignored: the settings of other programs must not decide which server gets the prompt
  and which key is sent. An operator who needs a proxy sets the URL of the proxy as the endpoint.
- The key is sent in one header only, and a text that contains the key is not used. No error message quotes the answer,
  which may contain the key or the prompt.
- A failure that the prompt may have caused does not count against the endpoint: a completion without a tip or with the
  key in it, and the statuses 400, 413 and 422. Any other failure does.
"""

import asyncio
import re
import ssl
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Annotated, Any

import httpx
import msgspec
from msgspec import Meta

from app.errors import FallbackReason, ModelFailed
from app.features.clock import Clock, to_ms
from app.generation.prompt import SYSTEM, Tip, prompt_for, tip_schema
from app.generation.tip_request import TipRequest

CONNECT_S = 2.0
MOST_BYTES = 64 * 1024
SECRET_CHARS = 16  # shorter keys are placeholders for a local server that accepts any key
PATIENCE_S = 8.0
PAUSE_S = 0.25  # before a retry, if the endpoint sends no Retry-After
LEAST_S = 1.0  # no retry if less time than this remains for its answer
PLAIN_FOR_S = 600.0  # an endpoint that refused the schema gets none for this long
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?")


class Temporary(ModelFailed):
    """Raised if the request may be sent again: after 429 or 5xx, or if the connection failed before an answer began."""


async def _remove_location(response: httpx.Response) -> None:
    """Remove the `Location` header: httpx parses it even if it follows no redirects, and fails if it is not a URL."""
    response.headers.pop("location", None)


def _tls(url: str) -> ssl.SSLContext:
    """The TLS context of a client for `url`. It trusts the public authorities and those installed on the system."""
    if not url.startswith("https:"):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # unused; loading certificates takes tens of milliseconds
    context = httpx.create_ssl_context(trust_env=False)
    context.load_default_certs()
    return context


class Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class Choice(msgspec.Struct):
    message: Message
    finish_reason: str | None = None


class Completion(msgspec.Struct):
    choices: Annotated[list[Choice], Meta(min_length=1)]


_COMPLETION = msgspec.json.Decoder(Completion)
_TIP = msgspec.json.Decoder(Tip)


def text_in(body: bytes) -> str:
    """Extract the text of the tip from the body of an answer. Raises `ModelFailed` if there is none."""
    try:
        choice = _COMPLETION.decode(body).choices[0]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ModelFailed("invalid answer", "it is not a chat completion") from None
    content = choice.message.content
    if choice.message.refusal:
        problem = "the model refused to answer"
    elif choice.finish_reason in {"length", "content_filter"}:
        problem = "it was cut short"
    elif not content:
        problem = "it is empty"
    else:
        try:
            return _TIP.decode(_unfenced(content)).text
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            problem = "it is not the JSON that was asked for"
    raise ModelFailed("invalid answer", problem, well=True)


def _unfenced(content: str) -> str:
    """Remove the Markdown fence (```) that a model may put around its JSON. Uses no regular expression, which would
    backtrack for hours on an answer that ends in thousands of spaces."""
    text = content.strip()
    if not (text.startswith("```") and text.endswith("```")):
        return content
    inside = text.strip("`")
    return (inside[4:] if inside[:4].lower() == "json" else inside).strip()


class LlmWriter:
    def __init__(
        self,
        url: str,
        model: str,
        clock: Clock,
        new_mark: Callable[[], str],
        *,
        key: str | None = None,
        connect_s: float = CONNECT_S,
        patience_s: float = PATIENCE_S,
        least_s: float = LEAST_S,
    ) -> None:
        """`url` is the base URL, without `/chat/completions`. `new_mark` makes the unpredictable mark around the task
        in a prompt (`prompt_for`). `connect_s` limits connecting, and `patience_s` limits a call of `write`. No retry
        is made if less than `least_s` is left."""
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        self._secret = key if key is not None and len(key) >= SECRET_CHARS else None
        self._url = f"{url}/chat/completions"
        self._model = model
        self._clock = clock
        self._new_mark = new_mark
        self._patience_s = patience_s
        self._least_s = least_s
        self._plain_until = float("-inf")
        self._client = httpx.AsyncClient(
            headers=headers,
            # `write` has a deadline for the whole answer. A limit per read would never end a slow trickle.
            timeout=httpx.Timeout(None, connect=connect_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
            follow_redirects=False,
            event_hooks={"response": [_remove_location]},
            trust_env=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # cookies would accumulate
            verify=_tls(url),
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def write(self, request: TipRequest) -> str:
        """Ask the model for a tip; the text is not yet checked. Raises `ModelFailed`."""
        until = self._clock.monotonic() + self._patience_s
        try:
            async with asyncio.timeout(self._patience_s):
                return await self._ask(prompt_for(request, self._new_mark()), until)
        except TimeoutError:
            raise ModelFailed("timeout", f"no complete answer within {self._patience_s:g} s") from None

    async def _ask(self, prompt: str, until: float) -> str:
        with_schema = self._clock.monotonic() >= self._plain_until
        schema_refused, retries = False, 1
        while True:
            try:
                status, body = await self._post(prompt, with_schema=with_schema)
            except Temporary as failed:
                pause_s = PAUSE_S if failed.pause_s is None else failed.pause_s
                if not retries or self._clock.monotonic() + pause_s + self._least_s > until:
                    raise
                retries -= 1
                await asyncio.sleep(pause_s)
                continue
            if with_schema and status in (400, 422):
                with_schema, schema_refused = False, True
                continue
            if not 200 <= status < 300:
                # 400, 413 and 422 may be due to this prompt alone. Any other means that the endpoint failed.
                raise ModelFailed("refused", f"it answered {status}", well=status in (400, 413, 422))
            if schema_refused:
                self._plain_until = self._clock.monotonic() + PLAIN_FOR_S
            text = text_in(body)
            if self._secret is not None and self._secret in text:
                raise ModelFailed("invalid answer", "it repeats the key", well=True)
            return text

    async def _post(self, prompt: str, *, with_schema: bool) -> tuple[int, bytes]:
        """Send a request; return the status and the body of the answer. Raises `Temporary` or `ModelFailed`."""
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
        request: dict[str, Any] = {"model": self._model, "messages": messages, "stream": False}
        if with_schema:
            schema = {"name": "tip", "strict": True, "schema": tip_schema()}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        begun = False
        try:
            async with self._client.stream("POST", self._url, json=request) as reply:
                begun = True
                taken = bytearray()
                async for piece in reply.aiter_raw():
                    taken += piece
                    if len(taken) > MOST_BYTES:
                        raise ModelFailed("invalid answer", f"the answer has more than {MOST_BYTES} bytes")
        except httpx.ConnectTimeout:
            raise Temporary("timeout", "no connection in time") from None
        except httpx.HTTPError as error:
            # The type and not the text, which for invalid HTTP contains bytes of the answer.
            kind = type(error).__name__
            if begun:
                raise ModelFailed("connection failed", f"the connection broke during the answer ({kind})") from None
            raise Temporary("connection failed", f"no answer began ({kind})") from None
        status = reply.status_code
        if status == 429 or status >= 500:
            pause_s = self._asked_pause_s(reply.headers.get("retry-after", "").strip())
            reason: FallbackReason = "rate limited" if status == 429 else "server error"
            raise Temporary(reason, f"it answered {status}", pause_s=pause_s)
        return status, bytes(taken)

    def _asked_pause_s(self, value: str) -> float | None:
        """The pause in seconds that `Retry-After` asks for, as a number or a date; None if it is missing or invalid."""
        if _SECONDS.fullmatch(value):
            return float(value)
        try:
            return max(0.0, (to_ms(parsedate_to_datetime(value)) - self._clock.now_ms()) / 1_000)
        except (ValueError, TypeError, OverflowError):  # TypeError: a date without a zone
            return None
