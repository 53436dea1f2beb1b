"""Finding the model in a multipart form while its bytes pass by: a scanner that keeps only the fields it looks for.

It is driven by python-multipart, the parser that vLLM's server uses too, so both read a form alike. A form whose
``model`` comes twice is refused: which one counts would be a matter of taste.
"""

from __future__ import annotations

from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from router import errors
from router.relay.fields import BOOTSTRAP, TRANSFER, check_extra

FIELD_MAX: Final = 65536
"""Longest value of a field that is looked at, in bytes."""
PARTS_MAX: Final = 1000
"""Most parts of a form, as in vLLM's server."""
_REFUSED: Final = (*TRANSFER, *BOOTSTRAP)
_WANTED: Final = ("model", "vllm_xargs", *_REFUSED)


class FormScan:
    """Scans one form. Feed it all bytes, then call ``finish``; both raise ApiError (400) for a malformed form."""

    def __init__(self, content_type: bytes) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise errors.invalid_body(
                "This route takes a multipart form: Content-Type must be multipart/form-data with a boundary.",
                "invalid_content_type",
            )
        self._values: dict[str, bytes] = {}
        self._parts = 0
        self._wanted: str | None = None
        self._value = bytearray()
        self._name, self._content = bytearray(), bytearray()
        self._disposition = b""
        self._complete = False
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._part_begin,
                    "on_header_field": self._header_name,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._part_data,
                    "on_part_end": self._part_end,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise errors.invalid_body(f"The form's boundary is wrong: {error}.", "invalid_form") from None

    def feed(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise errors.invalid_body(f"The form is malformed: {error}.", "invalid_form") from None

    def finish(self) -> str | None:
        """The value of the form's ``model``, or None."""
        if not self._complete:
            raise errors.invalid_body("The form ends before its closing boundary.", "invalid_form")
        for name in _REFUSED:
            if name in self._values:
                raise errors.forbidden_field(name)
        if "vllm_xargs" in self._values:
            check_extra(self._values["vllm_xargs"], "vllm_xargs.")
        if "model" not in self._values:
            return None
        try:
            return self._values["model"].decode()
        except UnicodeDecodeError:
            raise errors.invalid_body("The field 'model' is not UTF-8.", "invalid_type", "model") from None

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > PARTS_MAX:
            raise errors.invalid_body(f"The form has more than {PARTS_MAX} parts.", "invalid_form")
        self._disposition = b""

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._content += data[start:end]

    def _header_end(self) -> None:
        if bytes(self._name).lower() == b"content-disposition":
            self._disposition = bytes(self._content)
        self._name.clear()
        self._content.clear()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("latin-1")
        self._wanted = name if name in _WANTED and b"filename" not in options else None
        self._value.clear()
        if self._wanted in self._values:
            raise errors.invalid_body(f"The form has the field {name!r} twice.", "invalid_form", name)

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._wanted is not None:
            self._value += data[start:end]
            if len(self._value) > FIELD_MAX:
                raise errors.invalid_body(f"The field {self._wanted!r} is too long.", "invalid_form", self._wanted)

    def _part_end(self) -> None:
        if self._wanted is not None:
            self._values[self._wanted] = bytes(self._value)

    def _end(self) -> None:
        self._complete = True
