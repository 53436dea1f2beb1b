"""What an upstream's answer means: worth another try, or an error for a person."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from helios.errors import (
    DeadlineExceeded,
    DisabledRepo,
    EntryNotFound,
    Forbidden,
    GatedRepo,
    HeliosError,
    RepoNotFound,
    Retired,
    RevisionNotFound,
    Unavailable,
)
from helios.names import RepoId
from registry.pull.retry import Headers, Transient, asked_quota, asked_wait

PASSING: Final = frozenset({408, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
"""Statuses that may not come again: RFC 9110 and, from 520 on, those of a CDN that can't reach its origin."""

TOKEN: Final = "Set HF_TOKEN in the registry's environment (or run `hf auth login` as its user)"  # noqa: S105


@dataclass(frozen=True, slots=True)
class Where:
    """What was being asked for."""

    endpoint: str
    repo: RepoId
    revision: str
    path: str | None = None

    def __str__(self) -> str:
        what = f"{self.repo.id}@{self.revision}"
        return f"{what} at {self.endpoint}" if self.path is None else f"{self.path} of {what} at {self.endpoint}"


def of_status(status: int, headers: Headers, where: Where, now: float) -> Transient | HeliosError:
    """The failure that an answer with this status, 400 or more, stands for; ``now`` in seconds since 1970.

    X-Error-Code tells what a 401 or 404 is about; a bare one means the repository, as huggingface_hub reads it.
    """
    if status in PASSING:
        if status == 429:
            return Transient(f"{where}: status {status}", wait_s=asked_wait(headers, now), quota=asked_quota(headers))
        return Transient(f"{where}: status {status}")
    code, message = headers.get("x-error-code"), headers.get("x-error-message") or ""
    if code == "GatedRepo":
        page = f"{where.endpoint}/{'' if where.repo.kind == 'models' else 'datasets/'}{where.repo.id}"
        return GatedRepo(f"{where} is gated", hint=f"Accept its terms at {page}, then {TOKEN[0].lower()}{TOKEN[1:]}.")
    if status == 403 and message.strip() == DisabledRepo.WORDS:
        return DisabledRepo(hint=f"{where}: that is what the upstream says.")
    if code == Retired.code:  # another registry: its message says why, and what to use instead
        return Retired(f"{where} is not given any more: {message or 'it is retired'}"[:500])
    if code == "RevisionNotFound":
        return RevisionNotFound(f"there is no {where}", hint="Check the branch, tag or commit.")
    if code == "EntryNotFound":
        return EntryNotFound(f"there is no {where}, though it is listed")
    bad_token = "invalid credentials" in message.lower() or "invalid username" in message.lower()
    if code == "RepoNotFound" or (status in (401, 404) and code is None and not bad_token):
        if where.path is not None and status == 404 and code is None:
            return EntryNotFound(f"there is no {where}, though it is listed")
        return RepoNotFound(f"there is no {where}", hint=f"Check the name. If it is private: {TOKEN}.")
    if status in (401, 403):
        return Forbidden(f"{where} is refused: status {status}", hint=f"{TOKEN}, with the right to read it.")
    return Unavailable(f"{where} can't be had: status {status}", hint="Is that a Hugging Face Hub?")


def of_transport(error: HeliosError, where: Where) -> Transient:
    """A connection that was not made, broke or stalled."""
    timed_out = type(error) is DeadlineExceeded
    return Transient(f"{where}: {error.message}"[:300], timed_out=timed_out)


def again(error: HeliosError) -> HeliosError:
    """The error for one more person: an exception raised in several threads would collect their tracebacks."""
    copy = type(error)(error.message, hint=error.hint, code=error.code)
    copy.__dict__.update({k: v for k, v in vars(error).items() if not k.startswith("__")})
    return copy.with_traceback(None)
