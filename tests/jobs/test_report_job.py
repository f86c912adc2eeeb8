"""`jobs/report.py` as a user runs it: the file it writes, its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.report import main
from pipeline.data import storage
from tests.results.synthetic_runs import write_run

Capture = pytest.CaptureFixture[str]


def test_a_report_is_one_file_at_the_given_path(prefix: str, capsys: Capture) -> None:
    write_run(prefix, "a", hour=1)
    write_run(prefix, "b")
    out = storage.join(prefix, "pages/report.html")
    assert main([prefix, "--out", out, "--images", "0"]) == 0
    assert capsys.readouterr().out.startswith(f"{out} shows run a (")
    assert b"<title>Run a</title>" in storage.read(out)
    assert main([prefix, "--run-id", "b", "--out", out, "--images", "0"]) == 0
    assert b"<title>Run b</title>" in storage.read(out)


def test_an_impossible_report_is_one_line(prefix: str, tmp_path: Path, capsys: Capture) -> None:
    for _ in range(2):
        assert main([prefix]) == 1
        assert capsys.readouterr().err.startswith(f"no finished run with images at {prefix};")
        write_run(prefix, "a", finished=False)
    assert main([prefix, "--run-id", "b"]) == 1
    assert capsys.readouterr().err.startswith(f"run b has no images at {prefix}: ")
    wrong_ones = ["--images", "-1"], ["--images", "501"], ["--run-id", "../b"], ["--size", "3"]
    for wrong in (*wrong_ones, ["--out", "gs://b/x"], ["--out", str(tmp_path)]):
        assert main([prefix, *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
