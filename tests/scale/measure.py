"""Measures a step of a driver in a process of its own, and prints tables of such measurements."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ROOT = Path(__file__).parents[2]


def taken(step: Callable[[], object]) -> Row:
    """Does the step in this process: minutes, CPU minutes, and the process's peak in MiB."""
    started, cpu = time.monotonic(), time.process_time()
    step()
    return {
        "minutes": (time.monotonic() - started) / 60,
        "cpu_minutes": (time.process_time() - cpu) / 60,
        "peak_mib": kib_of("VmHWM") / 2**10,
    }


def kib_of(name: str, process: int | str = "self") -> int:
    """VmHWM (the peak) or VmRSS of a process, in KiB.

    getrusage's figure will not do: it holds that of the process before exec too.
    """
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def in_a_process(module: str, *arguments: str) -> Row:
    """Run a module; return the JSON it prints and its peak of temporary files in MiB."""
    disk = 0
    with tempfile.TemporaryDirectory() as folder:
        command = ["nice", "-n", "10", sys.executable, "-m", module, *arguments]
        environment = {**os.environ, "TMPDIR": folder}
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE
        ) as process:
            while process.poll() is None:
                disk = max(disk, sum(_sizes(Path(folder))))
                time.sleep(0.1)
            assert process.stdout is not None
            found: Row = json.loads(process.stdout.read().splitlines()[-1])
    return {**found, "disk_mib": disk / 2**20}


def _sizes(folder: Path) -> Iterator[int]:
    for file in folder.rglob("*"):
        try:
            yield file.stat().st_size
        except FileNotFoundError:  # gone in between
            continue


def print_table(columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Prints the rows as they come, as Markdown; cells that a row lacks are empty."""
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        shown = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells)
        print("| " + " | ".join(shown) + " |", flush=True)
