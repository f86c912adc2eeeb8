"""Measurements of a driver's steps, each in its own process, and tables of them."""

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
    """Run the step in this process; return minutes, CPU minutes and peak memory in MiB."""
    started, cpu = time.monotonic(), time.process_time()
    step()
    return {
        "minutes": (time.monotonic() - started) / 60,
        "cpu_minutes": (time.process_time() - cpu) / 60,
        "peak_mib": kib_of("VmHWM") / 2**10,
    }


def kib_of(name: str, process: int | str = "self") -> int:
    """Return VmHWM (the peak) or VmRSS of a process, in KiB.

    The peak of getrusage does not work: it includes the time before exec.
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
        except FileNotFoundError:  # deleted in the meantime
            continue


def print_table(columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Print the rows as a Markdown table as they arrive; missing cells are empty."""
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        shown = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells)
        print("| " + " | ".join(shown) + " |", flush=True)
