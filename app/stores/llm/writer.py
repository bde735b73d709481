"""Writes tips with a model behind an OpenAI-compatible chat-completions endpoint.

A request holds a model, two messages, `stream: false` and a JSON schema for the answer. Every other option is refused
by some endpoint.

Invariants: `write` ends within `patience_s`, whatever the endpoint does, including retries and pauses. A request is
repeated at most once after 429, 5xx or a failed connection, and at most once without a schema that was refused.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

from app.errors import ModelFailed
from app.features.clock import Clock, to_ms
from app.generation.ports import TipRequest
from app.generation.prompt import Prompt, prompt_for
from app.stores.llm.client import LlmClient, NotConnected, Reply
from app.stores.llm.parsing import text_in

PATIENCE_S = 8.0
RETRIES = 1
PAUSE_S = 0.25  # before a retry, if the endpoint sends no Retry-After
LEAST_S = 1.0  # no retry if less time than this remains for its answer
PLAIN_FOR_S = 600.0  # an endpoint that refused the schema gets none for this long
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?")


class LlmWriter:
    """Writes tips with a language model. Implements `app.generation.ports.Writer`."""

    def __init__(
        self,
        client: LlmClient,
        model: str,
        clock: Clock,
        new_mark: Callable[[], str],
        *,
        patience_s: float = PATIENCE_S,
        least_s: float = LEAST_S,
    ) -> None:
        """`new_mark` returns new unpredictable letters and digits, which delimit the user's task in a prompt.

        `patience_s`: time limit of one call of `write`. No retry begins with less than `least_s` of that time left.
        """
        self._client = client
        self._model = model
        self._clock = clock
        self._new_mark = new_mark
        self._patience_s = patience_s
        self._least_s = least_s
        self._plain_until = float("-inf")

    async def write(self, order: TipRequest) -> str:
        until = self._clock.monotonic() + self._patience_s
        try:
            async with asyncio.timeout(self._patience_s):
                return await self._ask(prompt_for(order, self._new_mark()), until)
        except TimeoutError:
            raise ModelFailed("timeout", f"no whole answer in {self._patience_s:g} s") from None

    async def _ask(self, prompt: Prompt, until: float) -> str:
        with_schema = self._clock.monotonic() >= self._plain_until
        schema_refused, retries = False, RETRIES
        while True:
            try:
                reply = await self._client.post(self._request(prompt, with_schema=with_schema))
            except NotConnected as error:
                failed: ModelFailed = error
                temporary = True
            else:
                if 200 <= reply.status < 300:
                    if schema_refused:
                        self._plain_until = self._clock.monotonic() + PLAIN_FOR_S
                    return self._checked(text_in(reply.body))
                if with_schema and reply.status in (400, 422):
                    with_schema, schema_refused = False, True
                    continue
                failed, temporary = self._failure(reply), reply.status == 429 or reply.status >= 500
            pause_s = PAUSE_S if failed.pause_s is None else failed.pause_s
            if not temporary or not retries or self._clock.monotonic() + pause_s + self._least_s > until:
                raise failed
            retries -= 1
            await asyncio.sleep(pause_s)

    def _checked(self, text: str) -> str:
        if self._client.holds_key(text):
            raise ModelFailed("invalid answer", "it repeats the key", well=True)
        return text

    def _request(self, prompt: Prompt, *, with_schema: bool) -> dict[str, Any]:
        messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        request: dict[str, Any] = {"model": self._model, "messages": messages, "stream": False}
        if with_schema:
            schema = {"name": "tip", "strict": True, "schema": prompt.schema}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        return request

    def _failure(self, reply: Reply) -> ModelFailed:
        """The error for an answer whose status is not 2xx.

        400, 413 and 422 may be due to this prompt alone. All other statuses count as a failure of the endpoint.
        """
        detail = f"it answered {reply.status}"
        if reply.status == 429:
            return ModelFailed("rate limited", detail, pause_s=self._asked_pause_s(reply))
        if reply.status >= 500:
            return ModelFailed("server error", detail, pause_s=self._asked_pause_s(reply))
        return ModelFailed("refused", detail, well=reply.status in (400, 413, 422))

    def _asked_pause_s(self, reply: Reply) -> float | None:
        """The pause in seconds that `Retry-After` asks for, as a number or a date; None if it is missing or invalid."""
        value = (reply.retry_after or "").strip()
        if _SECONDS.fullmatch(value):
            return float(value)
        try:
            return max(0.0, (to_ms(parsedate_to_datetime(value)) - self._clock.now_ms()) / 1_000)
        except (ValueError, TypeError, OverflowError):  # TypeError: a date without a zone
            return None
