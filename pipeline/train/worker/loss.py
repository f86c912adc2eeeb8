"""Pixel-wise cross entropy, to be averaged over the global batch.

The weight of an image follows from its label alone, so the total over all workers is known before
the forward pass. The loss of an image depends on that image alone: hard pixels are selected within
it. So the loss depends neither on the number of workers nor on micro-batches.
"""

from __future__ import annotations

import torch
from torch.nn import functional


class PixelLoss(torch.nn.Module):
    """Sum of the weighted cross entropy over the valid pixels of a batch.

    `class_weights` (k,) holds the weight of a pixel of each class; None is 1 for all. Of the valid
    pixels of each image only the fraction `hard_share` with the largest loss counts.
    """

    class_weights: torch.Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int,
        class_weights: torch.Tensor | None = None,
        hard_share: float = 1.0,
    ) -> None:
        super().__init__()
        weights = torch.ones(num_classes) if class_weights is None else class_weights.float()
        if weights.shape != (num_classes,):
            raise ValueError(
                f"class_weights has shape {tuple(weights.shape)}; num_classes is "
                f"{num_classes}, so it must be ({num_classes},)"
            )
        self.ignore_index = ignore_index
        self.hard_share = hard_share
        self.register_buffer("class_weights", weights, persistent=False)

    def weight(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the weight in the mean of images with these labels (n, h, w): float64, scalar."""
        pixels = labels.flatten(1).long()
        valid = pixels != self.ignore_index
        weights = torch.where(valid, self.class_weights[pixels * valid], 0.0).double()
        share = self._kept(valid) / valid.sum(1).clamp(min=1)
        return (weights.sum(1) * share).sum()

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the summed loss of logits (n, k, h, w) against labels (n, h, w).

        Divide it by the sum of `weight` over the global batch for the mean. It has the type of the
        class weights (fp32) whatever the network computes in, and is 0, with zero gradients, if
        no pixel is valid.
        """
        # one row per pixel is the memory layout of channels-last logits: faster on a CPU
        losses = functional.cross_entropy(
            logits.to(self.class_weights.dtype).permute(0, 2, 3, 1).flatten(0, 2),
            labels.long().flatten(),
            weight=self.class_weights,
            ignore_index=self.ignore_index,
            reduction="none",
        )
        if self.hard_share == 1:
            return losses.sum()
        return self._sum_hardest(
            losses.view(len(labels), -1), labels.flatten(1) != self.ignore_index
        )

    def _kept(self, valid: torch.Tensor) -> torch.Tensor:
        """Return how many of the `valid` pixels (n, pixels) count in each image: (n,)."""
        return (valid.sum(1) * self.hard_share).ceil().long()

    def _sum_hardest(self, losses: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        # ignored pixels have a loss of 0: they sort last and add nothing
        ordered = losses.sort(dim=1, descending=True).values
        ranks = torch.arange(losses.shape[1], device=losses.device)
        return (ordered * (ranks < self._kept(valid)[:, None])).sum()
