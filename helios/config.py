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
from typing import Annotated, Any, Literal

import msgspec

from helios.decoding import converted
from helios.errors import UsageError
from helios.home import Home


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the configuration's sections."""


class IssuerSettings(Section, frozen=True):
    """Whose JSON Web Tokens are taken."""

    jwks: str = ""
    """Where the issuer's public keys are: ``https://…``, or a file."""
    issuer: str = ""
    """What ``iss`` must be."""
    audience: str = ""
    """What ``aud`` must be, or hold."""
    leeway_s: float = 30.0
    """How far the issuer's clock may be from ours, in seconds."""
    refresh_s: float = 300.0
    """How often keys are fetched again, in seconds; those known count meanwhile, and while the issuer is away."""
    ca_file: str = ""
    """Authorities of the certificate at ``jwks``, PEM; empty: the system's."""
    token_file: str = ""
    """File with a token that is sent when keys are fetched; empty: none."""


class ClusterSettings(IssuerSettings, frozen=True):
    """A Kubernetes cluster whose pods show their service account's token (docs/csi.md)."""

    audience: str = "helios"
    """What ``aud`` must hold: that of the CSIDriver's ``tokenRequests``."""


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
    namespaces: list[str] = []
    """Kubernetes namespaces (``team-*``) whose pods are the tenant's: they may mount what it may read (docs/csi.md)."""
    domain: str = ""
    """Where what it owns is stored, apart from what others have (docs/registry-domains.md); empty: with all others, in
    ``public``."""


class DomainSettings(Section, frozen=True):
    """Encryption of a domain's objects (docs/registry-domains.md)."""

    key_file: str = ""
    """File with the key: 64 hexadecimal digits, as `openssl rand -hex 32` prints them..."""
    key_env: str = ""
    """...or the environment variable that holds them."""
    old_key_files: list[str] = []
    """Former keys, for objects that were stored with them."""


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


class QuotaRule(Section, frozen=True):
    """Bytes that the repositories of a namespace may use together (docs/registry-quotas.md); all that fit count."""

    repo: str = ""
    """Pattern of repository ids, such as ``org/*`` or ``datasets/org/*``..."""
    tenant: str = ""
    """...or the tenant whose own repositories share the limit."""
    logical_gib: float = 0.0
    """Most bytes of all commits, each counted as a full copy, in GiB; 0: any."""
    stored_gib: float = 0.0
    """Most bytes that the store keeps for them, in GiB; 0: any."""


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
    token_file: str = ""
    """File with the token that is sent to the peer."""


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
    redirect: Literal["always", "large", "absent", "never"] = "large"
    """Which bytes clients and nodes fetch from a cloud store themselves, by addresses signed for them: all, those of
    nodes and of large files, of these what ``front`` does not have, or none."""
    front: str = ""
    """Directory on a fast disk that keeps what is used most of a store in the cloud; empty: none."""
    front_limit_gib: float = 0.0
    """Most that the front takes, in GiB; 0: bounded only by free space."""
    front_min_free: float = 0.05
    """Share of the front's disk that stays free, 0 to 1."""
    front_writes: Literal["through", "back"] = "through"
    """When a write counts: when the cloud has it, or when the front has it, and the cloud gets it in the background."""
    database: str = ""
    """Where the metadata is: ``postgresql://user@host:5432/name``; empty means SQLite in ``$HELIOS_HOME/registry``."""
    advertise: str = ""
    """Where other processes with the same ``database`` reach this one, ``http://host:port``; empty means ``host`` and
    ``port``, or the machine's name where ``host`` is a wildcard."""
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
    recompress_after_s: float = 30 * 86400.0
    """Chunks that nobody has read for this long are stored again, compressed, in seconds; 0: only when asked."""
    recompress_min_gain: float = 0.1
    """Least share of an object's size that has to be saved."""
    recompress_mb_s: float = 50.0
    """How fast it reads the store for that, in MB/s; 0: as fast as it can."""
    tenants: dict[str, TenantSettings] = {}
    """Tenants by name; each has the endpoint ``/t/<name>``, for the Hub API and the native one."""
    admin_tokens: str = ""
    """File with the sha256 of each token that may administer the registry over TCP, one a line. Empty: nobody may, but
    on a registry that only its own machine reaches and that has no tenants (docs/registry-access.md)."""
    node_tokens: str = ""
    """The same for nodes: such a token reads everything, tenants' and gated repositories included, and changes
    nothing."""
    clusters: dict[str, ClusterSettings] = {}
    """Kubernetes clusters, by any names, whose service accounts' tokens say which namespace a pod is of."""
    token_file: str = ""
    """File with the token that this machine's clients and mounts send to ``urls``; HELIOS_TOKEN wins over it."""
    domains: dict[str, DomainSettings] = {}
    """Keys of domains whose objects are encrypted; a domain that is not here is not."""
    peers: list[PeerSettings] = []
    """Other registries, for replication."""
    admission: list[AdmissionRule] = []
    """What may be published where, the first rule that fits (docs/registry-admission.md)."""
    quotas: list[QuotaRule] = []
    """Bytes that namespaces may use (docs/registry-quotas.md)."""
    usage_keep_days: float = 400.0
    """How long it is known who read what, in days (docs/registry-usage.md); 0: it is not recorded."""
    xet: bool = True
    """Serve large files over Xet too, which is how clients of the Hub get files of more than 50 GB."""
    xet_min_gib: float = 40.0
    """Smallest file that is served over Xet, in GiB; 0: every file."""
    xet_http_gb: float = 50.0
    """Largest file that clients of the Hub take over plain HTTP, in GB (1000^3 bytes): that of a larger one is told to
    wait until it is laid out for Xet."""

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
    node: str = ""
    """What this node is called in the registry's usage; empty: the host's name."""
    listen: str = ""
    """``host:port`` where the mount also serves /metrics, /healthz and /readyz over TCP; port 0 takes a free one."""


