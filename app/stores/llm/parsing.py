"""Extracts the tip's text from a chat completion.

An answer that is not a completion counts as a failure of the endpoint. A completion without a tip fails one call, and
the endpoint stays in use. No error message quotes the answer, which may contain the key or the prompt.
"""

from __future__ import annotations

from typing import Annotated, NoReturn

import msgspec
from msgspec import Meta

from app.errors import ModelFailed
from app.generation.prompt import Tip

_FENCE = "```"
_CUT = frozenset({"length", "content_filter"})


class Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class Choice(msgspec.Struct):
    message: Message
    finish_reason: str | None = None


class Completion(msgspec.Struct):
    """A chat completion, reduced to the fields that this module reads."""

    choices: Annotated[list[Choice], Meta(min_length=1)]


_COMPLETION = msgspec.json.Decoder(Completion)
_TIP = msgspec.json.Decoder(Tip)


def text_in(body: bytes) -> str:
    """Extract the text of the tip from the body of an answer.

    Raises:
        ModelFailed: the body is not a chat completion, or its content is not a tip.
    """
    try:
        choice = _COMPLETION.decode(body).choices[0]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ModelFailed("invalid answer", "it is no chat completion") from None
    content = choice.message.content
    if choice.message.refusal:
        _no_tip("the model refused to answer")
    if choice.finish_reason in _CUT:
        _no_tip("it was cut short")
    if not content:
        _no_tip("it is empty")
    try:
        return _TIP.decode(_unfenced(content)).text
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        _no_tip("it is not the JSON that was asked for")


def _unfenced(content: str) -> str:
    """Remove the Markdown fence that models often put around JSON if the request has no schema. A regular expression
    would backtrack for hours on an answer that ends in thousands of spaces."""
    text = content.strip()
    if len(text) < 2 * len(_FENCE) or not (text.startswith(_FENCE) and text.endswith(_FENCE)):
        return content
    inside = text[len(_FENCE) : -len(_FENCE)]
    return (inside[4:] if inside[:4].lower() == "json" else inside).strip()


def _no_tip(detail: str) -> NoReturn:
    raise ModelFailed("invalid answer", detail, well=True) from None
