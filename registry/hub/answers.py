"""Responses as the Hub's clients expect them: errors, file headers, links to the next page."""

from __future__ import annotations

import math
import mimetypes
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote, urlencode

from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from helios.errors import HeliosError, Preparing, RateLimited
from helios.names import RepoId, is_commit
from heliosfs.store.manifest import FileEntry
from registry.hub.lookup import EntryMissing

TEXT: Final = frozenset({"txt", "md", "py", "yaml", "yml", "toml", "jinja", "csv", "html", "xml", "svg", "js"})
"""Shown as plain text: what a repository holds must not run in a browser under the registry's name."""


def error_answer(error: HeliosError) -> Response:
    """The error with the headers that make clients raise the right exception."""
    headers = {"x-error-code": error.code, "x-error-message": header_text(error.message)}
    match error:
        case EntryMissing():
            headers["x-repo-commit"] = error.commit
        case Preparing():
            headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        case RateLimited():
            wait = max(1, math.ceil(error.retry_after_s))
            headers |= {"retry-after": str(wait), "ratelimit": f'"resolvers";r=0;t={wait}'}
            if error.quota is not None:
                requests, seconds = error.quota
                headers["ratelimit-policy"] = f'"fixed window";"resolvers";q={requests};w={seconds}'
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse({"error": error.message, "code": error.code}, status_code=error.status, headers=headers)


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An answer that is no error of ours: a method or a call that there isn't."""
    return JSONResponse(
        {"error": message}, status_code=status, headers={"x-error-message": header_text(message), **(headers or {})}
    )


def etag_of(entry: FileEntry) -> str:
    """The name under which clients keep the file: the Hub's git oid, or the sha256 of an LFS file."""
    return entry.sha256 if entry.lfs else entry.git_oid


def file_headers(path: str, entry: FileEntry, commit: str, revision: str) -> list[tuple[str, str]]:
    """Headers of a file, apart from those of a range."""
    name = path.rpartition("/")[2]
    plain = "".join(c if c.isascii() and c not in '"\\' else "_" for c in name)
    headers = [
        ("etag", f'"{etag_of(entry)}"'),
        ("x-repo-commit", commit),
        ("accept-ranges", "bytes"),
        ("content-type", content_type(name)),
        ("content-disposition", f"inline; filename*=UTF-8''{quote(name, safe='')}; filename=\"{plain}\""),
        ("content-security-policy", "default-src 'none'; sandbox"),
        ("x-content-type-options", "nosniff"),
        ("cache-control", "max-age=31536000, immutable" if is_commit(revision) else "no-cache"),
    ]
    if entry.lfs:
        headers += [("x-linked-etag", f'"{entry.sha256}"'), ("x-linked-size", str(entry.size))]
    return headers


def redirect(location: str, headers: Sequence[tuple[str, str]], entry: FileEntry) -> Response:
    """The way to bytes that lie elsewhere: what clients want to know of the file stands here, as the Hub does it.

    The answer is for this caller now and is kept nowhere: the address is signed and will expire.
    """
    kept = {name: value for name, value in headers if name in ("etag", "x-repo-commit", "accept-ranges")}
    linked = {"x-linked-etag": f'"{etag_of(entry)}"', "x-linked-size": str(entry.size)}
    return Response(status_code=302, headers={**kept, **linked, "location": location, "cache-control": "no-store"})


def content_type(name: str) -> str:
    """A safe media type for a file name."""
    extension = name.rpartition(".")[2].lower()
    if extension in TEXT:
        return "text/plain; charset=utf-8"
    guessed = mimetypes.guess_type(name)[0] or ""
    known = guessed == "application/json" or guessed.startswith(("image/", "audio/", "video/"))
    return guessed if known else "application/octet-stream"


def link_next(scope: Scope, path: str, query: Mapping[str, Any] | Sequence[tuple[str, Any]]) -> dict[str, str]:
    """The Link header to a page, absolute. ``path`` starts with a slash and is quoted already."""
    return {"link": f'<{absolute(scope, path)}?{urlencode(query)}>; rel="next"'}


def absolute(scope: Scope, path: str) -> str:
    """The URL of a path of ours: from what the client called us and the prefix we are mounted under.

    ``path`` starts with a slash and is quoted already.
    """
    host = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"host"), None)
    if host is None:
        name, port = scope.get("server") or ("localhost", None)
        host = f"{name}:{port}" if port else name
    prefix = quote(scope.get("root_path", "").rstrip("/"))
    return f"{scope['scheme']}://{host}{prefix}{path}"


def page(scope: Scope, repo: RepoId) -> str:
    """The address of a repository, for a client to read its kind and name from.

    huggingface_hub 0.x takes what stands before the name for the kind, so below a prefix it gets the short form.
    """
    path = ("" if repo.kind == "models" else f"{repo.kind}/") + repo.id
    agent = next((value for name, value in scope["headers"] if name == b"user-agent"), b"")
    if scope.get("root_path") and b"hf_hub/0." in agent:
        return f"hf://{path}"
    return absolute(scope, f"/{path}")


def warned(warning: str | None) -> dict[str, str]:
    """The header with which clients warn of what they were told."""
    return {} if warning is None else {"x-hf-warning": header_text(f"mirror; {warning}")}


def header_text(message: str) -> str:
    """One line that fits into a header: other characters than printable ASCII become question marks."""
    return "".join(c if " " <= c <= "~" else " " if c in "\r\n\t" else "?" for c in message)[:500]
