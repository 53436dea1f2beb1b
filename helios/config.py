"""One typed configuration: defaults, then a TOML file, then the environment, then flags; unknown keys are errors.

The file is ``$HELIOS_CONFIG`` or ``$HELIOS_HOME/helios.toml`` and has one table a section. In the environment a key is
``HELIOS_<SECTION>__<KEY>`` with two underscores, for example ``HELIOS_ROUTER__PORT=8480``: the single-underscore names
that Kubernetes injects for Services (``HELIOS_ROUTER_PORT=tcp://…``) are therefore never mistaken for settings.
Lists are written as JSON, or as comma-separated text.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from helios.errors import UsageError
from helios.home import Home


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the configuration's sections."""


class StoreOptions(Section, frozen=True):
    """How a cloud store is reached. There are no secrets here: those come from each service's usual chain."""

    endpoint: str = ""
    """Address of the service where it is not the provider's own: ``http://minio:9000``."""
    region: str = ""
    """S3's region; empty means what AWS' configuration says."""
    account: str = ""
    """Azure's storage account; empty means AZURE_STORAGE_ACCOUNT_NAME."""


class TenantSettings(Section, frozen=True):
    sees: list[str] = msgspec.field(default_factory=lambda: ["*"])
    """Which repositories the tenant may read: patterns such as ``org/*``, ``datasets/org/*``."""
    owns: list[str] = []
    """Which it alone may see and change; others are told that they do not exist."""
    tokens: str = ""
    """File with the sha256 of each token that is accepted, one a line; empty: the tenant needs no token."""


class MirrorRule(Section, frozen=True):
    """How refs of upstream repositories are followed; patterns as for file names, the first that matches counts."""

    repo: str = "*"
    """``org/name`` for models, ``datasets/org/name`` for datasets."""
    ref: str = "*"
    policy: Literal["ttl", "pin", "approve", "local"] = "ttl"
    """``ttl``: ask the upstream again after ``ttl_s``. ``pin``: never again. ``approve``: ask, but move only when
    somebody approves (`helios mirror approve`). ``local``: the upstream is never asked for such a repository."""
    ttl_s: float = 300.0


class AdmissionRule(Section, frozen=True):
    """What may be published into the repositories whose id fits the pattern."""

    repo: str = "*"
    """Pattern of repository ids, such as ``org/*``; the first rule that fits counts."""
    formats: list[str] = []
    """Formats of files that are taken (docs/registry-admission.md); empty: all."""
    pickle: Literal["quarantine", "allow", "refuse"] = "quarantine"
    """Files that are read with pickle: kept back until somebody releases them, let through, or refused."""
    signature: Literal["ignore", "verify", "require"] = "ignore"
    """OpenSSF model signatures: not looked at, checked where there is one, or demanded."""
    keys: list[str] = []
    """Files with public keys (PEM, elliptic curve) whose signatures count."""
    certificates: list[str] = []
    """Files with certificates (PEM) under which a signer's certificate must stand."""
    identity: str = ""
    """Who must have signed, for keyless signatures (Sigstore): an e-mail address or a workflow's URL..."""
    issuer: str = ""
    """...and the OpenID Connect issuer that vouches for it."""
    trust_config: str = ""
    """File with Sigstore's trust configuration; empty: fetched from the public instance."""


class PeerSettings(Section, frozen=True):
    """Another registry whose repositories are brought here (docs/registry-replication.md)."""

    name: str
    url: str
    repos: list[str] = []
    """Patterns of repository ids; empty: all."""
    history: bool = False
    """Bring all commits of a ref, not only its last."""
    every_s: float = 0.0
    """How often it is looked at, in seconds; 0: only when asked."""


