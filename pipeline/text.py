"""Text on one line: errors and lists of names, as logs, tables and messages quote them."""

from __future__ import annotations

from collections.abc import Sequence

MAX_CHARACTERS = 300


def one_line(text: object, limit: int = MAX_CHARACTERS) -> str:
    """Return all of `text` on one line of printable characters, cut after `limit` of them."""
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def first_line(error: BaseException, limit: int = MAX_CHARACTERS) -> str:
    """Return the first line of an error's message, or its class where the message is empty."""
    lines = str(error).strip().splitlines()
    return one_line(lines[0] if lines else type(error).__name__, limit)


def last_line(error: BaseException, limit: int = MAX_CHARACTERS) -> str:
    """Return the last line of an error's message: the cause, where it quotes a traceback."""
    lines = str(error).strip().splitlines()
    return one_line(lines[-1] if lines else type(error).__name__, limit)


def first_names(names: Sequence[str], limit: int = 3) -> str:
    """Return the first names, comma-separated, and the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(name[:100] for name in names[:limit]) + more
