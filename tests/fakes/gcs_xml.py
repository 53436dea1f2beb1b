"""Google Cloud Storage's XML API, as much of it as obstore uses, which believes nothing that it is told.

The emulators that can be installed speak the JSON API only (gcp-storage-emulator, fake-gcs-server), so this stands in
for the service. It checks what that checks: the JSON Web Token in ``Authorization`` against the service account's key,
V4 signatures of addresses with their expiry, generation preconditions, numbers and tags of parts. Formats after
Google's documents: "XML API", "V4 signing process", "Using OAuth 2.0 for Server to Server Applications".
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.etree import ElementTree

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

HOST = "storage.googleapis.com"
"""The host that obstore signs for, whatever the endpoint: its signed addresses hold at Google's own one only."""

ACCOUNT = "helios@project.iam.gserviceaccount.com"


@dataclass
class Gcs:
    """One bucket, ``bucket``."""

    url: str
    key: rsa.RSAPrivateKey
    objects: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    """Name -> content and generation."""
    uploads: dict[str, tuple[str, dict[int, bytes]]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def write_credentials(self, path: Path) -> None:
        """The file that GOOGLE_APPLICATION_CREDENTIALS names."""
        pem = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        account = {"type": "service_account", "client_email": ACCOUNT, "private_key": pem.decode()}
        path.write_text(json.dumps({**account, "private_key_id": "k1", "token_uri": f"{self.url}/token"}))

    def signed(self, message: bytes, signature: bytes) -> bool:
        try:
            self.key.public_key().verify(signature, message, padding.PKCS1v15(), hashes.SHA256())
        except InvalidSignature:
            return False
        return True


@contextlib.contextmanager
def gcs_xml() -> Iterator[Gcs]:
    """The service, while the block runs."""

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    gcs = Gcs(f"http://127.0.0.1:{server.server_address[1]}", rsa.generate_private_key(65537, 2048))
    Handler.gcs = gcs
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield gcs
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    gcs: Gcs
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        return

    def _any(self) -> None:
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if not self._allowed(parts.path, query):
            return self._error(403, "AccessDenied", "Access denied.")
        bucket, _, name = unquote(parts.path).removeprefix("/").partition("/")
        if bucket != "bucket":
            return self._error(404, "NoSuchBucket", "The specified bucket does not exist.")
        with self.gcs.lock:
            if not name:
                return self._list(query)
            if "uploads" in query or "uploadId" in query:
                return self._upload(name, query, body)
            return {"PUT": self._put, "DELETE": self._delete}.get(self.command, self._get)(name, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any

    def _allowed(self, path: str, query: dict[str, str]) -> bool:
        if "X-Goog-Signature" in query:
            return self._signed(path, dict(query))
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer" or token.count(".") != 2:
            return False
        message, _, signature = token.rpartition(".")
        claims = json.loads(_unbase64(message.partition(".")[2]))
        now = datetime.datetime.now(datetime.UTC).timestamp()
        return (
            claims["iss"] == ACCOUNT
            and claims["iat"] - 60 <= now < claims["exp"]
            and self.gcs.signed(message.encode(), _unbase64(signature))
        )

    def _signed(self, path: str, query: dict[str, str]) -> bool:
        """A V4 signature: over the method, the path, the query, the signed headers; not expired."""
        signature = bytes.fromhex(query.pop("X-Goog-Signature"))
        when = datetime.datetime.strptime(query["X-Goog-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.UTC)
        age = (datetime.datetime.now(datetime.UTC) - when).total_seconds()
        if not -60 < age < int(query["X-Goog-Expires"]) <= 7 * 86400 or query["X-Goog-SignedHeaders"] != "host":
            return False
        account, _, scope = query["X-Goog-Credential"].partition("/")
        pairs = urlsplit(self.path).query.split("&")
        canonical_query = "&".join(sorted(pair for pair in pairs if not pair.startswith("X-Goog-Signature=")))
        lines = [self.command, path, canonical_query, f"host:{HOST}", "", "host", "UNSIGNED-PAYLOAD"]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        message = "\n".join(["GOOG4-RSA-SHA256", query["X-Goog-Date"], scope, digest])
        return account == ACCOUNT and self.gcs.signed(message.encode(), signature)

    def _put(self, name: str, body: bytes) -> None:
        wanted = self.headers.get("x-goog-if-generation-match")
        found = self.gcs.objects.get(name)
        if wanted is not None and int(wanted) != (found[1] if found else 0):
            return self._error(412, "PreconditionFailed", "At least one of the pre-conditions did not hold.")
        self._store(name, body)

    def _store(self, name: str, body: bytes, answer: bytes = b"") -> None:
        self.gcs.objects[name] = body, next(self.gcs.numbers)
        self._answer(200, answer, self._headers(name))

    def _headers(self, name: str) -> dict[str, str]:
        body, generation = self.gcs.objects[name]
        digest = hashlib.md5(body, usedforsecurity=False).hexdigest()
        return {
            "etag": f'"{digest}"',
            "x-goog-generation": str(generation),
            "last-modified": "Sat, 01 Aug 2026 00:00:00 GMT",
            "accept-ranges": "bytes",
        }

    def _get(self, name: str, _body: bytes) -> None:
        if name not in self.gcs.objects:
            return self._error(404, "NoSuchKey", "The specified key does not exist.")
        data = self.gcs.objects[name][0]
        headers = self._headers(name)
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        if ranged is None:
            return self._answer(200, data, headers)
        first, last = int(ranged[1]), min(int(ranged[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return self._error(416, "InvalidRange", "The requested range cannot be satisfied.")
        headers["content-range"] = f"bytes {first}-{last}/{len(data)}"
        self._answer(206, data[first : last + 1], headers)

    def _delete(self, name: str, _body: bytes) -> None:
        if self.gcs.objects.pop(name, None) is None:
            return self._error(404, "NoSuchKey", "The specified key does not exist.")
        self._answer(204, b"", {})

    def _upload(self, name: str, query: dict[str, str], body: bytes) -> None:
        if "uploads" in query:
            upload = f"upload-{next(self.gcs.numbers)}"
            self.gcs.uploads[upload] = name, {}
            fields = f"<Bucket>bucket</Bucket><Key>{name}</Key><UploadId>{upload}</UploadId>"
            return self._xml("InitiateMultipartUploadResult", fields)
        known, parts = self.gcs.uploads.get(query["uploadId"], ("", {}))
        if known != name:
            return self._error(404, "NoSuchUpload", "The requested upload was not found.")
        if self.command == "PUT":
            parts[int(query["partNumber"])] = body
            return self._answer(200, b"", {"etag": f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'})
        del self.gcs.uploads[query["uploadId"]]
        if self.command == "DELETE":
            return self._answer(204, b"", {})
        told = list(ElementTree.fromstring(body).iter("Part")) or list(ElementTree.fromstring(body).iter("{*}Part"))
        tags = [(part.findtext("ETag") or part.findtext("{*}ETag") or "").strip('"') for part in told]
        held = [parts[int(part.findtext("PartNumber") or part.findtext("{*}PartNumber") or 0)] for part in told]
        if tags != [hashlib.md5(part, usedforsecurity=False).hexdigest() for part in held] or len(told) != len(parts):
            return self._error(400, "InvalidPart", "One or more of the specified parts could not be found.")
        answer = f"<CompleteMultipartUploadResult><ETag>&quot;{len(held)}&quot;</ETag></CompleteMultipartUploadResult>"
        self._store(name, b"".join(held), answer.encode())

    def _list(self, query: dict[str, str]) -> None:
        after, limit = query.get("continuation-token", ""), int(query.get("max-keys") or 1000)
        names = sorted(n for n in self.gcs.objects if n.startswith(query.get("prefix", "")) and n > after)
        more = len(names) > limit
        fields = f"<Name>bucket</Name><IsTruncated>{str(more).lower()}</IsTruncated>"
        if more:
            fields += f"<NextContinuationToken>{names[limit - 1]}</NextContinuationToken>"
        for name in names[:limit]:
            size, tag = len(self.gcs.objects[name][0]), self._headers(name)["etag"].replace('"', "&quot;")
            fields += f"<Contents><Key>{name}</Key><LastModified>2026-08-01T00:00:00.000Z</LastModified>"
            fields += f"<ETag>{tag}</ETag><Size>{size}</Size></Contents>"
        self._xml("ListBucketResult", fields)

    def _xml(self, kind: str, fields: str) -> None:
        self._answer(200, f"<?xml version='1.0' encoding='UTF-8'?><{kind}>{fields}</{kind}>".encode(), {})

    def _error(self, status: int, code: str, message: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
        self._answer(status, text.encode(), {})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _unbase64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
