"""Text that nobody vouches for (keys of a bucket, errors about them) on its way to a terminal."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

# C0 and C1, DEL, the separators of lines, lone surrogates, and what turns the direction of text
_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    """The text with control characters spelled out, so that it cannot steer a terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def in_one_line(error: Exception) -> str:
    """What went wrong, without DuckDB's drawing of a query or a traceback of the storage."""
    lines = str(error).split("\n\nLINE ")[0].splitlines()
    said = " ".join(line for line in lines if line and not line.startswith((" ", "Traceback")))
    return visible(said)[:400] or type(error).__name__


def json_text(value: Any, *, allow_nan: bool = True) -> str:
    """The value as JSON without raw control characters.

    Raises ValueError at NaN and infinities without `allow_nan`.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=allow_nan)
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class Formatter(logging.Formatter):
    """Log records whose message is one visible line; a traceback keeps its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return visible(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return "\n".join(map(visible, super().formatException(ei).split("\n")))
