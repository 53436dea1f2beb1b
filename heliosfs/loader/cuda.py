"""CUDA (and ROCm, which PyTorch calls by the same names) as a ``Device``: copies on a stream of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from heliosfs.loader.staging import Event


class Cuda:
    """One GPU.

    Memory is allocated on the copying stream. The user's stream waits for the copies' events before it uses it, and
    ``record_stream`` has the allocator keep it until that stream is done (PyTorch's notes on CUDA semantics).
    """

    def __init__(self, index: int) -> None:
        import torch

        self._torch = torch
        self._device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self._device)

    def staging(self, nbytes: int) -> Any:
        return self._torch.empty(nbytes, dtype=self._torch.uint8, device="cpu", pin_memory=True)

    def view(self, staging: Any) -> memoryview:
        return memoryview(staging.numpy())

    def memory(self, nbytes: int) -> Any | None:
        try:
            # Threads that are in no inference mode write to it; they may not write to what was made in one.
            with self._torch.cuda.stream(self._stream), self._torch.inference_mode(False):
                return self._torch.empty(nbytes, dtype=self._torch.uint8, device=self._device)
        except self._torch.cuda.OutOfMemoryError:
            return None

    def upload(self, staging: Any, memory: Any, at: int, nbytes: int) -> Event:
        event = self._torch.cuda.Event()
        with self._torch.cuda.stream(self._stream):
            memory[at : at + nbytes].copy_(staging[:nbytes], non_blocking=True)
            event.record(self._stream)
        done: Event = event
        return done

    def hand_over(self, memory: Any, events: Sequence[Event]) -> None:
        user = self._torch.cuda.current_stream(self._device)
        for event in events:
            user.wait_event(event)
        memory.record_stream(user)
