"""Configuration of a network: it builds the network and is stored in its checkpoint.

Every `ModelConfig` is validated when it is created, so any instance can be built.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pipeline.checks import (
    check_choice,
    check_fraction,
    check_integer,
    check_pixel_statistics,
    check_positive_integers,
)

Backbone = Literal["resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2"]
Style = Literal["paper", "torchvision", "tensorflow"]
HeadKind = Literal["aspp", "cascade"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RATES_STRIDE = 16
"""The output stride at which `atrous_rates` are given (arXiv 1706.05587, Sec. 3.3)."""

MAX_CLASSES = 255
"""A mask has 8 bits, and 255 is reserved for ignored pixels."""

MAX_SCALE = 8.0
"""Our limit for image scales in training and evaluation: memory grows with the square."""

MAX_CONVS = 8
"""Our limit, so that a checkpoint's JSON cannot ask for a million layers."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A DeepLabv3. The defaults are the paper's final model, trained at output stride 16.

    `style` selects the variant where published implementations differ:
    - 'paper': stride in a block's last unit, rate x unit rate in every unit.
    - 'torchvision': stride in the first unit, which keeps the previous block's rate; the style
      of all ImageNet files. `num_convs=0` combines it with the paper's head.
    - 'tensorflow': SAME padding, images padded to sides of 16k + 1, align_corners, pooling first
      in the concatenation, batch normalization folded into biases. MobileNetV2 only.

    Raises ValueError if fields are invalid or do not fit together.
    """

    backbone: Backbone = "resnet101"
    """The network that computes the features."""
    num_classes: int = 21
    """Number of classes: channels of the logits."""
    output_stride: int = 16
    """Image pixels per feature along a side: a power of two from 4 to 32, or up to 64, 128 or 256
    with 5, 6 or 7 blocks."""
    multi_grid: tuple[int, ...] = (1, 2, 4)
    """Unit rates of the fourth and later blocks (Sec. 3.2.1)."""
    head: HeadKind = "aspp"
    """'aspp' is atrous spatial pyramid pooling (Sec. 3.3); 'cascade' is a 1x1 convolution after
    cascaded blocks (Sec. 3.2) and needs `atrous_rates=(), image_pooling=False`."""
    blocks: int = 4
    """Blocks of a cascaded ResNet, 4 to 7; those after the fourth are copies of it."""
    atrous_rates: tuple[int, ...] = (6, 12, 18)
    """Rates of the head's 3x3 branches, one per branch, at output stride 16; they are scaled by
    16 / `output_stride`. () has no such branches."""
    image_pooling: bool = True
    """Whether the head also uses the mean of the whole image's features."""
    decoder: bool = False
    """Refine with features of stride 4 (DeepLabv3+, arXiv 1802.02611); logits are at stride 4."""
    num_convs: int | None = None
    """3x3 convolutions before the logits. The default follows the head's source: two in the
    decoder, one in torchvision's ASPP head, otherwise none."""
    style: Style = "paper"
    """The variant, where published implementations differ."""
    auxiliary: bool = False
    """Train with torchvision's auxiliary head on the third block."""
    dropout: float = 0.1
    """Dropout before the logits: the authors' code; the paper does not state it."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of red, green and blue pixels, scaled to 0..1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of red, green and blue pixels, scaled to 0..1."""

    def __post_init__(self) -> None:
        self._check_values()
        self._check_head()
        self._check_style()
        self._check_strides()
        self._check_multi_grid()
        _ = self.rates

    @property
    def rates(self) -> tuple[int, ...]:
        """Rates of the 3x3 ASPP branches at this `output_stride`."""
        scaled = [rate * RATES_STRIDE for rate in self.atrous_rates]
        if any(rate % self.output_stride for rate in scaled):
            raise ValueError(
                f"atrous_rates {self.atrous_rates} (at output stride {RATES_STRIDE}): must be "
                f"integers at output_stride {self.output_stride} too; give even rates, or an "
                f"output_stride of at most {RATES_STRIDE}"
            )
        return tuple(rate // self.output_stride for rate in scaled)

    @property
    def convs(self) -> int:
        """Number of 3x3 convolutions before the logits: `num_convs` or its default."""
        if self.num_convs is not None:
            return self.num_convs
        if self.decoder:
            return 2
        return 1 if self.head == "aspp" and self.style == "torchvision" else 0

    def to_json(self) -> str:
        """Return the config as one line of JSON, for `from_json`."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """Return the config that `to_json` wrote; an older version's JSON may lack fields.

        Raises ValueError if `text` is not a config.
        """
        try:
            fields: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"model config is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"model config must be a JSON object, got {type(fields).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(
                f"model config has unknown fields {unknown}; known fields are {known}; was it "
                "written by a newer version?"
            )
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        return cls(**values)

    def _check_values(self) -> None:
        check_choice("backbone", self.backbone, get_args(Backbone))
        check_choice("style", self.style, get_args(Style))
        check_choice("head", self.head, get_args(HeadKind))
        for name in ("image_pooling", "decoder", "auxiliary"):
            check_choice(name, getattr(self, name), (True, False))
        check_integer(
            "num_classes",
            self.num_classes,
            2,
            MAX_CLASSES,
            "a mask has 8 bits, and 255 means ignore",
        )
        check_integer("blocks", self.blocks, 4, 7, "the paper's cascade ends at block7")
        if self.num_convs is not None:
            check_integer(
                "num_convs", self.num_convs, 0, MAX_CONVS, "None uses the default of the head"
            )
        check_fraction("dropout", self.dropout, "0 turns it off")
        check_pixel_statistics(self.mean, self.std)
        check_positive_integers("multi_grid", self.multi_grid)
        check_positive_integers("atrous_rates", self.atrous_rates)

    def _check_head(self) -> None:
        if self.head == "aspp":
            if self.blocks != 4:
                raise ValueError(
                    f"blocks={self.blocks} needs head 'cascade'; ASPP follows block4: give blocks=4"
                )
            return
        if self.backbone == "mobilenet_v2":
            raise ValueError("head 'cascade' is for ResNets, got mobilenet_v2; use head 'aspp'")
        wanted = {
            "atrous_rates": (), "image_pooling": False, "decoder": False, "auxiliary": False
        }  # fmt: skip
        wrong = [f"{name}={value}" for name, value in wanted.items() if getattr(self, name)]
        wrong += ["num_convs=None"] if self.convs else []
        if wrong:
            raise ValueError(
                f"head 'cascade' is a 1x1 convolution after the last block: give {', '.join(wrong)}"
            )

    def _check_style(self) -> None:
        resnet = self.backbone != "mobilenet_v2"
        if self.style == "tensorflow" and resnet:
            raise ValueError(
                f"style 'tensorflow' is for backbone mobilenet_v2, got {self.backbone}; use "
                "'paper' or 'torchvision'"
            )
        if self.style == "tensorflow" and (self.decoder or self.convs):
            raise ValueError(
                "style 'tensorflow' computes logits right after the ASPP: give decoder=False, "
                "num_convs=None, or use 'paper' or 'torchvision'"
            )
        if self.auxiliary and (self.style != "torchvision" or not resnet):
            raise ValueError(
                f"auxiliary=True needs style 'torchvision' and a ResNet, got style {self.style!r} "
                f"and {self.backbone}; give auxiliary=False"
            )

    def _check_strides(self) -> None:
        possible = tuple(2**power for power in range(2, self.blocks + 2))
        check_choice(
            "output_stride",
            self.output_stride,
            possible,
            f"with {self.blocks} blocks",
        )

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
                f"multi_grid {self.multi_grid}: must be {units} unit rates, one per unit of "
                f"{self.backbone}'s block4; (1, 1, 1) turns it off"
            )
