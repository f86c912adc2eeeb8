"""Untrusted text reaches a terminal and a log as text, and as one line."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from jobs import clean, query
from pipeline.cli.exit import last_line, run_job
from pipeline.cli.sanitize import Formatter

# a color, a window title, CSI as one byte of C1, a line forged, right to left, half a character
HOSTILE = [
    *("\x1b[31m", "\x1b]0;title\x07", "\x9b31m", "\nsegment finished run=forged", "\r"),
    *("\u202e", "\u2066", "\u2028", "\ud800", "\0", "\x7f"),
]


def _is_harmless(text: str) -> bool:
    """One line without anything that is no character of its own; `str.isprintable` is ours not."""
    text.encode()  # no half characters
    return text.isprintable()


@pytest.mark.parametrize("hostile", HOSTILE)
def test_the_last_line_of_a_job_is_one_line_whatever_its_values(
    capsys: pytest.CaptureFixture[str], hostile: str
) -> None:
    assert _is_harmless(last_line("done", {"uri": f"s3://b/{hostile}.jpg"}))

    def fail() -> str:
        raise OSError(f"s3://b/{hostile}x.jpg does not exist")

    assert run_job("segment", fail, expected=(OSError,), interrupted="") == 1
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("segment failed exit=1")
    assert _is_harmless(line)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_log_record_is_one_line_and_a_traceback_keeps_its_lines(hostile: str) -> None:
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "lost %s!", (hostile,), None)
    formatted = Formatter("%(levelname)s %(message)s").format(record)
    assert formatted.startswith("WARNING lost ")
    assert formatted.endswith("!")
    assert _is_harmless(formatted)
    try:
        raise OSError(hostile)
    except OSError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    lines = Formatter("%(message)s").format(record).split("\n")
    assert lines[1].startswith("Traceback")
    assert all(map(_is_harmless, lines))


@pytest.mark.parametrize("job", [clean.main, query.main])
@pytest.mark.parametrize("hostile", ["\x1b[31m", "\x9b31m", "\u202e", "\n", "[red]"])
def test_interactive_jobs_sanitize_the_names_in_their_errors(
    capsys: pytest.CaptureFixture[str], job: Callable[[list[str]], int], hostile: str
) -> None:
    arguments = [f"/nowhere/{hostile}", "select 1"][: 2 if job is query.main else 1]
    assert job(arguments) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "/nowhere/" in line
    assert _is_harmless(line)
    assert "[red]" in line or hostile != "[red]"