class WorkerSettings(Section, frozen=True):
    """A worker, for one model that it serves; a worker of several models has several of these."""

    model: str
    url: str
    """Its base URL. Empty, as a Service in Kubernetes says it: nobody serves the model now, and it is known."""
    role: Literal["both", "prefill", "decode"] = "both"
    revision: str = ""
    """Which revision of the model it serves, for a canary."""
    weight: float = 1.0
    """Its share of the requests beside other workers; more than 0."""
    adapters: list[str] = []
    """LoRA adapters that it serves, under these names."""
    cordoned: bool = False
    """It gets no new requests and finishes what it has; its model stays known."""
    key_file: str = ""
    """File with the key that it wants (vLLM's ``--api-key``); empty: ``router.worker_key_file``."""
    kv_events: str = ""
    """Where it publishes KV events: ``tcp://HOST:PORT``, a port of its host, or ``none``; empty: as
    ``router.kv_events`` says."""
    kv_replay: str = ""
    """Where it can be asked for them again, written in the same way."""
    kv_ranks: int = 0
    """Its data-parallel ranks, each of which publishes at a port of its own; 0: as ``router.kv_events`` says."""
    bootstrap: str = ""
    """Where those meet it that take blocks from it (SGLang, Mooncake): ``PORT`` or ``HOST:PORT``; empty: its own host,
    port 8998."""
    max_in_flight: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Requests of its models that this router answers at the same time, all workers together; more wait. Of several
    workers of a model the least counts; None: any number."""
    max_queued: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Requests of its models that wait at this router; more are refused with 429. In the same way."""


class KvEventsSettings(Section, frozen=True):
    """The index of workers' KV events, for the policy ``prefix-index`` (docs/router.md)."""

    port: int = 0
    """Port at which a worker publishes that doesn't say; 0: it does not publish."""
    replay_port: int = 0
    """Port at which such a worker can be asked for events again; 0: nowhere."""
    ranks: int = 1
    """Data-parallel ranks of a worker that doesn't say; rank n publishes at its port + n."""
    topic: str = ""
    """What the topics that are followed begin with; empty: all."""
    max_blocks: int = 1 << 21
    """Most blocks in the index, over all workers; about 190 bytes each at 16 tokens a block..."""
    max_blocks_per_rank: int = 1 << 17
    """...and of one rank of a worker."""
    wait_s: float = 0.005
    """Longest wait of a request for what the index says, in seconds; without an answer it is scheduled without."""
    tokens_mib: int = 64
    """Memory for the token ids of prompts that workers were asked for, in MiB."""


class KubernetesSettings(Section, frozen=True):
    """Workers in a cluster (docs/router.md, Workers in Kubernetes)."""

    slices: str = ""
    """Label selector of the EndpointSlices whose endpoints are workers; empty: none are looked at..."""
    pods: str = ""
    """...and of the pods. Alone, each pod is a worker; with ``slices``, an endpoint whose pod fits too is one."""
    namespace: str = ""
    """Empty: the pod's own, or that of the kubeconfig's context."""
    kubeconfig: str = ""
    """File; empty: the pod's service account, or else what KUBECONFIG or ~/.kube/config says."""
    context: str = ""
    """Context of the kubeconfig; empty: its current one."""
    port: str = "http"
    """Name or number of the port, where the worker's own annotation doesn't say."""
    silence_s: float = 75.0
    """A watch that said nothing for so long is given up and made anew; the API server sends something every minute."""
    watch_s: float = 240.0
    """How long one watch goes on, in seconds."""
    relist_s: float = 600.0
    """How often everything is listed anew, whatever the watches said, in seconds."""


class DiscoverySettings(Section, frozen=True):
    """Where workers come from, beside ``router.workers``."""

    file: str = ""
    """TOML file with ``[[workers]]``, read again when it changes; empty: none."""
    file_poll_s: float = 1.0
    """How often it is looked at, in seconds."""
    kubernetes: KubernetesSettings = KubernetesSettings()
    registrars: str = ""
    """File with the sha256 of each token with which workers may register, one a line; empty: only administrators do."""
    max_lease_s: float = 300.0
    """Longest lease of a registered worker, in seconds."""
    resolve: bool = False
    """Resolve models at the registry (``registry.urls``), and look there for those that no worker serves."""
    fetch: list[str] = []
    """Patterns of models (``org/*``) that the registry is told to fetch from its upstream when a client asks for one
    and no worker serves it; what the registry has already needs none."""
    resolve_ttl_s: float = 30.0
    """How long a resolved name counts before the registry is asked again, in seconds."""
    resolve_timeout_s: float = 5.0
    """Longest wait for the registry's answer to one question, in seconds; so long a request may be held by a name of
    which nothing is known yet."""
    hold: bool = False
    """Hold requests for a model that is being fetched or started (``router.admission.queue``); else they are answered
    503 at once, with its progress and Retry-After."""


