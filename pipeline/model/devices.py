"""What this machine has to compute on: its GPUs, and how its CPU multiplies matrices."""

from __future__ import annotations

import math

import torch

from pipeline.model import torch_compat

_BF16_CPUS = ("amx", "avx512_bf16")
"""CPUs that multiply bf16 faster than fp32; the others emulate it, about 20 times slower."""


def check_gpus(wanted: float, option: str) -> None:
    """Raise ValueError if torch finds fewer GPUs on this machine than `wanted`.

    A fraction of a GPU needs one whole GPU. `option` is the flag that asks for them and its
    value, for the message: `--gpus-per-actor 1`.
    """
    here = torch.cuda.device_count()
    if here < math.ceil(wanted):
        raise ValueError(f"{option}: this machine has {here} usable GPUs; 0 uses the CPU")


def engine(device: torch.device) -> str:
    """Return what multiplies matrices on `device`: 'cuda', 'amx', 'avx512_bf16', 'avx512', 'avx2'.

    'amx' and 'avx512_bf16' have instructions for bf16. Other devices and CPUs are returned under
    torch's name for them. If ATEN_CPU_CAPABILITY limits torch to less than AVX-512, the result
    is that capability on any CPU.
    """
    if device.type != "cpu":
        return device.type
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability != "avx512":
        return capability
    if torch_compat.has_amx():
        return "amx"
    return "avx512_bf16" if torch_compat.has_avx512_bf16() else capability


def has_bf16(device: torch.device) -> bool:
    """Return whether `device` has instructions for bf16, which make it faster than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return engine(device) in _BF16_CPUS
