"""Shifted convolution against conv2d in fp64, and when it is chosen."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from pipeline.model import atrous, devices, torch_compat

AVX2 = ("avx2", torch.float32)
AMX = ("amx", torch.bfloat16)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(found, exact):
    """Return the root-mean-square error."""
    return (found.double() - exact).square().mean().sqrt().item()


@settings(max_examples=60)
@given(
    height=st.integers(1, 17),
    width=st.integers(1, 17),
    kernel=st.sampled_from([1, 3, 5]),
    rate=st.integers(1, 20),
    stride=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4, 16]),
    n=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    last=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_rounding_error_is_at_most_1_2_times_that_of_conv2d(
    height, width, kernel, rate, stride, groups, n, dtype, last, biased, seed
):
    x = drawn(n, 32, height, width, seed=seed).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight = drawn(48, 32 // groups, kernel, kernel, seed=seed + 1).to(dtype)
    bias = drawn(48, seed=seed + 2).to(dtype) if biased else None
    padding = rate * (kernel // 2)
    place = (stride, padding, rate, groups)
    exact = functional.conv2d(
        x.double(), weight.double(), None if bias is None else bias.double(), *place
    )
    plain = functional.conv2d(x, weight, bias, *place)
    found = atrous.shifted_conv2d(
        x, atrous.pack(weight, groups), bias, stride=stride, padding=(padding, padding), rate=rate
    )
    assert found.dtype == dtype
    assert found.shape == plain.shape
    # Adding 32 / groups terms one after the other errs like a random walk, in any convolution; this
    # matters only on small maps.
    unit = torch.finfo(torch.float32).eps / 2 * exact.square().mean().sqrt().item()
    walk = unit * max(1.0, 32 / groups / 6) ** 0.5
    assert error(found, exact) <= 1.2 * error(plain, exact) + walk


def test_a_rate_beyond_the_map_gives_the_1x1_center_tap():
    x, weight = drawn(2, 3, 7, 5), drawn(4, 3, 3, 3, seed=1)
    found = atrous.shifted_conv2d(x, atrous.pack(weight, 1), None, stride=1, padding=(7, 7), rate=7)
    wanted = torch.einsum("nchw,kc->nkhw", x, weight[:, :, 1, 1])
    torch.testing.assert_close(found, wanted)


def test_equals_conv2d_with_uneven_padding_and_outputs_without_valid_taps():
    x, weight, bias = drawn(1, 2, 5, 6), drawn(3, 2, 3, 3, seed=1), drawn(3, seed=2)
    for padding in [(0, 1), (9, 0), (12, 12)]:
        found = atrous.shifted_conv2d(
            x, atrous.pack(weight, 1), bias, stride=1, padding=padding, rate=2
        )
        torch.testing.assert_close(found, functional.conv2d(x, weight, bias, 1, padding, 2))


def test_the_size_of_the_pieces_does_not_change_the_result(monkeypatch):
    x, weight = drawn(2, 4, 9, 11), drawn(6, 2, 3, 3, seed=1)
    for values in (1, 300, 2000):
        monkeypatch.setattr(atrous, "GATHERED_VALUES", values)
        found = atrous.shifted_conv2d(
            x, atrous.pack(weight, 2), None, stride=1, padding=(4, 4), rate=4
        )
        torch.testing.assert_close(found, functional.conv2d(x, weight, None, 1, 4, 4, 2))


@given(
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    kernel=st.sampled_from([1, 3, 5]),
    rate=st.integers(1, 40),
    stride=st.integers(1, 3),
)
def test_valid_tap_share_equals_counting_taps_one_by_one(height, width, kernel, rate, stride):
    padding = rate * (kernel // 2)
    counts = []
    for length in (height, width):
        outputs = range((length - 1) // stride + 1)
        seen = [
            0 <= output * stride + tap * rate - padding < length
            for output in outputs
            for tap in range(kernel)
        ]
        counts.append(sum(seen) / len(seen))
    share = atrous.valid_tap_share(
        (height, width), kernel_size=kernel, rate=rate, stride=stride, padding=padding
    )
    assert share == pytest.approx(counts[0] * counts[1])


def test_valid_tap_share_of_the_papers_rates_equals_values_by_hand():
    # Of three taps the middle one is always on the map, each other one for 65 - rate of 65 outputs.
    for rate in (12, 24, 36):
        by_hand = ((65 + 2 * (65 - rate)) / (3 * 65)) ** 2
        share = atrous.valid_tap_share((65, 65), kernel_size=3, rate=rate, stride=1, padding=rate)
        assert share == pytest.approx(by_hand)
    assert 9 * share == pytest.approx(3.6, abs=0.03)


@pytest.mark.parametrize(
    ("on", "size", "rate", "inputs", "cheaper"),
    [
        (AVX2, (65, 65), 24, 2048, False),
        (AVX2, (65, 65), 36, 2048, False),
        (AVX2, (49, 49), 36, 2048, True),
        (AVX2, (33, 33), 36, 2048, True),
        (AVX2, (33, 33), 36, 320, False),
        (AMX, (65, 65), 12, 2048, True),
        (AMX, (65, 65), 36, 2048, True),
        (AMX, (65, 65), 4, 2048, False),
        (AMX, (65, 65), 36, 512, False),
        (("amx", torch.float32), (33, 33), 36, 2048, False),
        (("avx512", torch.float32), (33, 33), 36, 2048, False),
        (("cuda", torch.bfloat16), (33, 33), 36, 2048, False),
    ],
)
def test_shifted_conv2d_is_chosen_where_it_was_measured_to_be_faster(
    on, size, rate, inputs, cheaper
):
    where = {"in_channels": inputs, "size": size, "rate": rate}
    assert atrous.is_shifted_cheaper(*on, groups=1, stride=1, **where) == cheaper
    assert not atrous.is_shifted_cheaper(*on, groups=2, stride=1, **where)
    assert not atrous.is_shifted_cheaper(*on, groups=1, stride=2, **where)


@pytest.mark.parametrize(
    ("capability", "amx", "bf16", "on"),
    [
        ("AVX512", True, True, "amx"),
        ("AVX512", False, True, "avx512_bf16"),
        ("AVX512", False, False, "avx512"),
        ("AVX2", True, True, "avx2"),
        ("DEFAULT", True, True, "default"),
    ],
)
def test_the_engine_is_the_best_that_the_cpu_has_and_torch_may_use(
    capability, amx, bf16, on, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch_compat, "has_amx", lambda: amx)
    monkeypatch.setattr(torch_compat, "has_avx512_bf16", lambda: bf16)
    assert devices.engine(torch.device("cpu")) == on


@pytest.mark.slow
def test_aten_cpu_capability_limits_the_engine_on_any_cpu():
    code = """
import torch
from pipeline.model import devices, torch_compat
torch_compat.has_amx = torch_compat.has_avx512_bf16 = lambda: True
cpu = torch.device("cpu")
print(devices.engine(cpu), devices.has_bf16(cpu))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"},
        capture_output=True,
        text=True,
    )
    assert ran.stdout.split() == ["avx2", "False"], ran.stderr