class RetrySettings(Section, frozen=True):
    """Sending a request once more after a worker had it (docs/router.md, "Retries")."""

    most: int = 2
    """Most further tries of a request; 0: none."""
    budget_ratio: float = 0.2
    """Retries as a share of a model's requests, over ten seconds, 0 to 1..."""
    budget_floor_per_s: float = 1.0
    """...and so many a second besides."""
    retry_generation: bool = False
    """Also send generation again that a worker may have begun: what it made is lost, and made twice."""
    retry_429: bool = False
    """Also send to another worker what one answered with 429."""


class HedgeSettings(Section, frozen=True):
    """When a model's requests are sent to a second worker: one of ``after_s`` and ``percentile``."""

    after_s: float = 0.0
    """After so many seconds without a byte of an answer..."""
    percentile: float = 0.0
    """...or after what this share of the recent ones took to their first byte, 50 to 100..."""
    least_s: float = 0.01
    """...but not before so many seconds."""


class HedgingSettings(Section, frozen=True):
    """Sending a request that is late to a second worker as well (docs/router.md, "Hedging")."""

    models: dict[str, HedgeSettings] = {}
    """Of which models; none: nothing is hedged."""
    budget_ratio: float = 0.05
    """Second attempts as a share of a model's requests that may have one, over ten seconds, 0 to 1..."""
    budget_floor_per_s: float = 0.1
    """...and so many a second besides."""
    max_in_flight: int = 32
    """A worker with so many requests in flight gets no second attempts."""


class BreakerSettings(Section, frozen=True):
    """Circuit breaker of each worker."""

    enabled: bool = True
    failures: int = 5
    """Failures in a row that open it..."""
    failure_ratio: float = 0.5
    """...or this share of the requests within ``window_s``, 0 to 1, when there were ``min_requests``."""
    min_requests: int = 20
    window_s: float = 30.0
    open_s: float = 5.0
    """How long it is open at first, in seconds; twice as long each time it opens again..."""
    max_open_s: float = 120.0
    """...up to this."""
    jitter: float = 0.2
    """Random part on top, as a share of that time, 0 to 1."""
    probes: int = 2
    """Requests that are let through at a time when it is half open."""
    successes: int = 2
    """Successes in a row that close it."""


class OutlierSettings(Section, frozen=True):
    """Workers that are much worse than the others of their model get nothing for a time."""

    enabled: bool = True
    interval_s: float = 10.0
    """How often workers are compared, in seconds."""
    min_requests: int = 10
    """Requests of a worker that say enough."""
    slow_factor: float = 4.0
    """Slow: its median time to the first byte is so many times that of the others..."""
    slow_margin_s: float = 1.0
    """...and so much longer, in seconds."""
    failure_margin: float = 0.2
    """Failing: its share of failures is so much above that of the others, 0 to 1."""
    eject_s: float = 30.0
    """How long, in seconds, times the number of ejections in a row..."""
    max_eject_s: float = 300.0
    """...and at most."""
    max_share: float = 0.5
    """Most of a model's workers that are ejected at a time, 0 to 1."""


class HangSettings(Section, frozen=True):
    """Finding a worker that answers /health and generates nothing."""

    enabled: bool = True
    quiet_s: float = 15.0
    """Silence of a worker that has something to do before it is doubted, in seconds..."""
    factor: float = 4.0
    """...and at least so many times what it took for 99% of its first bytes."""
    timeout_s: float = 10.0
    """Longest wait for one generated token, in seconds."""
    every_s: float = 5.0
    """Between such checks of one worker, in seconds."""


class FallbackTarget(Section, frozen=True):
    """Where requests go that no worker of their model can take: another model here, or another endpoint."""

    model: str
    """The name of the model there, which takes the place of the one in the request."""
    url: str = ""
    """Base URL as OpenAI's clients take it (``https://api.example.com/v1``); empty: workers of this router."""
    key_file: str = ""
    """File with the endpoint's API key, sent as a bearer token..."""
    key_env: str = ""
    """...or the environment variable that holds it."""
    routes: list[str] = msgspec.field(
        default_factory=lambda: ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    )
    """Routes that the endpoint serves."""
    drop: list[str] = []
    """Fields of the request that the endpoint would refuse (``top_k``)."""


class FallbackRule(Section, frozen=True):
    model: str
    to: list[FallbackTarget]
    """In order of preference."""


Priority = Literal["high", "normal", "low"]
"""Who is served first of those who wait."""


class LimitSettings(Section, frozen=True):
    """What may be used; a bucket holds what a minute brings. 0: no limit."""

    requests_per_minute: float = 0.0
    tokens_per_minute: float = 0.0
    """Prompt and output together."""


