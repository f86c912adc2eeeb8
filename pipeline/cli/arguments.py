"""Command lines become settings; what is wrong with one is said in one line."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import TypeVar

import tyro

T = TypeVar("T")


class ArgumentsError(ValueError):
    """The command line cannot be right; the message is one line."""


def parse(kind: type[T], argv: Sequence[str] | None, *, description: str | None) -> T:
    """A `kind` made of the command line `argv` (the process's own by default).

    Nested settings have no prefix in their flags. Raises ArgumentsError; `--help` prints and
    raises SystemExit(0).
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind, args=argv, description=description, config=(tyro.conf.OmitArgPrefixes,)
            )
    except SystemExit as ended:
        if ended.code in (0, None):
            raise
        program = f"{sys.argv[0]} " if argv is None else ""
        raise ArgumentsError(f"{_one_line(said.getvalue())}; see {program}--help") from None


def _one_line(box: str) -> str:
    """What tyro says in a box, up to its first inner rule, without frame, title and flags' help.

    The frame is of lines where the terminal can show them, of dashes and blanks elsewhere.
    """
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()]
    is_rule = [re.match(r"[─-]{5}", line) is not None for line in lines]
    first = 2 if len(lines) > 1 and is_rule[1] else 1
    last = is_rule.index(True, first) if True in is_rule[first:] else len(lines)
    said = lines[first:last]
    if said and said[0].startswith("Missing from"):
        names = [line.split()[0] for line in said if line.startswith("--") or line.isupper()]
        return f"missing: {', '.join(names)}"
    return re.sub(r"^Error parsing \w+: ", "", " ".join(" ".join(said).split()))
