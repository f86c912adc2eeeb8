"""What every worker of a training run does, from its start or from where the last one stopped.

Enters: a `Task`, the same for all workers, and the worker's `Group`. Leaves: checkpoints, scores
and the finished network below the task's `out`. Invariant: workers end together. One that cannot
go on says so in a sum that all of them take before each step, so none waits for it in vain.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Protocol

import torch

from pipeline.data.samples import BrokenFileError, SampleError
from pipeline.evaluation.evaluate import Evaluation, evaluate, worker_indices
from pipeline.evaluation.score import Score
from pipeline.model import weights
from pipeline.model.deeplab import DeepLabV3
from pipeline.train.worker import batch_norm, checkpoints, state
from pipeline.train.worker.distributed import ProcessGroup
from pipeline.train.worker.export import export_run, write_history
from pipeline.train.worker.history import Step
from pipeline.train.worker.loader import Batch, batches
from pipeline.train.worker.state import TrainingState
from pipeline.train.worker.task import (
    WorkerSpec,
    build_loader_config,
    build_state,
    build_trainer,
    check_paths_visible,
    node_cache,
)

HISTORY_EVERY = 10
"""Steps between two rows of the history."""

_OTHER_FILES = "; with other photos or labels it is another run: give that a new --out"

logger = logging.getLogger(__name__)


class Listener(Protocol):
    """Who is told how a run goes, by the first worker, and by the one that failed why.

    `heartbeat` says that a long evaluation gets on.
    """

    def started(self, workers: int, best: Score | None) -> None: ...
    def heartbeat(self) -> None: ...
    def report_step(self, row: Step, scored: Score | None) -> None: ...
    def fail(self, message: str) -> None: ...


def train(task: WorkerSpec, group: ProcessGroup, listener: Listener) -> None:
    """Trains until the experiment's last step, or until a worker tells `listener` why it cannot."""
    torch.set_num_threads(task.threads)
    if _someone_failed(check_paths_visible(task), group, listener):
        return
    run = _TrainingRun(task, group, listener)
    if run.trains():
        run.ends()


class _TrainingRun:
    """One worker's run, between two deaths."""

    def __init__(self, task: WorkerSpec, group: ProcessGroup, listener: Listener) -> None:
        self._task, self._group, self._listener = task, group, listener
        self._read = node_cache(task.train, task.val, max_bytes=task.cache_bytes)
        if not self._read.fits:
            logger.warning(
                "the photos take more than --cache-gb %g: every epoch downloads the others again",
                task.cache_bytes / 1e9,
            )
        self._state = restore_state(task, group)
        self._stepper = build_trainer(task, self._state, group)
        self._window = _ThroughputMeter(self._state.step, task.experiment.optimizer.batch_size)
        self._best: bytes | None = None  # to be put with the next checkpoint
        if group.is_main:
            self._remake_best()
            listener.started(group.world_size, self._state.history.best)

    def trains(self) -> bool:
        """Whether all steps are done now."""
        config = self._task.experiment.optimizer
        source = build_loader_config(
            self._task, rank=self._group.rank, world_size=self._group.world_size
        )
        start = self._state.step
        for batch in batches(source, start, config.max_steps, loaders=self._task.loaders):
            if not self._step(batch) or not self._keeps_up():
                return False
        return True

    def _step(self, batch: Batch | SampleError) -> bool:
        """Whether every worker had its photos, and the loss of the step was a number."""
        if _someone_failed(batch, self._group, self._listener):
            return False
        assert isinstance(batch, Batch)
        came_to = self._stepper.step(batch.images, batch.labels)
        self._state.history.losses.append(came_to.loss)
        self._window.add(came_to.lr, batch.waited_s)
        if math.isfinite(came_to.loss):
            return True
        if not math.isfinite(came_to.own_loss):  # the others' photos are not to blame
            self._listener.fail(
                f"the loss is {came_to.loss} at step {self._state.step}; this worker's photos were "
                f"{', '.join(batch.uris)}: give a lower --base-lr, or mend these labels, under a "
                "new --out"
            )
        return False

    def _keeps_up(self) -> bool:
        """After a step: history, val and checkpoint when they are due; False where val failed."""
        step, task = self._state.step, self._task
        last = step == task.experiment.optimizer.max_steps
        every = task.experiment.evaluation.eval_every
        row = self._window.row(step, self._state.history.losses)
        due = last or (every and step % every == 0)
        if step % HISTORY_EVERY == 0 or due:
            self._state.history.add(row)
        scored = self._score() if due else None
        if due and scored is None:
            return False
        if step % HISTORY_EVERY == 0 or due:  # evaluation is no part of a step's time
            self._window = _ThroughputMeter(step, task.experiment.optimizer.batch_size)
        if self._group.is_main:
            self._listener.report_step(row, scored)
        if scored or step % task.checkpoint_every == 0:
            if not self._is_sound():
                return False
            self._save()
        return True

    def _is_sound(self) -> bool:
        """Whether all weights are numbers: a checkpoint of others could never go on."""
        if all(bool(each.isfinite().all()) for each in self._state.model.parameters()):
            return True  # they are the same on all workers
        if self._group.is_main:
            self._listener.fail(
                f"weights are no longer numbers after step {self._state.step}: give a lower "
                "--base-lr and a new --out; no checkpoint was made of them"
            )
        return False

    def _score(self) -> Score | None:
        """How good the network is on val now, None where someone failed; the best is to be put."""
        before = self._state.history.best
        self._group.broadcast_buffers(self._state.best_model)
        found = self._evaluate()
        if _someone_failed(found, self._group, self._listener):
            return None
        assert isinstance(found, Evaluation)
        confusion = self._group.sum(torch.from_numpy(found.confusion)).numpy()
        images = int(self._group.sum(torch.tensor(found.images)))
        total = Evaluation(confusion=confusion, images=images)
        score = total.score(step=self._state.step, time=time.time())
        self._state.history.scores.append(score)
        if self._group.is_main and self._state.history.best is not before:
            self._best = self._best_bytes()
        return score

    def _best_bytes(self) -> bytes:
        """The network as it is now: a copy, which may be written while training goes on."""
        return weights.to_bytes(self._state.best_model, self._task.train.classes)

    def _remake_best(self) -> None:
        """Puts the best network again where the run goes on from the step that made it.

        A death may have come between that step's checkpoint and the network. It is put after the
        checkpoint, so that it is never of a score that only a dead worker knew.
        """
        best = self._state.history.best
        if best is not None and best.step == self._state.step:
            checkpoints.save_best(self._task.out, self._best_bytes())

    def _evaluate(self) -> Evaluation | SampleError:
        """This worker's share of val."""
        task, config = self._task, self._task.experiment.evaluation
        try:
            return evaluate(
                self._state.best_model,
                task.val,
                read=self._read,
                indices=worker_indices(
                    len(task.val.pairs), self._group.rank, self._group.world_size
                ),
                scales=config.eval_scales,
                flip=config.eval_flip,
                output_stride=config.eval_output_stride,
                on_image=lambda *_: self._listener.heartbeat() if self._group.is_main else None,
            )
        except SampleError as error:
            return error

    def _save(self) -> None:
        self._group.broadcast_buffers(self._state.model)
        if self._state.average is not None:  # its own counter is on the CPU, and the same for all
            self._group.broadcast_buffers(self._state.best_model)
        facts = {"world": self._group.world_size, "threads": self._task.threads}
        save = None
        if self._group.is_main:
            snapshot = state.snapshot(self._state, facts)
            out, names = self._task.out, self._task.val.classes.names
            best, self._best = self._best, None

            def save() -> None:
                checkpoints.save(out, snapshot)
                if best is not None:
                    checkpoints.save_best(out, best)
                write_history(out, snapshot.history, names)

        newest = self._state.history.scores[-1:]
        metrics: dict[str, object] = {"step": self._state.step}
        if newest:
            ious = dict(zip(self._task.val.classes.names, newest[0].ious, strict=True))
            metrics |= {"val_miou": newest[0].miou, "val_ious": ious}
        self._group.report(metrics, name=checkpoints.folder_name(self._state.step), save=save)

    def ends(self) -> None:
        """After the last step: the network that ships, and what people look at."""
        if self._group.is_main:
            export_run(self._task.out, self._state, self._task.val, self._read)


