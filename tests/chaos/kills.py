"""Kill processes at named stages: a file arms a kill, and the first process there claims it.

`hooks/sitecustomize.py` is the counterpart in the processes of the run.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PLACES = ("begin", "amid", "end")
HOOKS = Path(__file__).with_name("hooks")

_POLL_S = 0.002
_AMID_S = 0.02  # a kill `amid` a stage comes at most this long after its start


def hooked(folder: Path) -> dict[str, str]:
    """Return the environment variables that make Python processes look for faults in `folder`."""
    path = os.pathsep.join(filter(None, [str(HOOKS), os.environ.get("PYTHONPATH")]))
    return {"FAULTS": str(folder), "PYTHONPATH": path}


@dataclass(frozen=True)
class Hit:
    """A kill that hit a live process in the stage."""

    stage: str
    place: str
    pid: int
    victim: str  # command line of the killed process


class Killer:
    """Kills processes at the stages it arms; `folder` is that of $FAULTS, and is emptied first."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.hits: list[Hit] = []
        self._random = random.Random(seed)
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("armed", "claimed"):
            (folder / name).mkdir(parents=True)

    def kill(
        self,
        stage: str,
        *,
        place: str | None = None,
        victim: Callable[[int], int] | None = None,
        within_s: float = 240.0,
        alive: Callable[[], bool] = lambda: True,
    ) -> Hit:
        """Kill the next process in `stage`, or the one whose id `victim` returns for its id.

        `place` is random by default; the process waits in the stage for the kill. Raises
        TimeoutError if no process reaches it within `within_s`, or while `alive()` is true.
        """
        where = place or self._random.choice(PLACES)
        time.sleep(self._random.uniform(0, 0.3))
        pid = self._claim(stage, where, time.monotonic() + within_s, alive)
        if where == "amid":
            time.sleep(self._random.uniform(0, _AMID_S))
        self.hits.append(self._hit(stage, where, pid, victim))
        return self.hits[-1]

    def _claim(self, stage: str, place: str, deadline: float, alive: Callable[[], bool]) -> int:
        armed = self.folder / "armed" / f"{stage}.{place}"
        armed.touch()
        while time.monotonic() < deadline and alive():
            for claim in self.folder.glob(f"claimed/{stage}.{place}.*"):
                return int(claim.suffix[1:])
            time.sleep(_POLL_S)
        armed.unlink(missing_ok=True)
        raise TimeoutError(f"no process reached {stage}.{place}")

    def _hit(self, stage: str, place: str, pid: int, victim: Callable[[int], int] | None) -> Hit:
        target = victim(pid) if victim else pid
        name = _name(target)
        os.kill(target, signal.SIGKILL)
        _wait_for_death(target)
        (self.folder / "claimed" / f"{stage}.{place}.{pid}").unlink()
        return Hit(stage, place, pid, name)


def _name(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return " ".join(words)[:200]


def _wait_for_death(pid: int, within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
        time.sleep(_POLL_S)
    raise TimeoutError(f"process {pid} is still alive after {within_s:g} s")
