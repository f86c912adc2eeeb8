"""The training loop of one worker, from the start of a run or its newest checkpoint to the end.

Workers stop together: before each step, and after each evaluation, a sum over all workers shows
whether one has failed, so that none blocks waiting for it.
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
from pipeline.train.worker import checkpoints, state
from pipeline.train.worker.distributed import ProcessGroup
from pipeline.train.worker.export import export_run, write_history
from pipeline.train.worker.history import Step
from pipeline.train.worker.loader import Batch, load_batches
from pipeline.train.worker.task import (
    WorkerSpec,
    build_loader_config,
    build_trainer,
    check_paths_visible,
    node_cache,
    provenance,
    restore_state,
)

HISTORY_EVERY = 10
"""Steps between two rows of the history."""

logger = logging.getLogger(__name__)


class Listener(Protocol):
    """A receiver of the run's progress from the main worker, and of a failure from any worker.

    `heartbeat` is called during long evaluations.
    """

    def started(self, workers: int, best: Score | None) -> None: ...
    def heartbeat(self) -> None: ...
    def report_step(self, latest: Step, scored: Score | None) -> None: ...
    def fail(self, message: str) -> None: ...


def train(spec: WorkerSpec, group: ProcessGroup, listener: Listener) -> None:
    """Train until the last step of the experiment, or until a worker fails.

    The worker that fails passes the reason to `listener`; all workers return then.
    """
    torch.set_num_threads(spec.threads)
    if _any_failed(_invisible_path(spec), group, listener):
        return
    run = _TrainingRun(spec, group, listener)
    if run.train():
        run.export()


class _TrainingRun:
    """One worker's training run, from (re)start to failure or completion."""

    def __init__(self, spec: WorkerSpec, group: ProcessGroup, listener: Listener) -> None:
        self._spec, self._group, self._listener = spec, group, listener
        self._read = node_cache(spec.train, spec.val, max_bytes=spec.cache_bytes)
        if not self._read.fits:
            logger.warning(
                "the images need more than --cache-gb %g: those that do not fit are downloaded "
                "again in every epoch",
                spec.cache_bytes / 1e9,
            )
        self._state = restore_state(spec, group)
        self._trainer = build_trainer(spec, self._state, group)
        self._meter = _ThroughputMeter(self._state.step, spec.experiment.optimizer.batch_size)
        self._best: bytes | None = None  # written with the next checkpoint
        if group.is_main:
            self._restore_best()
            listener.started(group.world_size, self._state.history.best)

    def train(self) -> bool:
        """Train to the last step; return False if a worker failed before."""
        spec, group = self._spec, self._group
        config = build_loader_config(spec, rank=group.rank, world_size=group.world_size)
        stop = spec.experiment.optimizer.max_steps
        for batch in load_batches(config, self._state.step, stop, loaders=spec.loaders):
            if not self._step(batch) or not self._after_step():
                return False
        return True

    def export(self) -> None:
        """Write the final network and the plots."""
        if self._group.is_main:
            export_run(self._spec.out, self._state, self._spec.val, self._read)

    def _step(self, batch: Batch | SampleError) -> bool:
        """Train on a batch; return False if a worker has none, or the loss is not finite."""
        if _any_failed(batch, self._group, self._listener):
            return False
        assert isinstance(batch, Batch)
        result = self._trainer.step(batch.images, batch.labels)
        self._state.history.losses.append(result.loss)
        self._meter.add(result.lr, batch.waited_s)
        if math.isfinite(result.loss):
            return True
        if not math.isfinite(result.own_loss):  # the other workers' images are not the cause
            self._listener.fail(
                f"the loss is {result.loss} at step {self._state.step} on the images "
                f"{', '.join(batch.uris)}; use a lower --base-lr, or correct their labels, with a "
                "new --out"
            )
        return False

    def _after_step(self) -> bool:
        """Evaluate, report and save, each if it is due; return False if a worker failed."""
        step, spec = self._state.step, self._spec
        last = step == spec.experiment.optimizer.max_steps
        every = spec.experiment.evaluation.eval_every
        due = last or (every and step % every == 0)
        row = self._meter.row(step, self._state.history.losses)
        if step % HISTORY_EVERY == 0 or due:
            self._state.history.add(row)
        scored = self._evaluate() if due else None
        if due and scored is None:
            return False
        if step % HISTORY_EVERY == 0 or due:  # excludes the time of the evaluation
            self._meter = _ThroughputMeter(step, spec.experiment.optimizer.batch_size)
        if self._group.is_main:
            self._listener.report_step(row, scored)
        if scored or step % spec.checkpoint_every == 0:
            if not self._weights_are_finite():
                return False
            self._save_checkpoint()
        return True

    def _weights_are_finite(self) -> bool:
        """Check the weights before they are saved: training cannot resume from NaN."""
        if all(bool(weight.isfinite().all()) for weight in self._state.model.parameters()):
            return True  # on all workers, since they have the same weights
        if self._group.is_main:
            self._listener.fail(
                f"weights contain NaN or inf after step {self._state.step}; use a lower --base-lr "
                "and a new --out (no checkpoint was written)"
            )
        return False

    def _evaluate(self) -> Score | None:
        """Score the network on val, None if a worker failed; keep the network if it is the best."""
        best_before = self._state.history.best
        self._group.broadcast_buffers(self._state.best_model)
        part = self._evaluate_part()
        if _any_failed(part, self._group, self._listener):
            return None
        assert isinstance(part, Evaluation)
        confusion = self._group.sum(torch.from_numpy(part.confusion)).numpy()
        images = int(self._group.sum(torch.tensor(part.images)))
        total = Evaluation(confusion=confusion, images=images)
        score = total.score(step=self._state.step, time=time.time())
        self._state.history.scores.append(score)
        if self._group.is_main and self._state.history.best is not best_before:
            self._best = self._best_model_bytes()
        return score

    def _evaluate_part(self) -> Evaluation | SampleError:
        """Evaluate this worker's part of val."""
        spec, group, config = self._spec, self._group, self._spec.experiment.evaluation
        try:
            return evaluate(
                self._state.best_model,
                spec.val,
                read=self._read,
                indices=worker_indices(len(spec.val.pairs), group.rank, group.world_size),
                scales=config.eval_scales,
                flip=config.eval_flip,
                output_stride=config.eval_output_stride,
                on_image=lambda *_: self._listener.heartbeat() if group.is_main else None,
            )
        except SampleError as error:
            return error

    def _best_model_bytes(self) -> bytes:
        """Return a copy of the current network, which can be written while training continues."""
        return weights.to_bytes(self._state.best_model, self._spec.train.classes)

    def _restore_best(self) -> None:
        """Write the best network again if the run resumes at its step.

        It is written after the checkpoint, so that its score is always in a checkpoint; the worker
        may have crashed between the two.
        """
        best = self._state.history.best
        if best is not None and best.step == self._state.step:
            checkpoints.save_best(self._spec.out, self._best_model_bytes())

    def _save_checkpoint(self) -> None:
        """Save the state, the curves and a new best network, maybe in the background."""
        self._group.broadcast_buffers(self._state.model)
        if self._state.average is not None:  # its own counter is the same on all workers
            self._group.broadcast_buffers(self._state.best_model)
        class_names = self._spec.val.classes.names
        save = None
        if self._group.is_main:
            snapshot = state.snapshot(self._state, provenance(self._spec, self._group))
            out = self._spec.out
            best, self._best = self._best, None

            def save() -> None:
                checkpoints.save(out, snapshot)
                if best is not None:
                    checkpoints.save_best(out, best)
                write_history(out, snapshot.history, class_names)

        metrics: dict[str, object] = {"step": self._state.step}
        for score in self._state.history.scores[-1:]:
            ious = dict(zip(class_names, score.ious, strict=True))
            metrics |= {"val_miou": score.miou, "val_ious": ious}
        self._group.report(metrics, name=checkpoints.folder_name(self._state.step), save=save)