class RouterTenantSettings(Section, frozen=True):
    """A tenant of the router; one that is not configured has these defaults."""

    models: list[str] = msgspec.field(default_factory=lambda: ["*"])
    """Patterns of the models it may use..."""
    routes: list[str] = msgspec.field(default_factory=lambda: ["*"])
    """...and of the paths, such as ``/v1/embeddings``; a key or a role can only narrow this."""
    weight: float = 1.0
    """Its share of the workers, against others, while requests wait."""
    limits: LimitSettings = LimitSettings()


class RoleSettings(Section, frozen=True):
    """What a role that a JWT names may do."""

    models: list[str] = msgspec.field(default_factory=lambda: ["*"])
    routes: list[str] = msgspec.field(default_factory=lambda: ["*"])
    priority: Priority = "normal"


class JwtSettings(IssuerSettings, frozen=True):
    """JSON Web Tokens that are taken as credentials; used once ``jwks`` is set."""

    tenant_claim: str = "tenant"
    """The claim that names the tenant, or ``a.b`` for one inside another; a token without it is refused."""
    roles_claim: str = "roles"
    """The claim that lists the roles."""


class QueueSettings(Section, frozen=True):
    """Requests that wait while all workers of their model have enough to do; used once ``per_worker`` is set, or a
    model can be woken."""

    per_worker: int = 0
    """Most requests at a worker before others wait; 0: any number."""
    max_requests: int = 1000
    """Most requests that wait, for all models together..."""
    max_mib: int = 256
    """...and of their bodies, in MiB."""
    saturated_s: float = 30.0
    """Longest wait for a worker that has enough to do, in seconds; then 429."""
    waking_s: float = 600.0
    """Longest wait for a model that is not up, in seconds; then 503."""
    comment_after_s: float = 5.0
    """A stream that waits longer than this gets comments, in seconds, and with the first its status 200; 0: never."""


class SharedLimitSettings(Section, frozen=True):
    """Limits that several routers share; used once ``url`` is set."""

    url: str = ""
    """Redis or Valkey: ``redis://host:6379/0``, ``rediss://…`` with TLS, ``unix:///path``."""
    timeout_s: float = 0.1
    """Longest wait for its answer, in seconds."""
    when_away: Literal["open", "closed"] = "open"
    """While it can't be asked: each router keeps the limits for itself, or requests that have limits get 503."""


class AdmissionSettings(Section, frozen=True):
    """Who may use the router, and how much (docs/router.md). Without ``keys`` and ``jwt`` everybody may."""

    keys: str = ""
    """File with API keys, which `helios router keys` writes."""
    jwt: JwtSettings = JwtSettings()
    roles: dict[str, RoleSettings] = {}
    """Roles of JWTs; where there are none a valid token may use everything that its tenant may."""
    tenants: dict[str, RouterTenantSettings] = {}
    models: dict[str, LimitSettings] = {}
    """Limits of models, for all who use them together."""
    shared: SharedLimitSettings = SharedLimitSettings()
    output_tokens: int = 512
    """Tokens of an answer that are reserved where the request has no maximum."""
    queue: QueueSettings = QueueSettings()
    wake_url: str = ""
    """What is asked to start a model that is not up, ``http://…`` (docs/router-discovery.md, "Waking"); empty: nothing,
    and requests for it get 503, unless ``hold`` is set."""
    hold: bool = False
    """Requests for a model that is not up wait although nobody is asked to start it: whoever scales sees that they do
    (docs/scaling-signals.md)."""


class BatchSettings(Section, frozen=True):
    """OpenAI's files and batches (docs/router-batches.md); used once ``store`` is set."""

    store: str = ""
    """Where they are kept: a directory, ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``az://container/prefix``;
    routers with the same one share the work. Empty: there are none."""
    store_options: StoreOptions = StoreOptions()
    max_file_mib: int = 200
    """Longest file, in MiB."""
    max_files: int = 1000
    """Most files of a tenant..."""
    max_open: int = 50
    """...and batches of it that are not over."""
    max_lines: int = 50_000
    """Most requests of a batch."""
    keep_days: float = 30.0
    """How long files are kept where nothing else is asked for, and batches that are over, in days."""
    in_flight: int = 32
    """Most requests of batches that a process has under way at a time."""
    per_worker: int = 16
    """One is only begun while a worker of its model has fewer requests than this, those of others counted, too."""
    lease_s: float = 30.0
    """A batch whose process shows no sign of life for so long goes on in another, in seconds."""
    poll_s: float = 5.0
    """How often a process looks for batches to run, in seconds."""


class TracingSettings(Section, frozen=True):
    """Spans of requests, exported over OTLP/HTTP (docs/router-traces.md)."""

    endpoint: str = ""
    """The collector, ``http://HOST:4318``, or the whole URL where it takes spans elsewhere than at /v1/traces; empty:
    nothing is recorded."""
    ratio: float = 1.0
    """Share of the traces begun here that is recorded, 0 to 1; of those that a client began the client says it."""
    queue: int = 2048
    """Most requests of a process whose spans wait; those of further ones are dropped, and counted."""
    interval_s: float = 2.0
    """How often spans are sent, in seconds."""
    timeout_s: float = 10.0
    """Longest that sending some takes, tries and pauses together, in seconds."""


