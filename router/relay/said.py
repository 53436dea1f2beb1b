"""What msgspec makes of a JSON body, apart from who reads it (``fields``): mypyc can't compile its structures.

msgspec reads the whole document once and keeps only these, at about 1 GB/s; a prompt is kept as the place where it
stands in the body.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Raw

from helios.decoding import json_decoder

NOT_SENT: Final = Raw()
"""What a field that is not in the body is: this very object."""


class Message(msgspec.Struct):
    """One message of a conversation, of any API; ``content`` is a string or a list of parts."""

    role: str = ""
    content: Raw = NOT_SENT


class Part(msgspec.Struct):
    """A part of a message's content."""

    text: str = ""


class Transfer(msgspec.Struct):
    kv_transfer_params: Raw = NOT_SENT
    ec_transfer_params: Raw = NOT_SENT


class Sampling(msgspec.Struct):
    extra_args: Raw = NOT_SENT
    max_tokens: Raw = NOT_SENT


class Needed(Transfer):
    bootstrap_host: Raw = NOT_SENT
    bootstrap_port: Raw = NOT_SENT
    bootstrap_room: Raw = NOT_SENT
    bootstrap_pair_key: Raw = NOT_SENT
    disagg_prefill_dp_rank: Raw = NOT_SENT
    cache_hit_threshold: Raw = NOT_SENT
    model: str | None = None
    vllm_xargs: Raw = NOT_SENT
    sampling_params: Raw = NOT_SENT


class Fields(Needed):
    """What a body says. All but ``model`` are hints."""

    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    session_id: str | None = None
    messages: list[Message] | None = None
    system: Raw = NOT_SENT
    instructions: Raw = NOT_SENT
    prompt: Raw = NOT_SENT
    input: Raw = NOT_SENT
    query: Raw = NOT_SENT
    token_ids: Raw = NOT_SENT


FIELDS: Final = json_decoder(Fields)
NEEDED: Final = json_decoder(Needed)
TRANSFERS: Final = json_decoder(Transfer)
SAMPLINGS: Final = json_decoder(Sampling)
PARTS: Final = json_decoder(list[Part])
MESSAGES: Final = json_decoder(list[Message])
