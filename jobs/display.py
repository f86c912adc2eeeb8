"""How far a job is, for a person at a terminal or for a log: a bar, or a line every few seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from pipeline.bulk.plan import Plan
from pipeline.bulk.progress import Progress

_LINE_EVERY_S = 5.0


class Display:
    """Shows a bulk run's progress on stderr while it is entered; call it after every shard."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Facts(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("images", total=None, facts="")
        self._last_line = float("-inf")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def __call__(self, plan: Plan, progress: Progress) -> None:
        if self._console.is_terminal:
            done, total = progress.images_done, progress.images
            self._bar.update(self._task, completed=done, total=total, facts=_facts(progress))
            return
        is_last = progress.images_done >= progress.images
        if is_last or time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            share = progress.images_done / max(1, progress.images)
            counted = f"{progress.images_done} of {progress.images} images ({share:.0%})"
            print(f"{counted}, {_facts(progress)}", file=sys.stderr, flush=True)


class _Facts(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        return Text(task.fields["facts"])


def _facts(progress: Progress) -> str:
    left = progress.seconds_left
    return ", ".join(
        [
            f"{progress.images_per_second:.1f} images/s",
            f"{progress.errors.total()} errors",
            "time left not known yet" if left is None else f"{duration(left)} left",
        ]
    )


def duration(seconds: float) -> str:
    """`seconds` as a person says it: 42 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: int) -> str:
    """`count` bytes as a person says it."""
    amount = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
