"""Exit codes of jobs, even if native libraries crash at exit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from pipeline.cli.exit import failed, run_interactive

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
def test_a_library_that_crashes_at_exit_would_change_the_exit_code() -> None:
    assert ended("sys.exit(0)").returncode < 0


@pytest.mark.process
@pytest.mark.parametrize("code", [0, 1])
def test_hard_exit_keeps_the_exit_code_the_output_and_the_cleanup(
    code: int,
) -> None:
    done = ended(f"hard_exit({code})")
    assert done.returncode == code, done.stderr
    folder, tidied = done.stdout.splitlines()
    assert tidied == "tidied up"
    assert subprocess.run(["test", "-e", folder], check=False).returncode == 1


def test_a_failed_interactive_job_prints_one_line(
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


@pytest.mark.process
@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_exit_code_does_not_depend_on_whether_stdout_can_be_written(code: int) -> None:
    work = (
        "from pipeline.cli.exit import hard_exit, run_job\n"
        "def work():\n"
        f"    if {code}: raise [OSError, ValueError][{code} - 1]('refused')\n"
        "    return 'done'\n"
        "hard_exit(run_job('segment', work, expected=(OSError,), interrupted=''))"
    )
    reading, closed_pipe = os.pipe()
    os.close(reading)
    for stdout in (os.open("/dev/full", os.O_WRONLY), closed_pipe):
        command = [sys.executable, "-c", work]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, check=False)
        os.close(stdout)
        assert (done.returncode, done.stderr) == (code, b"")


def test_the_last_line_keeps_the_way_out_at_the_end_of_a_long_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert failed("segment", 1, f"s3://b/{'k' * 1000}.parquet is corrupt; delete it") == 1
    assert capsys.readouterr().out.endswith('.parquet is corrupt; delete it"\n')
