"""`jobs/clean.py` as a user runs it: what it prints, its exit code, what it leaves."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.clean import main
from pipeline.data import storage
from pipeline.results.layout import RunLayout
from pipeline.runs import lease
from tests.results.synthetic_runs import write_run

ROOT = Path(__file__).parents[2]

Capture = pytest.CaptureFixture[str]


def names(results: str) -> set[str]:
    return {storage.relative(results, item.uri) for item in storage.list_objects(results)}


def test_a_dry_run_lists_what_would_be_deleted_and_deletes_nothing(
    prefix: str, capsys: Capture
) -> None:
    write_run(prefix, "a")
    before = names(prefix)
    assert main([prefix, "--run-id", "a", "--dry-run"]) == 0
    assert names(prefix) == before
    would = capsys.readouterr().out.splitlines()
    assert main([prefix, "--run-id", "a"]) == 0
    assert names(prefix) == set()
    did = capsys.readouterr().out.splitlines()
    assert would[:-1] == did[:-1]
    assert would[-1] == did[-1].replace("deleted", "would delete")
    images = sum(name.startswith("images/") for name in before)
    assert any(line.split()[:3] == ["images", str(images), "objects"] for line in did)
    assert did[-1].startswith(f"deleted run a below {prefix}: {len(before)} objects, ")


def test_without_a_run_id_only_leftovers_are_deleted(prefix: str, capsys: Capture) -> None:
    write_run(prefix, "a")
    before = names(prefix)
    storage.write(RunLayout(results=prefix, run_id="a").lease, b"12345")
    assert main([prefix]) == 0
    assert names(prefix) == before
    assert capsys.readouterr().out.splitlines()[-1].endswith(": 1 objects, 5 bytes")
    assert main([prefix]) == 0
    assert capsys.readouterr().out.endswith(": 0 objects, 0 bytes\n")


def test_a_missing_or_active_run_is_one_line_and_exit_code_1(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.2)
    results = str(tmp_path)
    write_run(results, "a", finished=False)
    assert main([results, "--run-id", "b"]) == 1
    assert capsys.readouterr() == ("", f"there is no run b under {results}\n")
    with lease.hold(RunLayout(results=results, run_id="a").lease, "a"):
        before = names(results)
        assert main([results, "--run-id", "a"]) == 1
        assert names(results) == before
    printed = capsys.readouterr().err
    assert printed.startswith(f"run a is being worked on by {socket.gethostname()}:{os.getpid()}")
    assert printed.endswith("; stop it before you delete the run\n")
    assert printed.count("\n") == 1


@pytest.mark.process
def test_a_lease_being_watched_is_logged(tmp_path: Path) -> None:
    write_run(str(tmp_path), "a", finished=False)
    silent = {"run_id": "a", "host": "node7", "pid": 42}
    storage.write(RunLayout(results=str(tmp_path), run_id="a").lease, json.dumps(silent).encode())
    code = (
        "import sys; from jobs.clean import main; from pipeline.runs import lease; "
        "lease.STALE_S = 1.0; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, str(tmp_path), "--run-id", "a"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == (
        "WARNING run a is being worked on by node7:42; watching it for 1 s for a heartbeat\n"
    )
    assert names(str(tmp_path)) == set()


@pytest.mark.parametrize("argv", [[], ["x", "--run-id", "../x"], ["gs://x"], ["x", "--runs"]])
def test_invalid_arguments_are_one_line_and_exit_code_2(argv: list[str], capsys: Capture) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err.count("\n") == 1
