"""Structured logging for every process: standard library loggers, one handler on stderr.

Log with fields: ``log.warning("chunk is corrupt", extra={"model": …, "file": …})``; text output appends them as
``key=value``, JSON output makes them keys.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import sys
import time
from typing import Any, TextIO

from helios.config import LogSettings

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """The fields a caller gave with ``extra``."""
    return {k: v for k, v in vars(record).items() if k not in _STANDARD}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, message, fields, error."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        out: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields(record),
        }
        if record.exc_info:
            out["error"] = self.formatException(record.exc_info)
        return json.dumps(out, default=str)


class TextFormatter(logging.Formatter):
    """For people: time, level, message, fields."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{stamp} {record.levelname.lower():7} {record.name}: {record.getMessage()}"
        line += "".join(f" {k}={v!r}" for k, v in fields(record).items())
        return line if not record.exc_info else f"{line}\n{self.formatException(record.exc_info)}"


def setup(settings: LogSettings, stream: TextIO | None = None) -> None:
    """Send this process's logs to ``stream`` (stderr by default); if it crashes, stderr says where its threads were."""
    faulthandler.enable(file=2)
    stream = stream or sys.stderr
    as_json = settings.format == "json" or (settings.format == "auto" and not stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())
    for noisy in ("azure", "httpx", "httpx2", "httpcore", "urllib3", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
