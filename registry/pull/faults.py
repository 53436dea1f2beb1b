"""What went wrong at the upstream: worth another try, or an error for a person."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from helios.errors import EntryNotFound, Forbidden, HeliosError, RepoNotFound, RevisionNotFound, Unavailable
from helios.names import RepoId
from registry.pull.retry import Transient

PASSING = frozenset({408, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
"""Statuses that may not come again: RFC 9110 and, from 520 on, those of a CDN that can't reach its origin."""

AskedWait = Callable[[Mapping[str, str]], float | None]


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


def is_transport(error: BaseException) -> bool:
    """Whether the HTTP library under huggingface_hub raised it (requests, httpx or httpx2, after its version)."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its first base is the HTTPError of that library: in httpx the base of all transport errors; requests has OSErrors.
    return isinstance(error, (HfHubHTTPError.__bases__[0], OSError))


def transient(error: Exception, where: Where, asked_wait: AskedWait) -> Transient:
    """The failure as one worth another try; if it isn't, raises the HeliosError that says so, or the error itself."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HeliosError):
        raise error
    if isinstance(error, OfflineModeIsEnabled):
        raise Unavailable(
            f"{where} can't be asked for: huggingface_hub is in offline mode",
            hint="Unset HF_HUB_OFFLINE in the registry's environment.",
        ) from error
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if status not in PASSING:
            _refused(error, status, where)
        wait = asked_wait(error.response.headers) if status == 429 else None
        return Transient(f"{where}: status {status}", wait_s=wait)
    if is_transport(error):
        # The class of that name exists in all three libraries; nothing tells them apart but it.
        timed_out = "Timeout" in type(error).__name__
        return Transient(f"{where}: {type(error).__name__}: {error}"[:300], timed_out=timed_out)
    raise error


def _refused(error: Exception, status: int, where: Where) -> NoReturn:
    from huggingface_hub import errors

    token = "Set HF_TOKEN in the registry's environment (or run `hf auth login` as its user)"  # noqa: S105
    if isinstance(error, errors.GatedRepoError):
        page = f"{where.endpoint}/{'' if where.repo.kind == 'models' else 'datasets/'}{where.repo.id}"
        raise Forbidden(
            f"{where} is gated", hint=f"Accept its terms at {page}, then {token[0].lower()}{token[1:]}."
        ) from error
    if isinstance(error, errors.RepositoryNotFoundError):
        raise RepoNotFound(f"there is no {where}", hint=f"Check the name. If it is private: {token}.") from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise RevisionNotFound(f"there is no {where}", hint="Check the branch, tag or commit.") from error
    if isinstance(error, errors.EntryNotFoundError):
        raise EntryNotFound(f"there is no {where}, though it is listed") from error
    if status in (401, 403):
        raise Forbidden(f"{where} is refused: status {status}", hint=f"{token}, with the right to read it.") from error
    raise Unavailable(f"{where} can't be had: status {status}", hint="Is that a Hugging Face Hub?") from error