class DisaggregationSettings(Section, frozen=True):
    """Prompts that workers with ``role = "prefill"`` compute for those with ``role = "decode"``
    (docs/router-disaggregation.md)."""

    connector: Literal["nixl", "nixl-push", "mooncake", "shared-storage", "cache-threshold", "sglang"] = "nixl"
    """How blocks get from one to the other; the workers' engines are to be started for it."""
    min_tokens: int = 512
    """Prompts of which fewer tokens have to be computed, by the router's estimate, are computed where they are
    answered."""
    max_waiting_tokens: int = 8192
    """A prefill worker at which so many tokens wait to be computed gets no more; without another one prompts are
    computed where they are answered."""
    timeout_s: float = 30.0
    """Longest wait for a prompt that is computed elsewhere, in seconds; then it is computed where it is answered."""
    lease_s: float = 30.0
    """How long a worker keeps what it has computed until somebody comes for it, in seconds: vLLM's
    ``kv_lease_duration``."""
    cache_hit_threshold: float = 0.8
    """The part of a prompt, more than 0 and at most 1, that a worker has to have cached to answer at once, where the
    connector is ``cache-threshold``."""


class PickerSettings(Section, frozen=True):
    """The endpoint picker: gateways ask it where each request goes (docs/router-picker.md); used once ``listen`` is
    set."""

    listen: str = ""
    """``HOST:PORT`` at which gateways ask, over gRPC (Envoy's external processing); port 0 takes a free one."""
    tls_cert: str = ""
    """Certificate that gateways are shown, with those between it and its authority; PEM. Empty: no TLS."""
    tls_key: str = ""
    response: Literal["leave", "follow"] = "leave"
    """Whether a gateway is left once its request has a worker: answers outlive the picker, and what is in flight is
    estimated; or followed to the end of the answer, so that it is counted."""
    hold_s: float = 60.0
    """Longest time that a request counts at its worker where the gateway is left, in seconds."""
    endpoints: Annotated[int, msgspec.Meta(ge=1, le=8)] = 1
    """Workers that a gateway is told for each request, the first choice and those to be tried after it."""
    max_streams: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 10_000
    """Most requests of gateways at a time in one process; others are told 503."""


class RouterSettings(Section, frozen=True):
    host: str = "127.0.0.1"
    port: int = 8480
    processes: int = 1
    """Processes that relay; 0: one for each core."""
    tls_cert: str = ""
    """Certificate that clients are shown, with those between it and its authority; PEM. Empty: plain HTTP."""
    tls_key: str = ""
    workers: list[WorkerSettings] = []
    discovery: DiscoverySettings = DiscoverySettings()
    admin_host: str = "127.0.0.1"
    admin_port: int = 8481
    """Where the administration listens if there are ``admin_tokens``, ``demand_tokens`` or
    ``discovery.registrars``; 0: a free port."""
    admin_tokens: str = ""
    """File with the sha256 of each token that may administer the router over TCP, one a line; empty: nobody may."""
    demand_tokens: str = ""
    """File with the sha256 of each token that may look at the demand (docs/scaling-signals.md), one a line."""
    admin_socket: str = ""
    """Unix socket of the administration, for the router's own user; empty: ``$HELIOS_HOME/run/router-<port>.sock``."""
    policy: str | dict[str, Any] = "prefix-cache"
    """How a worker is chosen (docs/router.md, "Scheduling"): a policy's name, or a table with its parameters."""
    kv_events: KvEventsSettings = KvEventsSettings()
    slow_start_s: float = 30.0
    """A worker that comes up while others work gets its whole share after so many seconds; 0: at once."""
    scrape_interval_s: float = 2.0
    """How often workers are asked for their own metrics, in seconds, where the policy reads them."""
    worker_ca: str = ""
    """Authorities of the workers' certificates, PEM. Empty: the system's."""
    worker_cert: str = ""
    """Certificate that workers are shown, PEM."""
    worker_key: str = ""
    """Its key; empty: it is in the same file."""
    connect_timeout_s: float = 5.0
    first_byte_timeout_s: float = 600.0
    """Longest wait for the first byte of a worker's answer, in seconds."""
    idle_timeout_s: float = 120.0
    """Longest silence inside a streamed answer, in seconds."""
    health_interval_s: float = 2.0
    health_timeout_s: float = 5.0
    max_body_mib: int = 64
    """Longest request body, in MiB."""
    max_connections: int = 0
    """Most connections of clients to one process; 0: as many as the limit of open files allows."""
    max_buffered_mib: int = 1024
    """Bound on the memory that the request bodies of all requests hold, in MiB."""
    drain_s: float = 30.0
    """How long requests in flight may go on after SIGTERM, in seconds."""
    retries: RetrySettings = RetrySettings()
    hedging: HedgingSettings = HedgingSettings()
    breaker: BreakerSettings = BreakerSettings()
    outliers: OutlierSettings = OutlierSettings()
    hang: HangSettings = HangSettings()
    fallbacks: list[FallbackRule] = []
    """What serves a model's requests when none of its workers can."""
    worker_key_file: str = ""
    """File with the key of workers that have no ``key_file``, sent instead of what the client sent."""
    aliases: dict[str, str] = {}
    """Other names for models: alias -> model, which may be one of a pinned revision."""
    answer_model: Literal["served", "asked"] = "served"
    """What answers call the model: as the worker serves it, byte for byte; or as the client asked for it, an alias,
    say (docs/router.md, "The model's name in answers")."""
    admission: AdmissionSettings = AdmissionSettings()
    batches: BatchSettings = BatchSettings()
    tracing: TracingSettings = TracingSettings()
    disaggregation: DisaggregationSettings = DisaggregationSettings()
    picker: PickerSettings = PickerSettings()


