"""Prompts of ``/v1/responses`` and ``/v1/messages`` as conversations, which ``/tokenize`` takes.

vLLM makes chat messages of both before it renders them (``construct_input_messages``, ``to_chat_completion_request`` in
0.32). The same is done here for what is text and needs nothing else to be known: earlier responses lie in one worker,
tools and images go ways of their own, and where system messages inside of a conversation go depends on the model's
template. Of such requests nothing is claimed. ``tests/golden/vllm/rendered.jsonl`` holds both sides beside each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec
from msgspec import Raw

from helios.decoding import json_decoder

BILLING: Final = "x-anthropic-billing-header"
"""What a block of the system prompt begins with that vLLM leaves out: it differs with every request."""

Chat = dict[str, Any]
"""Fields of a request for a chat completion: ``messages``, and ``chat_template_kwargs`` where there are any."""


class _Part(msgspec.Struct):
    type: str
    text: str = ""
    thinking: str = ""


class _Effort(msgspec.Struct):
    effort: str | None = None
    format: Raw = Raw()


class _Item(msgspec.Struct):
    """One item of ``input``. ``type``: a message where it says none."""

    type: str = "message"
    role: str = ""
    content: str | list[_Part] | None = None
    summary: list[_Part] = []
    status: str | None = None
    name: str | None = None
    encrypted_content: str | None = None


class _Responses(msgspec.Struct):
    """``/v1/responses``. What is Raw is only asked whether it is there."""

    input: str | list[_Item]
    instructions: str | None = None
    reasoning: _Effort | None = None
    chat_template_kwargs: dict[str, Raw] | None = None
    truncation: Literal["disabled"] = "disabled"
    tools: list[Raw] = []
    previous_response_id: None = None
    previous_input_messages: None = None


class _Message(msgspec.Struct):
    role: Literal["user", "assistant"]
    content: str | list[_Part]


class _Thinking(msgspec.Struct):
    type: Literal["enabled", "adaptive"]
    """``disabled`` is rendered in a way that every worker finds out for itself."""


class _Messages(msgspec.Struct):
    """``/v1/messages``."""

    messages: list[_Message]
    system: str | list[_Part] | None = None
    thinking: _Thinking | None = None
    output_config: _Effort | None = None
    chat_template_kwargs: dict[str, Raw] | None = None
    tools: None = None


_responses = json_decoder(_Responses)
_messages = json_decoder(_Messages)


class _UnknownError(ValueError):
    """It can't be said how this is rendered."""


def responses(body: bytes) -> Chat | None:
    """The conversation of a request to ``/v1/responses``; None where it can't be known.

    Raises msgspec.DecodeError or UnicodeDecodeError for what is no such request.
    """
    request = _responses.decode(body)
    if request.tools:
        return None
    chat: list[Chat] = [{"role": "system", "content": request.instructions}] if request.instructions else []
    if isinstance(request.input, str):
        chat.append({"role": "user", "content": request.input})
    else:
        if not request.input or request.input[-1].status in ("in_progress", "incomplete"):  # to be continued
            return None
        try:
            for item in request.input:
                _add(chat, item)
        except _UnknownError:
            return None
    effort = request.reasoning.effort if request.reasoning is not None else None
    return {"messages": chat, **options(request.chat_template_kwargs, effort)}


def messages(body: bytes) -> Chat | None:
    """The same for ``/v1/messages``."""
    request = _messages.decode(body)
    config = request.output_config
    if config is not None and bytes(config.format) not in (b"", b"null"):
        return None
    try:
        system = _system(request.system)
        chat: list[Chat] = [{"role": "system", "content": system}] if system else []
        chat += [_message(message) for message in request.messages]
    except _UnknownError:
        return None
    return {"messages": chat, **options(request.chat_template_kwargs, config.effort if config is not None else None)}


def options(kwargs: Mapping[str, Raw] | None, effort: str | None) -> Chat:
    """``chat_template_kwargs`` with the effort of reasoning, which ``/tokenize`` has no field of its own for."""
    given: dict[str, Any] = dict(kwargs or {})
    if effort is not None:
        given = {"enable_thinking": effort != "none"} | given | {"reasoning_effort": effort}
    return {"chat_template_kwargs": given} if given else {}


def _add(chat: list[Chat], item: _Item) -> None:
    """Add an item. What a model thought and what it said after it are one message. Raises _UnknownError."""
    if item.type == "reasoning":
        if item.encrypted_content:
            raise _UnknownError
        thought = item.content if isinstance(item.content, list) and item.content else item.summary
        _say(chat, "reasoning", thought[0].text if thought else "")
    elif item.type != "message" or not item.role or item.content is None:
        raise _UnknownError
    elif item.role == "assistant":
        text = item.content if isinstance(item.content, str) else _texts(item.content, "output_text")
        if not isinstance(text, str):  # of several parts only the first would be rendered
            raise _UnknownError
        _say(chat, "content", text)
    else:
        text = item.content if isinstance(item.content, str) else _texts(item.content, "input_text")
        name = {} if item.name is None else {"name": item.name}
        chat.append({"role": item.role, "content": text, **name})


def _say(chat: list[Chat], what: str, text: str) -> None:
    """Put it into the last message, if that is the model's and lacks it, or into a new one."""
    if chat and chat[-1]["role"] == "assistant" and what not in chat[-1]:
        chat[-1][what] = text
    else:
        chat.append({"role": "assistant", what: text})


def _texts(parts: list[_Part], kind: str) -> str | list[Chat]:
    """A content of texts: one is a text itself. Raises _UnknownError for any other part."""
    if not parts or any(part.type != kind for part in parts):
        raise _UnknownError
    return parts[0].text if len(parts) == 1 else [{"type": "text", "text": part.text} for part in parts]


def _system(system: str | list[_Part] | None) -> str:
    if system is None or isinstance(system, str):
        return system or ""
    if any(part.type != "text" for part in system):
        raise _UnknownError
    return "".join(part.text for part in system if not part.text.startswith(BILLING))


def _message(message: _Message) -> Chat:
    """One message of Anthropic's API. Raises _UnknownError for blocks that are more than text."""
    if isinstance(message.content, str):
        return {"role": message.role, "content": message.content}
    own = message.role == "assistant"
    thought = [part.thinking for part in message.content if part.type == "thinking" and own]
    rest = [p for p in message.content if not own or p.type not in ("thinking", "redacted_thinking")]
    said = _texts([part for part in rest if part.text or part.type != "text"], "text")
    return {"role": message.role, "content": said, **({"reasoning": "".join(thought)} if thought else {})}
