"""Training on two nodes that exchange gradients over a network, and elastic training."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pipeline.data import storage
from pipeline.train.worker import checkpoints
from tests.cluster.several_nodes import ROOT, World, timed, until
from tests.tiny_training import arguments, write_dataset

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(900)]

PREFIX = "s3://sets/tiny"
WORKER = "TrainWorker"  # what Ray Train's actors are called
STEPS = 150
ELASTIC_STEPS = 600  # Ray Train asks once a minute whether there is room for more workers


def _arguments(run: str, *more: str, steps: int = STEPS) -> list[str]:
    how = ["--max-steps", str(steps), "--checkpoint-every", "5", "--eval-every", "0"]
    return arguments(PREFIX, *how, "--workers", "2", *more, out=f"{PREFIX}/{run}")


@pytest.fixture(scope="module")
def single_machine(world: World) -> bytes:
    """The network that two workers of one machine train."""
    write_dataset(f"{PREFIX}/set")
    command = [sys.executable, "jobs/train.py", *_arguments("alone")]
    environment = {**os.environ, "DEEPLAB_CACHE": str(world.folder / "cache")}
    for _ in range(3):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if "did not start on this machine" not in done.stdout:  # Ray gives a busy machine 30 s
            break
    assert done.returncode == 0, done.stdout + done.stderr
    return storage.read(f"{PREFIX}/alone/model.safetensors")


def test_two_nodes_train_the_weights_of_one_machine(world: World, single_machine: bytes) -> None:
    world.need(2)
    with timed("train (gloo)", "2", "steps") as scenario:
        job = world.submit("train", "jobs/train.py", *_arguments("two"))
        until(lambda: len(world.at_work(WORKER)) == 2, job)
        assert job.wait() == 0, job.log
    scenario.expected, scenario.found = STEPS, _steps("two")
    assert f"train finished steps={STEPS} " in job.log
    assert storage.read(f"{PREFIX}/two/model.safetensors") == single_machine


def test_a_preempted_node_costs_a_few_steps_and_changes_no_weight(
    world: World, single_machine: bytes
) -> None:
    world.need(3)
    with timed(
        "train, node preempted (SIGTERM, gone after 30 s)", "3, then 2", "steps"
    ) as scenario:
        job = world.submit("train-preempted", "jobs/train.py", *_arguments("preempted"))
        until(lambda: _steps("preempted") >= 5 and len(world.at_work(WORKER)) == 2, job)
        world.cluster.preempt(max(world.at_work(WORKER)))
        assert job.wait() == 0, job.log
    scenario.expected, scenario.found = STEPS, _steps("preempted")
    assert storage.read(f"{PREFIX}/preempted/model.safetensors") == single_machine


def test_an_elastic_run_uses_an_added_node_and_continues_without_it(
    world: World, single_machine: bytes
) -> None:
    world.need(1)
    name = "train --workers 1 2, a node added, then dropped"
    with timed(name, "1, 2, then 1", "steps") as scenario:
        command = _arguments("elastic", "--workers", "1", "2", steps=ELASTIC_STEPS)
        job = world.submit("train-elastic", "jobs/train.py", *command)
        until(lambda: _steps("elastic") >= 5, job)
        assert len(world.at_work(WORKER)) == 1

        added = world.cluster.add()
        until(lambda: len(world.at_work(WORKER)) == 2, job)
        shared = _steps("elastic")
        until(lambda: _steps("elastic") > shared, job)

        world.cluster.drop(added)
        assert job.wait() == 0, job.log
    scenario.expected, scenario.found = ELASTIC_STEPS, _steps("elastic")
    assert f"train finished steps={ELASTIC_STEPS} " in job.log


def _steps(run: str) -> int:
    return checkpoints.newest_step(f"{PREFIX}/{run}")