class ServedSettings(Section, frozen=True):
    """`helios worker`: one vLLM of a pod (docs/worker.md)."""

    role: Literal["both", "prefill", "decode"] = "both"
    """``prefill`` computes prompts for others, ``decode`` answers with what those have computed; ``both`` alone."""
    name: str = ""
    """What the model is called in requests; empty: as the directory says."""
    revision: str = ""
    """The commit that the directory holds; empty: as the directory says."""
    host: str = "127.0.0.1"
    """Where vLLM and the front listen; in a pod ``0.0.0.0`` or ``::``."""
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8490
    """Port of the front: probes, metrics, draining; 0 takes a free one."""
    vllm_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8000
    """Port of vLLM, to which routers send requests; 0 takes a free one."""
    advertise: str = ""
    """The address at which routers and other workers reach this one: the pod's IP. Empty: ``host``."""
    side_channel_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 5600
    """Where KV blocks are agreed on (NIXL), with the role ``prefill`` or ``decode``; a rank n has this port + n."""
    kv_events_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 5557
    """Where KV events are published, a rank n at this port + n; 0: nowhere..."""
    kv_replay_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 5657
    """...and where they can be asked for again; 0: nowhere."""
    routers: list[str] = []
    """Administrations of routers at which it registers, ``http://HOST:8481``; of a name all addresses are meant."""
    router_token_file: str = ""
    """File with the registrar's token for them."""
    id: str = ""
    """What it calls itself there; empty: the host's name, which is the pod's."""
    lease_s: Annotated[float, msgspec.Meta(ge=3)] = 30.0
    """How long a registration counts without being renewed, in seconds."""
    warm_up: Literal["on", "off"] = "on"
    """Whether a request has to be answered before it is ready; ``off`` for models that take no text."""
    start_timeout_s: Annotated[float, msgspec.Meta(ge=1)] = 900.0
    """Longest start of vLLM, warm-up included, in seconds."""
    settle_s: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    """How long after it began to drain requests may still come from routers that have not heard of it, in seconds."""
    drain_s: Annotated[float, msgspec.Meta(ge=0)] = 120.0
    """How long requests under way may go on when it is to end, in seconds, ``settle_s`` included."""
    stop_s: Annotated[float, msgspec.Meta(ge=0)] = 15.0
    """How long vLLM may take to end after SIGTERM before it is killed, in seconds."""
    hang_s: Annotated[float, msgspec.Meta(ge=0)] = 120.0
    """After so long without a sign of life from vLLM the worker is no longer alive, in seconds; 0: never."""
    remote_drain: bool = False
    """Whether who is not on this machine may have it drain: for a preStop hook of the kind httpGet."""


class CompileCacheSettings(Section, frozen=True):
    """Compiled kernels that starts of an engine leave for later ones (docs/compile-caches.md)."""

    mode: Literal["on", "read", "off"] = "on"
    """``read``: what others have published is used, and nothing is published."""
    limit_mib: int = 1024
    """Most that is published for a model, an engine and a device, in MiB."""
    wait_s: Annotated[float, msgspec.Meta(ge=1)] = 60.0
    """Longest that a start waits for the registry and until the artifact is here, in seconds; then it does without."""
    key_file: str = ""
    """File with the secret that nodes share which use each other's: 64 hexadecimal digits. Empty: one of this
    HELIOS_HOME alone, ``$HELIOS_HOME/compile-cache.key``, which is made when it is needed."""


