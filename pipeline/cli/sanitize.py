"""Sanitizing of untrusted text (object keys, errors about them) before it reaches a terminal."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

# C0 and C1, DEL, line separators, lone surrogates, and characters that change text direction
_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Return the text with control characters escaped, so that it cannot control a terminal."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def in_one_line(error: Exception) -> str:
    """Return the message without DuckDB's excerpt of the query or a traceback of the storage."""
    lines = str(error).split("\n\nLINE ")[0].splitlines()
    message = " ".join(line for line in lines if line and not line.startswith((" ", "Traceback")))
    return visible(message)[:400] or type(error).__name__


def json_text(value: Any, *, allow_nan: bool = True) -> str:
    """Return the value as JSON without raw control characters.

    Raises ValueError for NaN and infinities unless `allow_nan`.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=allow_nan)
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class Formatter(logging.Formatter):
    """A formatter that writes a message as one sanitized line, and a traceback line by line."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return visible(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return "\n".join(map(visible, super().formatException(ei).split("\n")))