class _ThroughputMeter:
    """How fast this worker is since the last row of the history, or since it began."""

    def __init__(self, step: int, batch_size: int) -> None:
        self._first, self._batch_size, self._since = step, batch_size, time.monotonic()
        self._lr = self._waited_s = 0.0

    def add(self, lr: float, waited_s: float) -> None:
        self._lr = lr
        self._waited_s += waited_s

    def row(self, step: int, losses: Sequence[float]) -> Step:
        """The steps since the history's last row as one, with the mean of their `losses`."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        return Step(
            step=step,
            time=time.time(),
            loss=sum(losses) / len(losses),
            lr=self._lr,
            images_per_second=(step - self._first) * self._batch_size / seconds,
            wait_share=min(1.0, self._waited_s / seconds),
        )


def _someone_failed(made: object, group: ProcessGroup, listener: Listener) -> bool:
    """Whether a worker has an error in hand instead of what it was to make."""
    if isinstance(made, SampleError):
        listener.fail(f"{made}{_OTHER_FILES if isinstance(made, BrokenFileError) else ''}")
    failed = torch.tensor(float(isinstance(made, SampleError)))
    return bool(group.sum(failed) > 0)


def restore_state(task: WorkerSpec, group: ProcessGroup) -> TrainingState:
    """The run's state as the newest checkpoint has it, or as it is before the first step."""
    model, _ = weights.load(task.initial)
    begun = build_state(task, model, group)
    if group.is_main and group.world_size > 1 and group.device.type == "cpu":
        _say_what_is_not_shared(task, model)
    newest = checkpoints.latest(task.out) if group.is_main else None
    # the first worker chooses: one may be put, or go, between two workers' listings
    step = int(group.sum(torch.tensor(newest.step if newest else 0)))
    if step == 0:
        return begun
    newest = newest or checkpoints.load_step(task.out, step)
    state.load(begun, newest)
    facts = {"world": group.world_size, "threads": task.threads}
    if dict(newest.provenance) != facts and group.is_main:
        logger.warning(
            "the checkpoint at step %d was made with %s, and training goes on with %s: the result "
            "will be as good, but not the same bit for bit",
            newest.step, newest.provenance, facts,
        )  # fmt: skip
    return begun


def _say_what_is_not_shared(task: WorkerSpec, model: DeepLabV3) -> None:
    """A warning where batch normalisation is trained: torch's synchronised one refuses CPUs."""
    if not task.experiment.optimizer.freeze_bn and any(batch_norm.layers(model)):
        logger.warning(
            "on CPUs each worker normalises by its own photos alone: the result depends on the "
            "number of workers; --freeze-bn normalises by the statistics that are there"
        )