class LogSettings(Section, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = "auto"
    """``auto``: text on a terminal, JSON lines elsewhere."""


class LoaderSettings(Section, frozen=True):
    """vLLM's ``--load-format helios`` (docs/loader.md)."""

    threads: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0
    """Threads that read; 0: half the cores, 8 at most, and 8 for files that are still to be fetched."""
    ahead_mib: Annotated[int, msgspec.Meta(ge=1)] = 256
    """What is read and not yet taken by the engine, in MiB; one tensor is always read."""
    staging_mib: Annotated[int, msgspec.Meta(ge=1)] = 128
    """Pinned host memory through which tensors go to a GPU, in MiB."""


class CsiSettings(Section, frozen=True):
    """The CSI driver (docs/csi.md)."""

    driver: str = "csi.helios.dev"
    """What the driver is called in Kubernetes."""
    mount: str = ""
    """Mount point of the mount that volumes are taken from; empty: the only one of this HELIOS_HOME."""
    kubelet: str = "/var/lib/kubelet"
    """The kubelet's directory: nothing is published anywhere else."""
    deadline_s: float = 60.0
    """Longest time for one call, in seconds; a shorter one of the caller counts."""
    authorise: Literal["off", "namespace", "token"] = "off"
    """A volume is published only if the registry says that the pod may read the model. ``namespace``: by the namespace
    that the kubelet tells; the driver's CSIDriver object needs ``podInfoOnMount`` for that. ``token``: by the pod's
    service-account token, which the registry checks; it needs ``tokenRequests``."""
    audience: str = "helios"
    """Whom those tokens are for, as ``tokenRequests`` says."""
    cluster: str = "default"
    """This cluster's name, where several share a registry: each has volumes of its own."""
    listen: str = ""
    """``host:port`` where the driver serves /metrics, /healthz and /readyz over TCP; port 0 takes a free one."""
    startup_taint: str = ""
    """Key of a taint that is removed from the node when the driver is ready and the kubelet knows it; empty: none."""
    node_labels: bool = False
    """Whether the node has labels that say which models its cache has."""
    service_account: str = "/var/run/secrets/kubernetes.io/serviceaccount"
    """Directory of the pod's service account, with ``token`` and ``ca.crt``: with these the taint and the labels are
    changed."""


class TlsSettings(Section, frozen=True):
    """How a server of ours speaks TLS; renewed files count for new connections."""

    cert: str = ""
    """What clients are shown, with those between it and its authority; PEM. Empty: no TLS."""
    key: str = ""
    client_ca: str = ""
    """Authorities whose certificates clients have to show, PEM. Empty: they need none."""


class SignalsSettings(Section, frozen=True):
    """What the operator hears of routers, and tells whoever scales (docs/scaling-signals.md)."""

    routers: list[str] = []
    """Addresses of the administrations of all replicas of the router, ``http://HOST:8481``..."""
    router_services: list[str] = []
    """...or the Services in front of routers and pickers, ``NAMESPACE/NAME``: each of their endpoints is asked."""
    router_port: str = "admin"
    """Name or number of that port of these Services."""
    token_file: str = ""
    """File with a token of ``router.demand_tokens``."""
    poll_s: float = 5.0
    """How often each replica is asked, in seconds; who waits is told without being asked."""
    timeout_s: float = 3.0
    """Longest wait for an answer, in seconds."""
    stale_s: float = 15.0
    """What a replica said longer ago is not known any more, in seconds."""
    window_s: float = 600.0
    """How long it is remembered what became of requests, in seconds."""
    scaler_listen: str = ""
    """``host:port`` of KEDA's external scaler; empty: there is none."""
    scaler_tls: TlsSettings = TlsSettings()
    external_listen: str = ""
    """``host:port`` of the cluster's external metrics; empty: they are not served."""
    external_tls: TlsSettings = TlsSettings()
    """``client_ca``: the front proxy's authority; empty: as the cluster says (kube-system,
    extension-apiserver-authentication)."""
    external_names: list[str] = []
    """Common names of the front proxy's certificate, with ``client_ca``; none: any that its authority has signed."""


class SecretKey(Section, frozen=True):
    """A key of a Secret, which has to be in the namespace of whoever uses it."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=253)]
    key: Annotated[str, msgspec.Meta(min_length=1, max_length=253)]


class Peer(Section, frozen=True):
    """Pods, by the labels of their namespace and their own; empty: all."""

    namespace: dict[str, str] = {}
    pods: dict[str, str] = {}


class SiteSettings(Section, frozen=True):
    """What holds for all services of a cluster: what their pods are made of, where the others are, and what they are
    called (docs/operator.md)."""

    worker_image: Annotated[str, msgspec.Meta(min_length=1, max_length=512)] = "registry.example/helios/vllm:0.1.0"
    """The image of workers, for services whose ``engine.image`` says none; it has to have ``helios`` on its path."""
    pause_image: Annotated[str, msgspec.Meta(min_length=1, max_length=512)] = "registry.k8s.io/pause:3.10"
    """What the pods run that keep a model on a node: it does nothing."""
    pull_secrets: list[str] = []
    """Secrets for those images, in each namespace with services."""
    csi_driver: Annotated[str, msgspec.Meta(min_length=1)] = "csi.helios.dev"
    host: Literal["0.0.0.0", "::"] = "0.0.0.0"  # noqa: S104 - in a pod of its own
    """Where workers listen."""
    routers: list[str] = []
    """Administrations at which workers register, ``http://HOST:8481``; none: routers find them by EndpointSlices."""
    registrar: SecretKey | None = None
    """The token for that."""
    registry_urls: list[str] = []
    """The registry as pods reach it: with it workers share what they compile (docs/compile-caches.md)."""
    registry_token: SecretKey | None = None
    compile_key: SecretKey | None = None
    router: Peer = Peer(
        namespace={"kubernetes.io/metadata.name": "helios"}, pods={"app.kubernetes.io/component": "router"}
    )
    """Who may send requests to workers."""
    gateway: Peer | None = None
    """Others that do: a gateway with an InferencePool."""
    monitoring: Peer | None = None
    """Who may read workers' metrics."""
    registry: Peer = Peer(
        namespace={"kubernetes.io/metadata.name": "helios"}, pods={"app.kubernetes.io/component": "registry"}
    )
    registry_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 8470
    router_admin_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 8481
    network_policies: bool = True
    """Whether workers get a NetworkPolicy."""
    mesh: Literal["off", "permissive", "strict"] = "off"
    """What Istio's PeerAuthentication says of workers, where Istio is; ``off``: nothing is made for Istio."""
    picker_service: str = ""
    """The endpoint picker's Service, in each namespace with workers; empty: no InferencePools."""
    picker_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 9002
    picker_pods: dict[str, str] = {}
    """Labels of the picker's pods, which look at the workers of their namespace; empty: none of a name of their own."""
    keda_scaler: str = ""
    """``HOST:PORT`` at which KEDA reaches the operator's external scaler; empty: no ScaledObjects."""
    keda_authentication: str = ""
    """With TLS there: the ClusterTriggerAuthentication with ``caCert``, ``tlsClientCert`` and ``tlsClientKey``."""
    cluster_domain: Annotated[str, msgspec.Meta(min_length=1)] = "cluster.local"


class OperatorSettings(Section, frozen=True):
    """The Kubernetes operator (docs/operator-runtime.md)."""

    namespace: str = ""
    """The one namespace whose objects are reconciled; empty: all."""
    kubeconfig: str = ""
    """Instead of the pod's service account, KUBECONFIG and ~/.kube/config."""
    context: str = ""
    """Which of the kubeconfig's contexts; empty: the current one."""
    lease_name: str = "helios-operator"
    """The Lease by which one of several processes leads..."""
    lease_namespace: str = ""
    """...and where it is; empty: the pod's namespace, or the context's."""
    lease_s: float = 15.0
    """Others lead when the leader has not been heard of for so long, in seconds."""
    renew_s: float = 10.0
    """The leader stops when it could not renew its lease for so long, in seconds; less than ``lease_s``."""
    retry_s: float = 2.0
    """Pause between renewals, in seconds; less than half of ``renew_s``."""
    workers: int = 8
    """Objects that are worked on at a time."""
    call_s: float = 10.0
    """Longest time for one call of the API server, in seconds."""
    resync_s: float = 600.0
    """How often every object has a turn whether it has changed or not, in seconds."""
    silence_s: float = 75.0
    """A watch that says nothing for so long is made anew, in seconds."""
    watch_s: float = 240.0
    """How long one watch goes on, in seconds."""
    relist_s: float = 1800.0
    """How often everything is listed anew, in seconds."""
    listen: str = ""
    """``host:port`` where the operator serves /metrics, /healthz and /readyz over TCP; port 0 takes a free one."""
    signals: SignalsSettings = SignalsSettings()
    """What it hears of routers, and tells whoever scales."""
    site: SiteSettings = SiteSettings()
    """What pods are made of, and where the others are."""
    look_s: Annotated[float, msgspec.Meta(gt=0)] = 15.0
    """How often the number of each role's workers is decided, in seconds; a request that is held for a service that
    sleeps is told at once."""
    ceilings: dict[str, Annotated[int, msgspec.Meta(ge=0)]] = {}
    """Most accelerators that all services have together, by their type (``NVIDIA-L40S``), or for those whose type has
    no ceiling by their resource (``nvidia.com/gpu``); Models with a higher priority go first. None named: no ceiling.
    """


class Config(Section, frozen=True):
    """Everything that can be configured; ``home`` comes from HELIOS_HOME."""

    registry: RegistrySettings = RegistrySettings()
    mount: MountSettings = MountSettings()
    router: RouterSettings = RouterSettings()
    worker: ServedSettings = ServedSettings()
    loader: LoaderSettings = LoaderSettings()
    compile_cache: CompileCacheSettings = CompileCacheSettings()
    csi: CsiSettings = CsiSettings()
    operator: OperatorSettings = OperatorSettings()
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
        found = converted(merged, Config, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(f"the configuration is wrong: {error}") from None
    registry = found.registry
    for url in registry.urls:
        without_credentials(url, "registry.urls")
    for peer in registry.peers:
        without_credentials(peer.url, f"the url of the peer {peer.name}")
    for url in found.worker.routers:
        without_credentials(url, "worker.routers")
    without_credentials(registry.upstream, "registry.upstream")
    without_credentials(registry.advertise, "registry.advertise")
    without_credentials(registry.store_options.endpoint, "registry.store_options.endpoint")
    return found


def without_credentials(url: str, what: str) -> str:
    """The address, which errors and logs may show then. Raises UsageError, without a word of it, if it has a user's
    name or a password in it: nobody would send them, and everybody would read them."""
    if "@" in url:
        raise UsageError(
            f"{what} has a user name or a password in it, which is not sent anywhere",
            hint="Tokens come from HF_TOKEN, HELIOS_TOKEN and files (docs/registry-access.md), a store's credentials "
            "from where its own tools look (docs/registry-stores.md).",
        )
    return url


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
        elif key in ("urls", "upstream_redirects", "routers"):
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
