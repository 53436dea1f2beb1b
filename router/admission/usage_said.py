"""What answers say of the tokens they used, in the names of OpenAI's and Anthropic's interfaces."""

from __future__ import annotations

from typing import Final

import msgspec

from helios.decoding import json_decoder


class Usage(msgspec.Struct):
    """OpenAI's and Anthropic's names."""

    total_tokens: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


class _Response(msgspec.Struct):
    usage: Usage | None = None


class Answer(_Response):
    """A whole answer, or the data of an event."""

    response: _Response | None = None
    """``/v1/responses`` has it in its last event."""


ANSWERS: Final = json_decoder(Answer)
USAGES: Final = json_decoder(Usage)
