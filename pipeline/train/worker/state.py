"""All that a training run has come to, as one object that can be put away and taken up again.

Enters and leaves: a `TrainingState` on a worker, and one safetensors file that holds weights,
momentum, moving average, step and history. Invariant: what is put away is a copy; training may go
on while it is written. Nothing is pickled.
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
from pipeline.train.worker.history import History

VERSION = 1


@dataclass(kw_only=True)
class TrainingState:
    """The network, what trains it, and how far it is. `step` steps are done.

    `average` is the moving average of weights and buffers, None where the experiment keeps none.
    """

    model: DeepLabV3
    optimizer: torch.optim.SGD
    average: AveragedModel | None
    step: int = 0
    history: History = field(default_factory=History)

    @property
    def best_model(self) -> DeepLabV3:
        """The network to evaluate and to ship: the average where there is one."""
        if self.average is None:
            return self.model
        averaged = self.average.module
        assert isinstance(averaged, DeepLabV3)
        return averaged


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A copy of a state on the CPU. `facts` are what it was computed with: world, threads."""

    tensors: Mapping[str, torch.Tensor]
    step: int
    history: History
    provenance: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """One safetensors file; `read` gives it back."""
        said: dict[str, Any] = {
            "version": VERSION,
            "step": self.step,
            "facts": dict(self.provenance),
        }
        said["history"] = json.loads(self.history.to_json())
        said["digest"] = _digest(said, self.tensors)
        return safetensors.torch.save(
            dict(self.tensors), metadata={TRAINING_KEY: json.dumps(said, sort_keys=True)}
        )


def snapshot(state: TrainingState, provenance: Mapping[str, Any]) -> Snapshot:
    """A copy of `state`: `state_dict` would hand out the tensors that training goes on changing."""
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
    """The snapshot in `data`. Raises CheckpointError where it is not one, as it was written.

    A file of an older version, which lacks the digest, is taken as it is.
    """
    file = parse(data, name=name)
    try:
        said: Any = json.loads(file.metadata[TRAINING_KEY])
        if said["version"] != VERSION:
            raise ValueError(f"version {said['version']!r}, known is {VERSION}")
        digest = said.pop("digest", None)
        if digest is not None and digest != _digest(said, file.tensors):
            raise ValueError("its bytes are not those that were written")
        history = History.from_json(json.dumps(said["history"]))
        step, provenance = int(said["step"]), dict(said["facts"])
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{name} is no training checkpoint: {error}") from None
    return Snapshot(tensors=file.tensors, step=step, history=history, provenance=provenance)


def load(state: TrainingState, snapshot: Snapshot) -> None:
    """Makes `state` what it was when the snapshot was taken.

    Raises CheckpointError where it was of another network.
    """
    try:
        state.model.load_state_dict(_part(snapshot.tensors, "model."))
        if state.average is not None:
            state.average.load_state_dict(_part(snapshot.tensors, "average."))
    except RuntimeError as error:
        raise CheckpointError(f"the training checkpoint is of another network: {error}") from None
    for index, parameter in enumerate(_parameters(state.optimizer)):
        momentum = snapshot.tensors.get(f"momentum.{index:04d}")
        if momentum is not None:
            # in the parameter's memory format: its update is then as fast as it was
            state.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(
                momentum
            )
    state.step, state.history = snapshot.step, snapshot.history.copy()


def _parameters(optimizer: torch.optim.SGD) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


def _digest(said: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """Of every value and every byte: safetensors' own checks do not see a flipped bit."""
    found = hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
