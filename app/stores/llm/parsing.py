"""What an endpoint answers, taken apart: the completion around the text, and the text within.

Nothing is believed of it. What is no completion is the endpoint's fault; a completion whose content is no tip is that
call's. No message repeats anything of an answer, for an endpoint may repeat the key or the prompt in it.
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
    """What the model said, or why it would not."""

    content: str | None = None
    refusal: str | None = None


class Choice(msgspec.Struct):
    """One message, and why it ends where it ends."""

    message: Message
    finish_reason: str | None = None


class Completion(msgspec.Struct):
    """A chat completion, as far as it is looked at."""

    choices: Annotated[list[Choice], Meta(min_length=1)]


_COMPLETION = msgspec.json.Decoder(Completion)
_TIP = msgspec.json.Decoder(Tip)


def text_in(body: bytes) -> str:
    """The text of the tip in an answer's body.

    Raises:
        ModelFailed: `invalid answer`.
    """
    try:
        choice = _COMPLETION.decode(body).choices[0]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ModelFailed("invalid answer", "it is no chat completion") from None
    content = choice.message.content
    if choice.message.refusal:
        _no_tip("the model would not answer")
    if choice.finish_reason in _CUT:
        _no_tip("it was cut short")
    if not content:
        _no_tip("it is empty")
    try:
        return _TIP.decode(_unfenced(content)).text
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        _no_tip("it is not the JSON that was asked for")


def _unfenced(content: str) -> str:
    """Without what a model that was not held to a schema likes to put around its JSON.

    By hand: where a model goes on with spaces until it is cut off, a regular expression takes hours over them.
    """
    text = content.strip()
    if len(text) < 2 * len(_FENCE) or not (text.startswith(_FENCE) and text.endswith(_FENCE)):
        return content
    inside = text[len(_FENCE) : -len(_FENCE)]
    return (inside[4:] if inside[:4].lower() == "json" else inside).strip()


def _no_tip(detail: str) -> NoReturn:
    raise ModelFailed("invalid answer", detail, well=True) from None
