"""`jobs/query.py` as a user runs it: each format is complete and safe to display."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.query import main
from pipeline.results.query import connect
from tests.results.synthetic_runs import image_row, write_run

ROOT = Path(__file__).parents[2]
NASTY = [
    *("=1+1", "+1", "-1", "@x", "\tx", "\rx", "'=1", 'a"b,c\nd', " x ", "", "é☃", "\x1b[2J"),
    *("\x9b2J", "\x7f", "x\u202ey", "[bold]x[/bold]", "a\\b"),
]

Capture = pytest.CaptureFixture[bytes]


@pytest.fixture
def results(tmp_path: Path) -> str:
    """A finished run whose URIs are nasty strings, and whose last mask looks like a formula."""
    place = str(tmp_path / "results")
    rows = [image_row(f"{i}", "a", error=text) for i, text in enumerate(NASTY)]
    rows[-1]["mask"] = b"\xf8\x00\xff"  # +AD/ in base64
    write_run(place, "a", [rows])
    return place


def answer(capsysbinary: Capture, results: str, sql: str, *more: str) -> bytes:
    assert main([results, sql, *more]) == 0
    captured = capsysbinary.readouterr()
    assert captured.err == b""
    return captured.out


def test_json_is_one_array_that_holds_every_value(results: str, capsysbinary: Capture) -> None:
    sql = "SELECT error, mask, confidence FROM images ORDER BY uri::INT"
    out = answer(capsysbinary, results, sql, "--format", "json")
    rows = json.loads(out)
    assert [row["error"] for row in rows] == NASTY
    assert base64.b64decode(rows[-1]["mask"]) == b"\xf8\x00\xff"
    assert {row["confidence"] for row in rows} == {0.3}  # a float32, as short as it is
    assert not set(out.decode()) & set("\x1b\x9b\x7f\u202e")


def test_json_encodes_times_nested_values_decimals_nan_and_null(
    results: str, capsysbinary: Capture
) -> None:
    sql = (
        "SELECT started_at, DATE '2026-02-03' AS day, sum(images) AS n, 1 AS x, 2 AS x, "
        "[{'b': 'a'::BLOB, 'f': 0.1::FLOAT}] AS l, MAP {'k': 1.5} AS m, 'nan'::DOUBLE AS nan, "
        "['-inf'::FLOAT] AS inf, 1.25::DECIMAL(9, 2) AS d, NULL AS z, true AS t, "
        "INTERVAL 3 DAY AS i FROM runs GROUP BY ALL"
    )
    [row] = json.loads(answer(capsysbinary, results, sql, "--format", "json"))
    assert row.pop("i")
    assert row == {
        "started_at": "2026-01-01T12:00:00+00:00",
        "day": "2026-02-03",
        "n": len(NASTY),
        "x": 1,
        "x_1": 2,
        "l": [{"b": "YQ==", "f": 0.1}],
        "m": {"k": 1.5},
        "nan": None,
        "inf": [None],
        "d": 1.25,
        "z": None,
        "t": True,
    }
    nothing = "SELECT * FROM images WHERE false"
    assert json.loads(answer(capsysbinary, results, nothing, "--format", "json")) == []


def test_csv_holds_every_value_and_no_formula(results: str, capsysbinary: Capture) -> None:
    sql = "SELECT uri, error, NULL AS z, mask, -1 AS n FROM images ORDER BY uri::INT"
    out = answer(capsysbinary, results, sql, "--format", "csv").decode()
    header, *rows = csv.reader(io.StringIO(out, newline=""))
    assert header == ["uri", "error", "z", "mask", "n"]
    for (_, error, null, _, number), text in zip(rows, NASTY, strict=True):
        assert error == (f"'{text}" if text[:1] in {"=", "+", "-", "@", "\t", "\r"} else text)
        assert (null, number) == ("", "-1")
    assert base64.b64decode(rows[-1][3]) == b"\xf8\x00\xff"
    assert '\r\n9,"",,' in out  # an empty string is no null


def test_parquet_equals_the_result_of_duckdb(
    results: str, capsysbinary: Capture, tmp_path: Path
) -> None:
    sql = "SELECT * FROM images ORDER BY uri"
    with connect(results) as con:
        expected = con.sql(sql).to_arrow_table()
    piped = answer(capsysbinary, results, sql, "--format", "parquet")
    assert pq.read_table(io.BytesIO(piped)).equals(expected)
    file = tmp_path / "answer.parquet"
    arguments = ("--format", "parquet", "--output", str(file))
    assert answer(capsysbinary, results, sql, *arguments) == b""
    assert file.read_bytes() == piped


def test_a_table_prints_the_size_of_masks_and_no_control_character(
    results: str, capsysbinary: Capture
) -> None:
    out = answer(capsysbinary, results, "SELECT error, mask FROM images").decode()
    assert not {c for c in out if ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or c == "\u202e"} - {"\n"}
    assert "<3 bytes>" in out
    assert r"\x1b[2J" in out
    assert "[bold]x[/bold]" in out
    long = answer(capsysbinary, results, "SELECT repeat('x', 5000) AS a, 1 AS b").decode()
    assert "x" * 5000 in long


def test_a_truncated_table_says_so(results: str, capsysbinary: Capture) -> None:
    out = answer(capsysbinary, results, "SELECT range AS n FROM range(1001)").decode()
    assert "the first 1000 rows" in " ".join(out.split())
    assert " 999 " in out
    assert " 1000 │" not in out


@pytest.mark.process
@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_a_terminal_is_never_sent_a_raw_control_character(results: str, form: str) -> None:
    code, out, err = in_terminal([results, "SELECT error FROM images", "--format", form])
    assert (code, err) == (0, "")
    assert not {c for c in out if ord(c) < 32 or 0x7F <= ord(c) < 0xA0} - {"\n", "\r"}


@pytest.mark.process
def test_parquet_is_refused_by_a_terminal(results: str) -> None:
    code, out, err = in_terminal([results, "SELECT 1", "--format", "parquet"])
    assert (code, out) == (2, "")
    assert err == "parquet cannot be printed to a terminal: give --output, or pipe it\n"


def in_terminal(argv: list[str]) -> tuple[int, str, str]:
    """Exit code, output and errors of the job where standard output is a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "jobs" / "query.py"), *argv]
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    out = b""
    try:
        while data := os.read(ours, 65536):
            out += data
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    _, err = process.communicate()
    return process.returncode, out.decode(), err


