"""The errors that users see: what was wrong, where, and what to do."""

from __future__ import annotations


class HeliosError(Exception):
    """Base of every error with a message meant for a person.

    ``code`` is the stable machine-readable name that APIs and ``--json`` output carry; ``status`` the HTTP status an
    API answers with; ``hint`` says what to do, where the message alone doesn't.
    """

    code = "Error"
    status = 500
    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n{self.hint}"


class InvalidInput(HeliosError):
    """Something from outside is malformed: a name, a path, a file, a request."""

    code = "InvalidInput"
    status = 400


class UsageError(HeliosError):
    """The command line or the configuration is wrong; the process exits with 2."""

    code = "Usage"
    status = 400
    exit_code = 2


class NotFound(HeliosError):
    """A repository, revision, path, object or process that does not exist."""

    code = "NotFound"
    status = 404


class RepoNotFound(NotFound):
    code = "RepoNotFound"


class RevisionNotFound(NotFound):
    code = "RevisionNotFound"


class EntryNotFound(NotFound):
    code = "EntryNotFound"


class Retired(HeliosError):
    """A model, or one revision of it, that must not be used any more."""

    code = "Retired"
    status = 410


class Conflict(HeliosError):
    """The state moved under the caller: a ref, a lock, a running process."""

    code = "Conflict"
    status = 409


class Unauthorized(HeliosError):
    """Credentials are missing or wrong."""

    code = "Unauthorized"
    status = 401


class Forbidden(HeliosError):
    code = "Forbidden"
    status = 403


class GatedRepo(Forbidden):
    """A repository whose terms the caller has not accepted at the upstream."""

    code = "GatedRepo"


class DisabledRepo(Forbidden):
    """A repository that its upstream shows to nobody any more. Clients know it by these words alone."""

    code = "DisabledRepo"
    WORDS = "Access to this resource is disabled."

    def __init__(self, message: str = WORDS, *, hint: str | None = None, code: str | None = None) -> None:
        super().__init__(message, hint=hint, code=code)


class Quarantined(Forbidden):
    """A file that nobody may read before somebody has looked at it and released it."""

    code = "Quarantined"


class NotAdmitted(Forbidden):
    """A file that the registry's rules don't take."""

    code = "NotAdmitted"


class BadSignature(Forbidden):
    """A model's signature that is missing, by nobody who is trusted, or of other files."""

    code = "BadSignature"


class IntegrityError(HeliosError):
    """Bytes that do not match their hash, or a record that does not decode."""

    code = "Integrity"
    status = 502


class Unavailable(HeliosError):
    """A peer, a device or a resource can't be used now."""

    code = "Unavailable"
    status = 503


class Preparing(Unavailable):
    """A file that is on its way to where it can be served; ``retry_after_s`` is when to ask again, in seconds."""

    code = "Preparing"
    retry_after_s = 1.0


class DeadlineExceeded(Unavailable):
    code = "DeadlineExceeded"
    status = 504


class UpstreamUnavailable(Unavailable):
    """The upstream Hub can't be reached, or fails: nothing is known of what was asked for."""

    code = "UpstreamUnavailable"
    status = 504


class RateLimited(Unavailable):
    """The upstream limits our rate; ``retry_after_s`` is how long it asks to wait, in seconds."""

    code = "RateLimited"
    status = 429
    retry_after_s = 0.0
    quota: tuple[int, int] | None = None
    """So many requests in so many seconds, where the upstream says so."""


class NoSpace(HeliosError):
    """A disk or a quota is full."""

    code = "NoSpace"
    status = 507


class QuotaExceeded(NoSpace):
    """A publish, upload or download that the quota of its repository has no room for."""

    code = "QuotaExceeded"
    quota = ""
    """Which one."""


BY_CODE: dict[str, type[HeliosError]] = {
    c.code: c
    for c in (
        HeliosError, InvalidInput, UsageError, NotFound, RepoNotFound, RevisionNotFound, EntryNotFound, Retired,
        Conflict, Unauthorized, Forbidden, GatedRepo, DisabledRepo, Quarantined, NotAdmitted, BadSignature,
        IntegrityError, Unavailable, DeadlineExceeded, UpstreamUnavailable, RateLimited, NoSpace, QuotaExceeded,
    )
}  # fmt: skip


def from_code(code: str, message: str, hint: str | None = None) -> HeliosError:
    """Rebuild the error an API answered with; an unknown code gives a plain HeliosError."""
    return BY_CODE.get(code, HeliosError)(message, hint=hint, code=code)
