"""``helios serve``: one published model behind the router, until a signal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from helios.config import Config
from helios.errors import NotFound
from helios.home import Home
from helios.launch import vllm
from helios.launch.progress import Progress
from helios.launch.serving import Serving, check_port, model_path
from helios.names import RepoId


def serve(
    home: Home, config: Config, repo: RepoId, revision: str, arguments: Sequence[str], start_timeout_s: float
) -> NoReturn:
    """Serve ``repo`` at ``revision`` (pinned to its commit now) until a signal raises Stopped.

    Raises NotFound for a model that the registry lacks, Unavailable when vLLM or the router end.
    """
    progress = Progress()
    vllm.require_vllm()
    with Serving(home, config, progress) as serving:
        serving.repair()
        check_port(config.router.host, config.router.port)
        registry = serving.registry()
        try:
            commit = registry.client().resolve(repo, revision).commit
        except NotFound as error:
            error.hint = (
                error.hint or f"`helios pull {repo.id}` brings it from the Hub, `helios ls` lists what is here."
            )
            raise
        mount = serving.mount()
        path = model_path(Path(mount.mountpoint), repo, commit)
        worker, _ = serving.start_vllm(path, repo, arguments, start_timeout_s)
        router = serving.start_router(config.router.host, config.router.port, worker)
        print(router.url, flush=True)
        progress.note(f"{repo.id}@{commit[:12]} answers at {router.url}/v1 until Ctrl-C.")
        serving.watch()
