"""Progress display on stderr: a bar in a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import threading

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from pipeline.bulk.driver.progress import Progress

_LINE_EVERY_S = 5.0


class Display:
    """A progress display on stderr while the context is open; call it with every update.

    `count_errors` shows the number of errors, for jobs that an error does not end.
    """

    def __init__(self, *, count_errors: bool = True) -> None:
        self._count_errors = count_errors
        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _FactsColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("images", total=None, facts="")
        self._latest: tuple[str, Progress] | None = None
        self._ended = threading.Event()
        self._lines = threading.Thread(target=self._print_lines, name="display", daemon=True)

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._bar.start()
        else:
            self._lines.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._ended.set()
        if self._lines.is_alive():
            self._lines.join()

    def __call__(self, progress: Progress, name: str = "") -> None:
        """Display `progress` from now on; `name` says of what, if a job does several things."""
        self._latest = (name, progress)
        self._bar.update(
            self._task,
            description=name or "images",
            completed=progress.images_done,
            total=progress.images,
            facts=self._facts(progress),
        )

    def _print_lines(self) -> None:
        """Print a line every few seconds, and one at the end."""
        while not self._ended.wait(_LINE_EVERY_S):
            self._print_line()
        self._print_line()

    def _print_line(self) -> None:
        if self._latest is None:
            return
        name, progress = self._latest
        progress.refresh()
        done, total = progress.images_done, progress.images
        counted = f"{name}: " if name else ""
        counted += f"{done} of {total} images ({done / max(1, total):.0%})"
        after = f"after {duration(progress.seconds)}"
        print(f"{counted} {after}, {self._facts(progress)}", file=sys.stderr, flush=True)

    def _facts(self, progress: Progress) -> str:
        left = progress.seconds_left
        facts = [f"{progress.images_per_second:.1f} images/s"]
        if self._count_errors:
            facts.append(f"{progress.errors.total()} errors")
        if progress.wait_fraction is not None:
            facts.append(f"{progress.wait_fraction:.0%} waiting for images")
        return ", ".join([*facts, f"{duration(left)} left" if left is not None else "starting"])


class _FactsColumn(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        return Text(task.fields["facts"])


def duration(seconds: float) -> str:
    """Return `seconds` in readable units: 42 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: int) -> str:
    """Return `count` bytes in readable units: 999 B, 1.5 KB."""
    amount = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
