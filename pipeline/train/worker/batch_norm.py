"""Batch normalization during training: its momentum, freezing it, and sharing its statistics."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def layers(model: nn.Module) -> Iterator[_BatchNorm]:
    """Yield the batch normalization layers of the model."""
    yield from (layer for layer in model.modules() if isinstance(layer, _BatchNorm))


def set_momentum(model: nn.Module, momentum: float) -> None:
    """Set the weight of a batch in the running statistics: 1 - the decay given in the paper."""
    for layer in layers(model):
        layer.momentum = momentum


def freeze(model: nn.Module) -> None:
    """Normalize by the running statistics and stop updating them; scale and shift still train.

    `model.train()` undoes this. Source: arXiv 1706.05587, Sec. 4.1.
    """
    for layer in layers(model):
        layer.eval()


def broadcast_buffers(model: nn.Module) -> None:
    """Give every worker the buffers of rank 0: each has statistics of its own batches."""
    buffers = [buffer for buffer in model.buffers() if buffer.numel()]
    # dict keys keep their order; that of a set would differ between workers
    for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):
        group = [buffer for buffer in buffers if buffer.dtype == dtype]
        flat = torch.cat([buffer.detach().flatten() for buffer in group])
        torch.distributed.broadcast(flat, src=0)
        parts = torch.split(flat, [buffer.numel() for buffer in group])
        with torch.no_grad():
            for buffer, part in zip(group, parts, strict=True):
                buffer.copy_(part.view_as(buffer))
