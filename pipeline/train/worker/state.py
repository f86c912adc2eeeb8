"""The complete training state as one serializable object.

A `TrainingState` lives on a worker; a `Snapshot` is a copy of it, stored as one safetensors file
with weights, momentum, moving average, step and history. Training can continue while a snapshot is
written. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch.optim.swa_utils import AveragedModel

from pipeline.model.checkpoint_formats import TRAINING_KEY
from pipeline.model.deeplab import DeepLabV3
from pipeline.model.formats import CheckpointError, parse
from pipeline.text import one_line
from pipeline.train.worker.history import History

VERSION = 1


@dataclass(kw_only=True)
class TrainingState:
    """The network, its optimizer, and the progress of the run; `step` steps are done.

    `average` is the moving average of weights and buffers, None if the experiment has none.
    """

    model: DeepLabV3
    optimizer: torch.optim.SGD
    average: AveragedModel | None
    step: int = 0
    history: History = field(default_factory=History)

    @property
    def best_model(self) -> DeepLabV3:
        """The network to evaluate and export: the moving average, if there is one."""
        if self.average is None:
            return self.model
        averaged = self.average.module
        assert isinstance(averaged, DeepLabV3)
        return averaged


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A copy of a training state on the CPU.

    `provenance` is what it was computed with and rounding depends on: number of workers ("world")
    and threads of each ("threads").
    """

    tensors: Mapping[str, torch.Tensor]
    step: int
    history: History
    provenance: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """Return the snapshot as a safetensors file, for `read`."""
        metadata: dict[str, Any] = {
            "version": VERSION,
            "step": self.step,
            "facts": dict(self.provenance),
            "history": json.loads(self.history.to_json()),
        }
        metadata["digest"] = _digest(metadata, self.tensors)
        return safetensors.torch.save(
            dict(self.tensors), metadata={TRAINING_KEY: json.dumps(metadata, sort_keys=True)}
        )


def snapshot(state: TrainingState, provenance: Mapping[str, Any]) -> Snapshot:
    """Return a copy of `state`; `state_dict` alone shares its tensors with the training."""
    live = {f"model.{key}": value for key, value in state.model.state_dict().items()}
    for index, parameter in enumerate(_parameters(state.optimizer)):
        momentum = state.optimizer.state[parameter].get("momentum_buffer")
        if momentum is not None:
            live[f"momentum.{index:04d}"] = momentum
    if state.average is not None:
        live |= {f"average.{key}": value for key, value in state.average.state_dict().items()}
    return Snapshot(
        tensors={key: value.detach().cpu().clone().contiguous() for key, value in live.items()},
        step=state.step,
        history=state.history.copy(),
        provenance=provenance,
    )


def read(data: bytes, name: str) -> Snapshot:
    """Return the snapshot in `data`, the bytes of the file `name`.

    Raises CheckpointError if it is not a snapshot, or not as it was written. Files of older
    versions have no digest and are accepted without.
    """
    file = parse(data, name=name)
    if TRAINING_KEY not in file.metadata:
        raise CheckpointError(f"{name} is not a training checkpoint: it has no training state")
    try:
        metadata: Any = json.loads(file.metadata[TRAINING_KEY])
        if metadata["version"] != VERSION:
            raise ValueError(f"version {metadata['version']!r}, must be {VERSION}")
        digest = metadata.pop("digest", None)
        if digest is not None and digest != _digest(metadata, file.tensors):
            raise ValueError("its digest does not match: the file is corrupt")
        history = History.from_json(json.dumps(metadata["history"]))
        step, provenance = int(metadata["step"]), dict(metadata["facts"])
    except (KeyError, ValueError, TypeError) as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise CheckpointError(f"{name} is not a valid training checkpoint: {reason}") from None
    return Snapshot(tensors=file.tensors, step=step, history=history, provenance=provenance)


def load(state: TrainingState, source: Snapshot) -> None:
    """Set `state` to that of the snapshot. Raises CheckpointError if the networks differ."""
    try:
        state.model.load_state_dict(_with_prefix(source.tensors, "model."))
        if state.average is not None:
            state.average.load_state_dict(_with_prefix(source.tensors, "average."))
    except RuntimeError as error:
        raise CheckpointError(
            f"the training checkpoint belongs to another network: {error}"
        ) from None
    for index, parameter in enumerate(_parameters(state.optimizer)):
        momentum = source.tensors.get(f"momentum.{index:04d}")
        if momentum is not None:
            # in the parameter's memory format: updates are slower if they differ
            buffer = torch.empty_like(parameter).copy_(momentum)
            state.optimizer.state[parameter]["momentum_buffer"] = buffer
    state.step, state.history = source.step, source.history.copy()


def _parameters(optimizer: torch.optim.SGD) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _with_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors whose name starts with `prefix`, without it."""
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


def _digest(metadata: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of all values and bytes: safetensors does not detect a flipped bit."""
    digest = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
