"""Strides and rates of a backbone's units for a given output stride.

A feature map computed at a smaller output stride, sampled at every n-th position, equals the map
at the larger output stride with the same weights.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """A stage of a backbone: its number of units, and the natural stride of one of them."""

    units: int
    stride: int


@dataclass(frozen=True, kw_only=True)
class UnitStrides:
    """A residual unit's stride, and its rates.

    `entry_rate` applies up to the strided convolution, inclusive, and `rate` after it.
    """

    stride: int = 1
    entry_rate: int = 1
    rate: int = 1


Plan = list[list[UnitStrides]]
"""Units by stage."""


def plan_stride_first(stages: list[StageSpec], *, stem: int, output_stride: int) -> Plan:
    """Return the plan with each stage's stride in its first unit (torchvision, MobileNetV2).

    A stage that would exceed `output_stride` gives up its stride and multiplies the rate instead.
    Its first unit still sees the previous stage's grid up to its strided convolution, so it keeps
    the previous rate there. `stem` is the stride before the first stage.
    """
    current, rate, plan = stem, 1, []
    for stage in stages:
        previous, stride = rate, stage.stride
        if current * stride > output_stride:
            rate, stride = rate * stride, 1
        current *= stride
        first = UnitStrides(stride=stride, entry_rate=previous, rate=rate)
        rest = UnitStrides(stride=1, entry_rate=rate, rate=rate)
        plan.append([first] + [rest] * (stage.units - 1))
    return plan


def plan_stride_last(stages: list[StageSpec], *, stem: int, output_stride: int) -> Plan:
    """Return the plan with each stage's stride in its last unit (the paper's ResNet).

    A whole stage sees one grid, so it has one rate; a stride that is given up multiplies the rate
    of the stages after it. Source: arXiv 1706.05587, Sec. 3.1 and 3.2.
    """
    current, rate, plan = stem, 1, []
    for stage in stages:
        stride = stage.stride if current * stage.stride <= output_stride else 1
        body = UnitStrides(stride=1, entry_rate=rate, rate=rate)
        last = UnitStrides(stride=stride, entry_rate=rate, rate=rate)
        plan.append([body] * (stage.units - 1) + [last])
        current *= stride
        rate *= stage.stride // stride
    return plan
