"""Who may administer the router: its own user on the unix socket, and over TCP whoever has a token.

Three files hold the sha256 of tokens (helios/accepted.py): administrators may do everything, registrars put workers in
and take them out, whoever scales looks at the demand; neither of these does anything else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

from helios.accepted import Tokens
from helios.errors import Forbidden, Unauthorized
from helios.http.protocol import PEER


class Right(IntEnum):
    """What a call needs, and what a caller has."""

    NONE = 0
    REGISTER = 1
    SCALE = 2
    ADMINISTER = 3


ONLY: Final = {Right.REGISTER: "registers workers", Right.SCALE: "looks at the demand"}
"""What a token with this right does and nothing else."""


class Access:
    """Asked before each call. Raises UsageError for a file that can't be used."""

    def __init__(self, admins: str, registrars: str, scalers: str = "") -> None:
        files = {Right.ADMINISTER: admins, Right.REGISTER: registrars, Right.SCALE: scalers}
        self._tokens = {right: Tokens(Path(file)) for right, file in files.items() if file}

    @property
    def over_tcp(self) -> bool:
        """Whether anybody has a token."""
        return bool(self._tokens)

    def demand(self, scope: Mapping[str, Any], needed: Right) -> None:
        """Raises Unauthorized where no token came, or one that nobody knows; Forbidden where it isn't enough."""
        peer = scope.get("extensions", {}).get(PEER)
        if peer is not None and peer["uid"] in (os.getuid(), 0):
            return
        if needed is Right.NONE:
            return
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"").decode("latin-1")
        kind, _, token = header.partition(" ")
        if kind.lower() != "bearer" or not token.strip():
            raise Unauthorized("the router's administration needs a token", hint="Send Authorization: Bearer TOKEN.")
        right = self._right(token.strip())
        if right is Right.NONE:
            raise Unauthorized("the router's administration does not know this token")
        if right not in (needed, Right.ADMINISTER):
            raise Forbidden(f"this token {ONLY[right]} and does nothing else", hint="Use one of admin_tokens.")

    def _right(self, token: str) -> Right:
        known = (right for right, tokens in self._tokens.items() if tokens.label(token) is not None)
        return next(known, Right.NONE)
