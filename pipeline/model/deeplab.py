"""DeepLabv3 with ASPP, cascade or decoder: normalized images (n, 3, h, w) -> logits (n, k, h, w).

`logits` computes logits at feature resolution, and `upsample` resizes them once, so that
multi-scale inference resizes straight to the original size. Output stride and rates are not
weights: `set_output_stride` changes them at any time.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from pipeline.model.config import ModelConfig
from pipeline.model.convolution import initialize_weights
from pipeline.model.features import Features
from pipeline.model.heads import build_auxiliary_head, build_head, initialize_logits
from pipeline.model.mobilenet import MobileNetV2
from pipeline.model.resize import Size, resize, resize_aligned, resize_rows
from pipeline.model.resnet import ResNet

TENSORFLOW_GRID = 16
"""TensorFlow's DeepLab pads sides to 16k + 1, so that strides of 2 keep corners aligned."""


class TrainingLogits(NamedTuple):
    """The output in training of a network with an auxiliary head: both (n, k, h, w)."""

    logits: torch.Tensor
    auxiliary: torch.Tensor


class DeepLabV3(nn.Module):
    """The network of a `ModelConfig`, with fresh weights.

    Returns logits (n, k, h, w) of the input's size; in training, a network with an auxiliary
    head returns `TrainingLogits`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone: ResNet | MobileNetV2
        if config.backbone == "mobilenet_v2":
            self.backbone = MobileNetV2(folded=config.style == "tensorflow")
        else:
            self.backbone = ResNet(
                config.backbone, stride_last=config.style == "paper", blocks=config.blocks
            )
        self.classifier = build_head(self.backbone.channels, self.backbone.low_channels, config)
        self.aux_classifier: nn.Sequential | None = None
        if config.auxiliary:
            assert isinstance(self.backbone, ResNet)
            channels = self.backbone.middle_channels
            self.aux_classifier = build_auxiliary_head(channels, config.num_classes)
        initialize_weights(self)
        for head in filter(None, (self.classifier, self.aux_classifier)):
            initialize_logits(head)
        self.set_output_stride(config.output_stride)

    @property
    def align_corners(self) -> bool:
        """Whether images and logits are resized with the centers of the corner pixels aligned."""
        return self.config.style == "tensorflow"

    def set_output_stride(self, output_stride: int) -> None:
        """Change strides and rates in place, and `config` with them.

        Raises ValueError, and changes nothing, if the network has no such output stride or a rate
        would not be an integer.
        """
        config = dataclasses.replace(self.config, output_stride=output_stride)
        if isinstance(self.backbone, ResNet):
            self.backbone.set_strides(output_stride=output_stride, multi_grid=config.multi_grid)
        else:
            self.backbone.set_strides(output_stride=output_stride)
        self.classifier.set_rates(config.rates)
        self.config = config

    def forward(self, x: torch.Tensor) -> torch.Tensor | TrainingLogits:
        height, width = x.shape[-2:]
        size = (height, width)
        features = self._features(x)
        logits = self.upsample(self.classifier(features), image_size=size, size=size)
        if not self.training or self.aux_classifier is None:
            return logits
        auxiliary = self.aux_classifier(features.middle)
        return TrainingLogits(logits, self.upsample(auxiliary, image_size=size, size=size))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (n, k, fh, fw) of images (n, 3, h, w) at feature resolution.

        That is the output stride, or 4 with a decoder. In TensorFlow's style the logits include
        the padding of the images, which `upsample` removes.
        """
        logits: torch.Tensor = self.classifier(self._features(x))
        return logits

    def upsample(
        self, logits: torch.Tensor, *, image_size: Size, size: Size, rows: slice | None = None
    ) -> torch.Tensor:
        """Return the logits of images of `image_size` (h, w), resized once, bilinearly, to `size`.

        With `rows` (start, stop), return only those rows of the result.
        """
        if self.align_corners:
            stride = (self.config.output_stride, self.config.output_stride)
            rows = slice(None) if rows is None else rows
            return resize_aligned(
                logits, stride=stride, image_size=image_size, size=size, rows=rows
            )
        if rows is None:
            return resize(logits, size, align_corners=False)
        return resize_rows(logits, size, rows)

    def _features(self, x: torch.Tensor) -> Features:
        if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape:
            raise ValueError(
                f"images must be (n, 3, h, w), each at least 1, got {tuple(x.shape)}; add a batch "
                "axis, or permute from (n, h, w, 3)?"
            )
        features: Features = self.backbone(self._pad(x))
        return features

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        # Zero is the mean color after normalization, which the zoo's networks were trained with.
        if self.config.style != "tensorflow":
            return x
        grid = max(TENSORFLOW_GRID, self.config.output_stride)
        bottom, right = (-(size - 1) % grid for size in x.shape[-2:])
        return functional.pad(x, (0, right, 0, bottom)) if bottom or right else x