class _ThroughputMeter:
    """This worker's speed since the last row of the history, or since its start."""

    def __init__(self, step: int, batch_size: int) -> None:
        self._first_step, self._batch_size, self._start = step, batch_size, time.monotonic()
        self._lr = self._waited_s = 0.0

    def add(self, lr: float, waited_s: float) -> None:
        """Add a step with its learning rate and the seconds it waited for data."""
        self._lr = lr
        self._waited_s += waited_s

    def row(self, step: int, losses: Sequence[float]) -> Step:
        """Return the steps up to `step` as one row of the history, with the mean of `losses`."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        return Step(
            step=step,
            time=time.time(),
            loss=sum(losses) / len(losses),
            lr=self._lr,
            images_per_second=(step - self._first_step) * self._batch_size / seconds,
            wait_share=min(1.0, self._waited_s / seconds),
        )


def _invisible_path(spec: WorkerSpec) -> SampleError | None:
    """Return the error if this node does not see a path of the run."""
    try:
        check_paths_visible(spec)
    except SampleError as error:
        return error
    return None


def _any_failed(result: object, group: ProcessGroup, listener: Listener) -> bool:
    """Return whether any worker's `result` is an error; this worker's is sent to `listener`."""
    failed = isinstance(result, SampleError)
    if failed:
        replaced = "; after changing images or labels, start a new run with another --out"
        listener.fail(f"{result}{replaced if isinstance(result, BrokenFileError) else ''}")
    return bool(group.sum(torch.tensor(float(failed))) > 0)
