"""The end of a job's process: its exit code, whatever native libraries do behind its back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from pipeline.cli.exit import run_interactive

CRASHES = """
import atexit, ctypes, sys, tempfile
from pipeline.cli.exit import hard_exit

libc = ctypes.CDLL(None)
libc.on_exit(libc.abort, None)  # as a library's destructor that does not get through
atexit.register(print, "tidied up")
folder = tempfile.TemporaryDirectory()
print(folder.name)
"""


def ended(by: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CRASHES + by]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.process
def test_a_library_that_crashes_at_the_end_would_take_the_exit_code() -> None:
    assert ended("sys.exit(0)").returncode < 0


@pytest.mark.process
@pytest.mark.parametrize("code", [0, 1])
def test_the_exit_code_is_the_jobs_and_nothing_said_or_tidied_up_is_lost(
    code: int,
) -> None:
    done = ended(f"hard_exit({code})")
    assert done.returncode == code, done.stderr
    folder, tidied = done.stdout.splitlines()
    assert tidied == "tidied up"
    assert subprocess.run(["test", "-e", folder], check=False).returncode == 1


def test_what_a_person_asked_for_ends_in_a_line_where_it_could_not_be_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused() -> int:
        raise ValueError("--images -1:\nmust be at least 0")

    def does(error: BaseException) -> Callable[[int], None]:
        def work(_: int) -> None:
            raise error

        return work

    expected = (LookupError,)
    assert run_interactive(refused, lambda _: None, expected=expected) == 2
    assert capsys.readouterr() == ("", "--images -1: must be at least 0\n")
    assert run_interactive(lambda: 1, does(LookupError("no \x1b run")), expected=expected) == 1
    assert capsys.readouterr() == ("", "no \\x1b run\n")
    assert run_interactive(lambda: 1, does(KeyboardInterrupt()), expected=expected) == 1
    assert capsys.readouterr() == ("", "interrupted\n")
    assert run_interactive(lambda: 1, lambda _: None, expected=expected) == 0
    with pytest.raises(TypeError):
        run_interactive(lambda: 1, does(TypeError()), expected=expected)