@pytest.mark.process
@pytest.mark.parametrize("how", [["-m", "jobs.query"], [str(ROOT / "jobs" / "query.py")]])
def test_a_reader_that_leaves_early_is_no_error(results: str, how: list[str]) -> None:
    sql = "SELECT range AS n FROM range(1000000)"
    command = [sys.executable, *how, results, sql, "--format", "csv"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"n\r\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT * FROM runz", 'Did you mean "runs"?'),
        ("SELECT error('a\nb\x1b') FROM images", "Invalid Input Error: a"),
        ("SELECT * FROM argv", "argv does not exist"),  # our own variables are no tables
    ],
)
def test_an_invalid_query_is_one_line_and_exit_code_1(
    results: str, capsys: pytest.CaptureFixture[str], sql: str, message: str
) -> None:
    assert main([results, sql]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "\x1b" not in error


def test_a_failed_query_leaves_no_partial_file(results: str, tmp_path: Path) -> None:
    file = tmp_path / "answer.csv"
    file.write_bytes(b"earlier")
    late = "SELECT if(range = 500000, error('late'), range) FROM range(1000000)"
    assert main([results, late, "--format", "csv", "--output", str(file)]) == 1
    assert file.read_bytes() == b"earlier"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["answer.csv", "results"]


def test_missing_results_are_one_line_and_exit_code_1(
    prefix: str, capsys: pytest.CaptureFixture[Any]
) -> None:
    assert main([prefix, "SELECT 1"]) == 1
    assert capsys.readouterr() == ("", f"no results at {prefix}; check the URI\n")


@pytest.mark.parametrize("argv", [[], ["x"], ["gs://x", "SELECT 1"], ["x", "y", "--format", "z"]])
def test_invalid_arguments_are_one_line_and_exit_code_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.s3
def test_results_on_s3_can_be_queried(s3_prefix: str, capsysbinary: Capture) -> None:
    write_run(s3_prefix, "a")
    sql = "SELECT run_id, count(*) AS n FROM latest GROUP BY ALL"
    out = answer(capsysbinary, s3_prefix, sql, "--format", "json")
    assert json.loads(out) == [{"run_id": "a", "n": 10}]


SLOW = "SELECT i FROM range(300000000000) t(i) WHERE hash(i) = 42"
"""A query of minutes whose answer is nearly empty."""

SPILLING = (
    "SET memory_limit = '120MB'; SET threads = 2; CREATE TEMP TABLE t AS "
    "SELECT i, hash(i) a, hash(i + 1) b FROM range(12000000) t(i)"
)


class Query:
    """A query in a process of its own, with a folder for what it spills."""

    def __init__(self, tmp_path: Path, *argv: str, patch: str = "") -> None:
        self.spilled = tmp_path / "spilled"
        self.spilled.mkdir()
        code = f"import sys, time; from jobs import query; {patch}\n"
        code += f"query.hard_exit(query.main({list(argv)!r}))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(self.spilled)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # a shell starts background jobs, and so tests, with SIGINT ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def wait_for_its_folder(self) -> None:
        """Wait until the query is about to start."""
        while not list(self.spilled.iterdir()):
            assert self.process.poll() is None
            time.sleep(0.05)

    def check_that_ctrl_c_ends_it(self) -> None:
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(timeout=30) == 1  # by itself it would work for minutes
        assert self.process.stderr is not None
        assert self.process.stderr.read() == b"interrupted\n"
        assert list(self.spilled.iterdir()) == []


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(
    ("patch", "sql"),
    [
        ("query.connect = lambda _: time.sleep(60)", "FROM runs"),  # storage that does not answer
        ("", SLOW),
        ("", "SELECT count(*) FROM range(300000000000) t(i) WHERE i % 7 = 3"),
        ("", "SET threads = 1; SELECT sum(hash(a)) FROM range(300000000000) t(a)"),
        ("", SPILLING.replace("12000000", "900000000")),
    ],
)
def test_ctrl_c_ends_every_part_of_a_query_and_leaves_nothing(
    patch: str, sql: str, results: str, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    output = str(tmp_path / "out" / "a.csv")
    query = Query(tmp_path, results, sql, "--format", "csv", "--output", output, patch=patch)
    query.wait_for_its_folder()
    time.sleep(2)
    query.check_that_ctrl_c_ends_it()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.process
def test_ctrl_c_ends_a_query_that_waits_for_a_reader(results: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    query = Query(tmp_path, results, "FROM runs", "--output", str(tmp_path / "pipe"))
    query.wait_for_its_folder()
    time.sleep(1)
    query.check_that_ctrl_c_ends_it()


@pytest.mark.process
@pytest.mark.parametrize("more", [(), ("--output", "/dev/stdout")])
@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_ctrl_c_ends_a_query_whose_reader_has_stopped_reading(
    results: str, tmp_path: Path, format: str, more: tuple[str, ...]
) -> None:
    sql = "SELECT i, hash(i) FROM range(30000000) t(i)"
    query = Query(tmp_path, results, sql, "--format", format, *more)
    assert query.process.stdout is not None
    assert query.process.stdout.read(1)
    time.sleep(0.5)  # and the pipe is full
    query.check_that_ctrl_c_ends_it()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "; SELECT error('late') FROM t"])
def test_spilled_files_are_deleted_with_the_query(
    end: str, results: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spilled").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spilled"))
    seen: list[Path] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            seen.extend((tmp_path / "spilled").rglob("duckdb*/*"))

    with ThreadPoolExecutor() as watching:
        watching.submit(watch)
        try:
            assert main([results, SPILLING + end, "--output", str(tmp_path / "out")]) == bool(end)
        finally:
            ended.set()
    assert seen
    assert list((tmp_path / "spilled").iterdir()) == []
