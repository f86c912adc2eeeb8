"""Batch normalisation in training: how fast it forgets, frozen, or the same on all workers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def layers(model: nn.Module) -> Iterator[_BatchNorm]:
    """The model's batch normalisations."""
    yield from (layer for layer in model.modules() if isinstance(layer, _BatchNorm))


def set_momentum(model: nn.Module, momentum: float) -> None:
    """Sets what share of a batch's statistics enters the running ones: 1 - the paper's decay."""
    for layer in layers(model):
        layer.momentum = momentum


def freeze(model: nn.Module) -> None:
    """Normalises with the running statistics, which stay as they are; scale and shift still learn.

    `model.train()` undoes it. Source: arXiv 1706.05587, Sec. 4.1.
    """
    for layer in layers(model):
        layer.eval()


def broadcast_buffers(model: nn.Module) -> None:
    """Gives every worker rank 0's buffers: running statistics differ where batches do."""
    buffers = [buffer for buffer in model.buffers() if buffer.numel()]
    # a set's order would be another one on every worker
    for kind in dict.fromkeys(buffer.dtype for buffer in buffers):
        group = [buffer for buffer in buffers if buffer.dtype == kind]
        flat = torch.cat([buffer.detach().flatten() for buffer in group])
        torch.distributed.broadcast(flat, src=0)
        parts = torch.split(flat, [buffer.numel() for buffer in group])
        with torch.no_grad():
            for buffer, part in zip(group, parts, strict=True):
                buffer.copy_(part.view_as(buffer))
