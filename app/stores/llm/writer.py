"""Words tips with a model behind any OpenAI-compatible chat-completions endpoint.

A request holds a model, two messages and a JSON schema for the answer, and no other option: each is refused by some
endpoint. Invariants: an order ends within `PATIENCE_S`, whatever the endpoint does, tries and pauses included; it is
sent again at most once after 429, 5xx or a failed connection, and at most once without the schema, where that was
refused.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

from app.errors import ModelFailed
from app.features.clock import Clock, to_ms
from app.generation.ports import Order
from app.generation.prompt import Prompt, prompt_for
from app.stores.llm.client import LlmClient, NotConnected, Reply
from app.stores.llm.parsing import text_in

PATIENCE_S = 8.0
RETRIES = 1
PAUSE_S = 0.25  # before a second try, where the endpoint names no time
LEAST_S = 1.0  # what must be left for an answer, or a second try is not worth its price
PLAIN_FOR_S = 600.0  # how long it is remembered that an endpoint refuses schemas
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?")


class LlmWriter:
    """Implements `app.generation.ports.Writer`."""

    def __init__(
        self,
        exchange: LlmClient,
        model: str,
        clock: Clock,
        new_mark: Callable[[], str],
        *,
        patience_s: float = PATIENCE_S,
        least_s: float = LEAST_S,
    ) -> None:
        """`new_mark` returns unpredictable letters and digits, for the fence around a task."""
        self._exchange = exchange
        self._model = model
        self._clock = clock
        self._new_mark = new_mark
        self._patience_s = patience_s
        self._least_s = least_s
        self._plain_until = float("-inf")

    async def write(self, order: Order) -> str:
        """The text as the model gave it."""
        until = self._clock.monotonic() + self._patience_s
        try:
            async with asyncio.timeout(self._patience_s):
                return await self._ask(prompt_for(order, self._new_mark()), until)
        except TimeoutError:
            raise ModelFailed("timeout", f"no whole answer in {self._patience_s:g} s") from None

    async def _ask(self, prompt: Prompt, until: float) -> str:
        held = self._clock.monotonic() >= self._plain_until  # to the schema
        refused, left = False, RETRIES
        while True:
            reply = await self._post(self._request(prompt, held=held))
            if isinstance(reply, Reply):
                if 200 <= reply.status < 300:
                    if refused:
                        self._plain_until = self._clock.monotonic() + PLAIN_FOR_S
                    return self._checked(text_in(reply.body))
                if held and reply.status in (400, 422):
                    held, refused = False, True
                    continue
                failed, passing = self._failure(reply), reply.status == 429 or reply.status >= 500
            else:
                failed, passing = reply, True
            pause_s = PAUSE_S if failed.pause_s is None else failed.pause_s
            if not passing or not left or self._clock.monotonic() + pause_s + self._least_s > until:
                raise failed
            left -= 1
            await asyncio.sleep(pause_s)

    def _checked(self, text: str) -> str:
        if self._exchange.holds_key(text):
            raise ModelFailed("invalid answer", "it repeats the key", well=True)
        return text

    async def _post(self, request: dict[str, Any]) -> Reply | ModelFailed:
        """The answer, or why none began."""
        try:
            return await self._exchange.post(request)
        except NotConnected as error:
            return error

    def _request(self, prompt: Prompt, *, held: bool) -> dict[str, Any]:
        messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        request: dict[str, Any] = {"model": self._model, "messages": messages, "stream": False}
        if held:
            schema = {"name": "tip", "strict": True, "schema": prompt.schema}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        return request

    def _failure(self, reply: Reply) -> ModelFailed:
        """What a status other than 2xx means. 400, 413 and 422 may lie in this one prompt, the others concern all."""
        detail = f"it answered {reply.status}"
        if reply.status == 429:
            return ModelFailed("rate limited", detail, pause_s=self._asked_pause_s(reply))
        if reply.status >= 500:
            return ModelFailed("server error", detail, pause_s=self._asked_pause_s(reply))
        return ModelFailed("refused", detail, well=reply.status in (400, 413, 422))

    def _asked_pause_s(self, reply: Reply) -> float | None:
        """`Retry-After` in seconds, which may be a date; None where it says nothing that can be read."""
        value = (reply.retry_after or "").strip()
        if _SECONDS.fullmatch(value):
            return float(value)
        try:
            return max(0.0, (to_ms(parsedate_to_datetime(value)) - self._clock.now_ms()) / 1_000)
        except (ValueError, TypeError, OverflowError):  # TypeError: a date without a zone
            return None