class RegistrySettings(Section, frozen=True):
    urls: list[str] = []
    """Where clients find the registry, in order of preference; empty means the embedded one."""
    host: str = "127.0.0.1"
    port: int = 8470
    store: str = ""
    """The object store: a directory, ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``az://container/prefix``; empty
    means ``$HELIOS_HOME/store``."""
    replicas: list[str] = []
    """Directories that hold the same as the directory ``store``."""
    store_engine: Literal["obstore", "fsspec"] = "obstore"
    """The library through which a cloud store is used."""
    store_options: StoreOptions = StoreOptions()
    store_read_back: bool = True
    """Read each object once after it was written to a cloud store, and compare."""
    redirect: Literal["always", "large", "never"] = "large"
    """Which bytes clients and nodes fetch from a cloud store themselves, by addresses signed for them: all, those of
    nodes and of large files, or none."""
    database: str = ""
    """Where the metadata is: ``postgresql://user@host:5432/name``; empty means SQLite in ``$HELIOS_HOME/registry``."""
    process_lease_s: float = 30.0
    """Processes that share a database take one that was silent for so long for dead and clean up after it."""
    upstream: str = ""
    """Hub to pull from; empty means HF_ENDPOINT, else https://huggingface.co."""
    pull_files: int = 4
    """Files downloaded at a time for each pull."""
    pull_stall_s: float = 120.0
    """A pull gives up when the upstream has failed for this long without a byte of progress, in seconds."""
    pull_connections: int = 32
    """Ranges under way at a time, for all downloads from the upstream together."""
    upstream_redirects: list[str] = []
    """Hosts that downloads may be redirected to (``*.example.com``), besides the upstream's own and the Hub's."""
    mirror: Literal["on", "off"] = "on"
    """Whether the Hub API fetches what it is asked for and does not hold from the upstream."""
    mirror_rules: list[MirrorRule] = []
    """Policies for refs; without one that matches: ``ttl`` of 300 s."""
    mirror_complete: bool = False
    """Fetch all files of a snapshot that somebody asks for, not only those that are asked for."""
    mirror_finish: bool = True
    """Finish the download of a file when all who asked for it have gone."""
    offline: bool = False
    """Never ask the upstream anything."""
    lease_s: float = 300.0
    """How long a reader may rely on a placement, in seconds."""
    keep_commits_s: float = 30 * 86400.0
    """How long a commit stays that nothing else keeps after it was in use, in seconds."""
    keep_history: bool = True
    """Whether the commits that a ref's commit came from stay, however old they are."""
    gc_grace_s: float = 86400.0
    """How long garbage stays before it is removed, in seconds, and again before its objects are deleted."""
    gc_every_s: float = 86400.0
    """How often garbage is collected, in seconds; 0: only when asked."""
    verify_mb_s: float = 100.0
    """How fast a verification reads the store, in MB/s; 0: as fast as it can."""
    tenants: dict[str, TenantSettings] = {}
    """Tenants of the Hub API by name; each has the endpoint ``/t/<name>``."""
    peers: list[PeerSettings] = []
    """Other registries, for replication."""
    admission: list[AdmissionRule] = []
    """What may be published where, the first rule that fits (docs/registry-admission.md)."""
    xet: bool = True
    """Serve large files over Xet too, which is how clients of the Hub get files of more than 50 GB."""
    xet_min_gib: float = 40.0
    """Smallest file that is served over Xet, in GiB; 0: every file."""

    def store_directory(self, default: Path) -> Path | None:
        """The directory of the object store; None where the store is an address."""
        if "://" in self.store:
            return None
        return Path(self.store) if self.store else default


class MountSettings(Section, frozen=True):
    mode: Literal["auto", "native", "portable"] = "auto"
    """``native``: a keeper mounts, the kernel reads whole files itself; needs root and Linux 6.9. ``portable``: pyfuse3
    alone. ``auto``: native where that is possible."""
    cache: str = ""
    """Directory of the local tier (L1); empty means ``$HELIOS_HOME/cache``."""
    cache_limit_gib: float = 0.0
    """Most that the cached blobs take on disk, in GiB; 0: bounded only by free space."""
    cache_min_free: float = 0.05
    """Share of the cache's disk that stays free, 0 to 1: what is used least goes for it."""
    l2: str = ""
    """Directory of a second tier (L2) on another, larger disk: what L1 has no room for; empty: none."""
    l2_limit_gib: float = 0.0
    """Most that the blobs in L2 take on disk, in GiB; 0: bounded only by free space."""
    l2_min_free: float = 0.05
    """Share of L2's disk that stays free, 0 to 1."""
    scrub_mb_s: float = 8.0
    """How fast cached files are looked at again for bytes that rotted on the disk, in MB/s; 0: not at all."""
    request_deadline_s: float = 30.0
    """A remote read with no answer after this long fails over, and in the end gives EIO."""
    connections: int = 8
    """Remote reads in flight for one source, at first..."""
    max_connections: int = 32
    """...and at most, where more of them are faster."""
    buffer_mib: int = 96
    """Bound on the memory that remote reads in flight hold, in MiB."""
    pool_mib: int = 64
    """Memory for small files, headers and chunks that the disk has no room for, in MiB; 0: none is kept."""
    shadow_percent: float = 0.0
    """Share of the reads that are compared with a plain download in the background, 0 to 100."""
    allow_other: bool = True
    """Let other users read the mount (needs root, or user_allow_other in /etc/fuse.conf)."""
    readahead_kib: int = 1024
    """How far the kernel reads ahead in a file, in KiB; also the size of its requests. Only root can set it."""
    listen: str = ""
    """``host:port`` where the mount also serves /metrics, /healthz and /readyz over TCP; port 0 takes a free one."""


