"""What this machine has to compute on."""

from __future__ import annotations

import math

import torch


def check_gpus(wanted: float, asked: str) -> None:
    """Raises ValueError where torch finds fewer GPUs here than `wanted`; `asked` is by what words.

    A part of a GPU needs a whole one to be there.
    """
    here = torch.cuda.device_count()
    if here < math.ceil(wanted):
        raise ValueError(f"{asked}: this machine has {here} GPUs that torch can use")
