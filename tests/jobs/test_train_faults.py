"""Training whose worker or driver is killed resumes as if it had not been."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from cluster.local import with_descendants
from jobs.train import main
from pipeline.data import storage
from pipeline.train.worker import checkpoints
from tests.tiny_training import arguments, list_etags, write_dataset

ROOT = Path(__file__).parents[2]

STEPS = ("--max-steps", "40", "--checkpoint-every", "5", "--eval-every", "0", "--loaders", "1")
"""On one thread the results of a worker are bit-identical, and so is the sum of two."""

WAIT_S = 120.0

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@contextlib.contextmanager
def driver(given: list[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """Start `jobs/train.py` with a Ray of its own and its output in `log`."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "jobs/train.py", *given], cwd=ROOT, stdout=file, stderr=file, text=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(done: Callable[[], bool], process: subprocess.Popen[str], log: Path) -> None:
    """Wait while the driver runs."""
    started = time.monotonic()
    while not done():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() - started < WAIT_S, log.read_text()
        time.sleep(0.05)


def descendants(pid: int) -> dict[int, str]:
    """Return the descendants of the process: process id and start time."""
    found = {each: state_of(each)[1] for each in with_descendants(pid)[1:]}
    return {each: began for each, began in found.items() if began}


def state_of(pid: int) -> tuple[str, str]:
    """Return state and start time of the process from /proc; empty if it has ended."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    return "", ""


def alive(processes: dict[int, str]) -> list[str]:
    """Return the command lines of those still running; zombies do not count."""
    states = {pid: state_of(pid) for pid in processes}
    return [
        command_line(pid)
        for pid, (state, began) in states.items()
        if state != "Z" and began == processes[pid]
    ]


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def trainers(pid: int) -> dict[int, str]:
    """The processes that train or read images; Ray's own take some time to end."""
    ours = ("RayTrainWorker", "multiprocessing")
    return {
        each: began
        for each, began in descendants(pid).items()
        if any(name in command_line(each) for name in ours)
    }


def workers(pid: int) -> list[int]:
    """The processes that train, of the driver `pid`."""
    return [each for each in descendants(pid) if "RayTrainWorker" in command_line(each)]


class Undisturbed(NamedTuple):
    """An undisturbed run below `root`, with the images it was trained on."""

    root: Path
    workers: int

    def arguments(self, out: str | None = None) -> list[str]:
        return arguments(str(self.root), *STEPS, "--workers", str(self.workers), out=out)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(1, id="one_worker"),
        pytest.param(2, id="two_workers", marks=pytest.mark.chaos),
    ],
)
def undisturbed(
    request: pytest.FixtureRequest, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> Undisturbed:
    run = Undisturbed(tmp_path_factory.mktemp("undisturbed"), request.param)
    write_dataset(f"{run.root}/set")
    assert main(run.arguments()) == 0
    return run


def test_a_killed_and_resumed_run_ends_with_the_weights_of_an_undisturbed_one(
    undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = undisturbed.arguments(out=f"{tmp_path}/out")
    out, log = str(tmp_path / "out"), tmp_path / "log.txt"
    with driver(given, log) as process:
        until(lambda: checkpoints.newest_step(out) >= 5, process, log)
        first = workers(process.pid)
        assert len(first) == undisturbed.workers
        os.kill(first[-1], signal.SIGKILL)
        newest = checkpoints.newest_step(out)
        # the whole group restarts
        until(lambda: not set(first) & set(workers(process.pid)), process, log)
        until(lambda: checkpoints.newest_step(out) > newest + 5, process, log)
        started = trainers(process.pid)
        assert any("forkserver" in line for line in alive(started))  # reads images
        process.kill()
        process.wait()
        assert checkpoints.newest_step(out) < 40
        deadline = time.monotonic() + 30
        while alive(started) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert alive(started) == []
    torn = f"{out}/checkpoints/step-00000039/state.safetensors"
    storage.write(torn, storage.read(newest_state(out))[:-1000])  # a server that lost the end
    assert main(given) == 0
    captured = capsys.readouterr()
    assert "resuming after step" in captured.out
    assert "Traceback" not in captured.err
    assert_the_same(out, f"{undisturbed.root}/out")
    assert "lease.json" not in list_etags(out)


def assert_the_same(out: str, other: str) -> None:
    """Assert that both runs ended with the same networks, optimizers and losses, bit for bit."""
    for name in ("model.safetensors", "best.safetensors"):
        assert storage.read(f"{out}/{name}") == storage.read(f"{other}/{name}"), name
    initial = storage.read(f"{other}/initial.safetensors")
    assert initial != storage.read(f"{other}/model.safetensors")
    mine, theirs = checkpoints.latest(out), checkpoints.latest(other)
    assert mine is not None
    assert theirs is not None
    assert mine.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(mine.tensors[name], theirs.tensors[name]) for name in mine.tensors)
    losses = [[each.loss for each in run.history.steps[-2:]] for run in (mine, theirs)]
    assert losses[0] == losses[1]


def newest_state(out: str) -> str:
    step = checkpoints.newest_step(out)
    return f"{out}/checkpoints/{checkpoints.folder_name(step)}/state.safetensors"


def test_an_interrupted_driver_prints_how_to_resume_and_releases_its_lease(tmp_path: Path) -> None:
    write_dataset(f"{tmp_path}/set")
    log = tmp_path / "log.txt"
    given = arguments(str(tmp_path), "--max-steps", "2000", "--checkpoint-every", "5")
    with driver(given, log) as process:
        until(lambda: checkpoints.newest_step(f"{tmp_path}/out") >= 5, process, log)
        started = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 1, log.read_text()
    printed = log.read_text()
    assert printed.splitlines()[-1].startswith('train failed exit=1 reason="interrupted; the same')
    assert "Traceback" not in printed
    assert "lease.json" not in list_etags(f"{tmp_path}/out")
    deadline = time.monotonic() + 30
    while alive(started) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert alive(started) == []
