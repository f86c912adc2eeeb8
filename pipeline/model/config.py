"""What a network is: the one value that builds it and that its checkpoint carries.

Enters: names and numbers from a recipe or from a checkpoint's JSON. Leaves: a frozen, checked
`ModelConfig`. Invariant: a config that exists can be built.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

Backbone = Literal["resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2"]
Style = Literal["paper", "torchvision", "tensorflow"]

BACKBONES: tuple[str, ...] = get_args(Backbone)
STYLES: tuple[str, ...] = get_args(Style)
OUTPUT_STRIDES = (4, 8, 16, 32)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RATES_STRIDE = 16
"""The output stride at which `atrous_rates` are given (arXiv 1706.05587, Sec. 3.3)."""

MAX_CLASSES = 255
"""A mask is 8 bits, and 255 is kept for pixels to ignore."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A DeepLabv3. The defaults are the paper's final model, trained at output stride 16.

    `atrous_rates` are the rates at output stride 16, scaled by 16 / `output_stride`; () leaves
    the 3x3 branches out. `multi_grid` holds the unit rates of the last stage. `mean` and `std`
    are per channel (red, green, blue), on pixels scaled to 0..1.

    `style` decides what published files disagree on:
    - 'paper': stride in a stage's last unit, rate x unit rate in every unit, logits straight
      after the projection.
    - 'torchvision': stride in the first unit, which keeps the previous stage's rate; an extra
      3x3 convolution before the logits; an auxiliary head where `auxiliary`.
    - 'tensorflow': SAME padding, images padded to 16k+1 a side, align_corners, pooling first in
      the concatenation, batch normalisation folded into biases. MobileNetV2 only.
    """

    backbone: Backbone = "resnet101"
    num_classes: int = 21
    output_stride: int = 16
    multi_grid: tuple[int, ...] = (1, 2, 4)
    atrous_rates: tuple[int, ...] = (6, 12, 18)
    image_pooling: bool = True
    style: Style = "paper"
    auxiliary: bool = False
    # The paper states none; the authors' code keeps 0.9.
    dropout: float = 0.1
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        _check_choice("backbone", self.backbone, BACKBONES)
        _check_choice("style", self.style, STYLES)
        _check_choice("output_stride", self.output_stride, OUTPUT_STRIDES)
        if not _is_integer(self.num_classes) or not 2 <= self.num_classes <= MAX_CLASSES:
            raise ValueError(
                f"num_classes must be an integer from 2 to {MAX_CLASSES} (a mask is 8 bits and "
                f"255 means ignore), got {self.num_classes!r}"
            )
        for name in ("image_pooling", "auxiliary"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}; 0 turns it off")
        _check_pixel_statistics(self.mean, self.std)
        _check_rates("multi_grid", self.multi_grid)
        _check_rates("atrous_rates", self.atrous_rates)
        self._check_multi_grid()
        self._check_style()
        _ = self.rates

    @property
    def rates(self) -> tuple[int, ...]:
        """The rates of the 3x3 ASPP branches at this `output_stride`."""
        scaled = [rate * RATES_STRIDE for rate in self.atrous_rates]
        if any(rate % self.output_stride for rate in scaled):
            raise ValueError(
                f"atrous_rates {self.atrous_rates} (at output stride {RATES_STRIDE}) are no "
                f"integers at output_stride {self.output_stride}: give even rates, or an "
                f"output_stride of at most {RATES_STRIDE}"
            )
        return tuple(rate // self.output_stride for rate in scaled)

    def to_json(self) -> str:
        """This config as one line of JSON; `from_json` gives it back."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """The config that `to_json` wrote. Raises ValueError where it is not one."""
        try:
            fields: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"model config is no JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"model config must be a JSON object, got {type(fields).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(
                f"model config has unknown fields {unknown}, known are {known}; was it written "
                "by a newer version?"
            )
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        return cls(**values)

    def _check_multi_grid(self) -> None:
        if all(rate == 1 for rate in self.multi_grid):
            return
        if self.backbone == "mobilenet_v2":
            raise ValueError(
                f"multi_grid {self.multi_grid} is for ResNets; give (1, 1, 1) with mobilenet_v2"
            )
        units = 2 if self.backbone == "resnet18" else 3
        if len(self.multi_grid) != units:
            raise ValueError(
                f"multi_grid must hold {units} unit rates, one a unit of {self.backbone}'s last "
                f"stage, got {self.multi_grid}; (1, 1, 1) turns it off"
            )

    def _check_style(self) -> None:
        resnet = self.backbone != "mobilenet_v2"
        if self.style == "tensorflow" and resnet:
            raise ValueError(
                f"style 'tensorflow' is for backbone mobilenet_v2, got {self.backbone}; use "
                "'paper' or 'torchvision'"
            )
        if self.auxiliary and (self.style != "torchvision" or not resnet):
            raise ValueError(
                f"auxiliary=True needs style 'torchvision' and a ResNet, got {self.style!r} and "
                f"{self.backbone}; set auxiliary=False"
            )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    # A bool or a float that compares equal to an allowed number is still not it.
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def _check_rates(name: str, rates: object) -> None:
    if not isinstance(rates, tuple) or not all(_is_integer(r) and r > 0 for r in rates):
        raise ValueError(f"{name} must be a tuple of positive integers, got {rates!r}")


def _check_pixel_statistics(mean: object, std: object) -> None:
    for name, values in (("mean", mean), ("std", std)):
        if not (isinstance(values, tuple) and len(values) == 3 and all(map(_is_number, values))):
            raise ValueError(f"{name} must be three numbers, one a channel, got {values!r}")
        if any(not 0 <= value <= 1 for value in values) or (name == "std" and 0 in values):
            raise ValueError(
                f"{name} must be on the 0..1 pixel scale, got {values!r}; divide by 255?"
            )