class WorkerSettings(Section, frozen=True):
    model: str
    url: str
    role: Literal["both", "prefill", "decode"] = "both"


class RouterSettings(Section, frozen=True):
    host: str = "127.0.0.1"
    port: int = 8480
    workers: list[WorkerSettings] = []
    connect_timeout_s: float = 5.0
    first_byte_timeout_s: float = 600.0
    """Longest wait for the first byte of a worker's answer, in seconds."""
    idle_timeout_s: float = 120.0
    """Longest silence inside a streamed answer, in seconds."""
    health_interval_s: float = 2.0
    health_timeout_s: float = 5.0
    max_body_mib: int = 64
    """Longest request body, in MiB."""
    max_buffered_mib: int = 1024
    """Bound on the memory that the request bodies of all requests hold, in MiB."""
    drain_s: float = 30.0
    """How long requests in flight may go on after SIGTERM, in seconds."""


class LogSettings(Section, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = "auto"
    """``auto``: text on a terminal, JSON lines elsewhere."""


class Config(Section, frozen=True):
    """Everything that can be configured; ``home`` comes from HELIOS_HOME."""

    registry: RegistrySettings = RegistrySettings()
    mount: MountSettings = MountSettings()
    router: RouterSettings = RouterSettings()
    log: LogSettings = LogSettings()


SPECIAL = {"HELIOS_HOME", "HELIOS_CONFIG", "HELIOS_ONCE"}


def load(
    environ: Mapping[str, str], overrides: Mapping[str, Mapping[str, Any]] | None = None, file: Path | None = None
) -> Config:
    """Read the configuration; ``overrides`` are the flags given, by section, and win.

    Raises UsageError naming the key, where it came from and what is allowed.
    """
    path = file or (Path(environ["HELIOS_CONFIG"]) if environ.get("HELIOS_CONFIG") else None)
    merged: dict[str, dict[str, Any]] = {}
    default = Home.from_env(environ).root / "helios.toml"
    if path is not None or default.exists():
        _merge(merged, _read_file(path or default), str(path or default))
    _merge(merged, _read_environ(environ), "the environment")
    for section, values in (overrides or {}).items():
        _merge(merged, {section: {k: v for k, v in values.items() if v is not None}}, "the command line")
    try:
        return msgspec.convert(merged, Config, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(f"the configuration is wrong: {error}") from None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"the configuration file {path} can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the configuration file {path} is not valid TOML: {error}") from None


def _read_environ(environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for name, text in environ.items():
        if not name.startswith("HELIOS_") or "__" not in name or name in SPECIAL:
            continue
        section, _, key = name.removeprefix("HELIOS_").lower().partition("__")
        value: Any = text
        if text.startswith(("[", "{")):
            try:
                value = msgspec.json.decode(text)
            except msgspec.DecodeError as error:
                raise UsageError(f"{name} is not valid JSON: {error}") from None
        elif key in ("urls", "upstream_redirects"):
            value = [part.strip() for part in text.split(",") if part.strip()]
        out.setdefault(section, {})[key] = value
    return out


def _merge(into: dict[str, dict[str, Any]], new: Mapping[str, Any], where: str) -> None:
    sections = {f.name: f.type for f in msgspec.structs.fields(Config)}
    for section, values in new.items():
        if section not in sections:
            raise UsageError(f"{where} sets the unknown section {section!r}{_guess(section, sections)}")
        if not isinstance(values, Mapping):
            raise UsageError(f"{where}: {section!r} is a section and needs keys")
        keys = {f.name for f in msgspec.structs.fields(sections[section])}
        for key, value in values.items():
            if key not in keys:
                raise UsageError(f"{where} sets the unknown key {section}.{key}{_guess(key, keys)}")
            into.setdefault(section, {})[key] = value


def _guess(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def load_from_process(overrides: Mapping[str, Mapping[str, Any]] | None = None, file: Path | None = None) -> Config:
    """The configuration of this process."""
    return load(os.environ, overrides, file)
