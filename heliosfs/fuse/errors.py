"""Which errno a reader sees for an error."""

from __future__ import annotations

import errno
from typing import Final

from helios.errors import Forbidden, HeliosError, InvalidInput, NotFound

_ERRNO: Final[dict[type[BaseException], int]] = {
    NotFound: errno.ENOENT,
    InvalidInput: errno.EINVAL,
    Forbidden: errno.EACCES,
    HeliosError: errno.EIO,
}


def errno_of(error: BaseException) -> int:
    """The errno for an error; whatever is unknown is EIO."""
    for kind in type(error).__mro__:
        if kind in _ERRNO:
            return _ERRNO[kind]
    return errno.EIO
