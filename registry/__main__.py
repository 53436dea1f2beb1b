"""``python -m registry --embedded --report-fd=N``: the embedded registry, as helios/embedded.py starts it.

It leaves its starter's process tree and reports through the descriptor, once: ``{}`` when it answers requests, or
``{"error": {…}}`` when it can't start. A registry for others is ``helios registry``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os

from helios.config import load_from_process
from helios.errors import HeliosError
from helios.home import Home
from helios.logs import setup


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m registry")
    parser.add_argument("--embedded", action="store_true", required=True)
    parser.add_argument("--report-fd", type=int, required=True)
    options = parser.parse_args()
    if os.fork():
        os._exit(0)  # the starter waits for this process; the registry itself is nobody's child
    os.set_inheritable(options.report_fd, False)
    report = open(options.report_fd, "w")  # noqa: SIM115 - closed when it has been used
    log = logging.getLogger("helios.registry")
    try:
        config = load_from_process()
        setup(config.log)
        from registry.daemon import run

        def announce(_record: object) -> None:
            report.write("{}")
            report.close()

        return run(config, Home.from_env(os.environ), embedded=True, announce=announce)
    except HeliosError as error:
        if report.closed:
            raise
        log.warning("the registry can't start", extra={"code": error.code, "error": error.message})
        report.write(json.dumps({"error": {"code": error.code, "message": error.message, "hint": error.hint}}))
        report.close()
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
