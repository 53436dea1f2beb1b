"""A vLLM's sleep mode: whether it is used, and the calls that put a model to sleep and wake it.

vLLM serves them only with ``VLLM_SERVER_DEV_MODE=1``, beside others that run code (``/collective_rpc``). So a vLLM that
may sleep listens on loopback whatever its arguments say, and the router passes none of these paths on
(``router.routes``). Level 1 keeps the weights in main memory; level 2 drops them, and has them read again from where
the model lies. vLLM has sleep mode on GPUs only: on a CPU it refuses to start with it ("Sleep mode is not supported on
current platform", vllm/config/model.py of 0.32).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Final

from helios.errors import Unavailable
from helios.http.client import HttpClient
from helios.launch.machine import Device
from helios.launch.roles import HOST, Told

FLAG: Final = "--enable-sleep-mode"
NOT: Final = "--no-enable-sleep-mode"
LULL_S: Final = 120.0
"""Longest wait for a model to fall asleep, in seconds: main memory for the weights has to be made first."""
WAKE_S: Final = 60.0
"""Longest wait for a model that wakes from level 1, in seconds: its weights are copied to the GPU."""
ANSWER_S: Final = 5.0


def may_sleep(device: Device, arguments: Sequence[str]) -> bool:
    """Whether a vLLM with these arguments of the user's can be put to sleep; the last word of them counts."""
    said = [one.replace("_", "-") for one in arguments]
    last = next((one for one in reversed(said) if one in (FLAG, NOT)), FLAG)
    return device == "cuda" and last == FLAG


def told(before: Told) -> Told:
    """What a vLLM is told beside the rest so that it can be put to sleep..."""
    return Told((*before.arguments, FLAG), {**before.env, "VLLM_SERVER_DEV_MODE": "1"})


def arguments(given: Sequence[str]) -> list[str]:
    """...and its last arguments: nobody else's machine reaches it, whatever users say."""
    return [*given, "--host", HOST]


def lull(url: str, level: int) -> None:
    """Put a vLLM to sleep. What is under way there, which should be nothing, ends first.

    Raises HeliosError where it does not sleep then.
    """
    with _client(url) as client:
        client.bytes("POST", "/sleep", params={"level": str(level), "mode": "wait"}, timeout_s=LULL_S)
        if not _sleeps(client):
            raise Unavailable(f"vLLM says that it does not sleep at level {level}")


def wake(url: str, level: int, timeout_s: float) -> None:
    """Wake a vLLM that sleeps at a level; ``timeout_s`` for reading its weights again. Raises HeliosError where it is
    not ready for requests then."""
    with _client(url) as client:
        if level == 1:
            client.bytes("POST", "/wake_up", timeout_s=WAKE_S)
        else:
            client.bytes("POST", "/wake_up", params={"tags": "weights"}, timeout_s=WAKE_S)
            client.bytes("POST", "/collective_rpc", body={"method": "reload_weights"}, timeout_s=timeout_s)
            client.bytes("POST", "/wake_up", params={"tags": "kv_cache"}, timeout_s=WAKE_S)
        if _sleeps(client):
            raise Unavailable(f"vLLM sleeps still, from level {level}")
        client.bytes("GET", "/health", timeout_s=ANSWER_S)


@contextlib.contextmanager
def _client(url: str) -> Iterator[HttpClient]:
    with contextlib.closing(HttpClient(url, timeout_s=ANSWER_S, max_idle=0)) as client:
        yield client


def _sleeps(client: HttpClient) -> bool:
    """Raises Unavailable where it does not say."""
    document = client.json("GET", "/is_sleeping")
    if not isinstance(document, dict) or not isinstance(document.get("is_sleeping"), bool):
        raise Unavailable("vLLM does not say whether it sleeps")
    return bool(document["is_sleeping"])
