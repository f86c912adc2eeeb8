"""Cross entropy whose mean is over the global batch, however it is spread over workers.

Each photo has a weight that follows from its label alone, so the sum over all workers is known
before any of them runs the network. A photo's part of the loss depends on that photo alone: hard
pixels are chosen within it. So neither the number of workers nor micro-batches change the loss.
"""

from __future__ import annotations

import torch
from torch.nn import functional


class PixelLoss(torch.nn.Module):
    """Sums of weighted cross entropy over the valid pixels of a batch.

    `class_weights` is (k,) float or None for ones; a pixel weighs what its class weighs. Of each
    photo's valid pixels the share `hard_share`, those of the largest loss, count.
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
                f"class_weights are {tuple(weights.shape)}, but num_classes is {num_classes}"
            )
        self.ignore_index = ignore_index
        self.hard_share = hard_share
        self.register_buffer("class_weights", weights, persistent=False)

    def weight(self, labels: torch.Tensor) -> torch.Tensor:
        """What the photos with these labels (n, h, w) weigh in the mean: a float64 scalar."""
        pixels = labels.flatten(1).long()
        valid = pixels != self.ignore_index
        weights = torch.where(valid, self.class_weights[pixels * valid], 0.0).double()
        share = self._kept(valid) / valid.sum(1).clamp(min=1)
        return (weights.sum(1) * share).sum()

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum of the loss of logits (n, k, h, w) against labels (n, h, w).

        It is in the class weights' type, fp32, whatever the network computes in.

        0, with zero gradients, where no pixel is valid. Divide by the sum of `weight` over the
        global batch for the mean.
        """
        # one row a pixel, as channels-last logits lie in memory: a third faster on a CPU
        losses = functional.cross_entropy(
            logits.to(self.class_weights.dtype).permute(0, 2, 3, 1).flatten(0, 2),
            labels.long().flatten(),
            weight=self.class_weights,
            ignore_index=self.ignore_index,
            reduction="none",
        )
        if self.hard_share == 1:
            return losses.sum()
        return self._hardest(losses.view(len(labels), -1), labels.flatten(1) != self.ignore_index)

    def _kept(self, valid: torch.Tensor) -> torch.Tensor:
        """How many pixels of each photo (n,) count, of its `valid` ones (n, pixels)."""
        return (valid.sum(1) * self.hard_share).ceil().long()

    def _hardest(self, losses: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        # an ignored pixel's loss is 0: it comes after every valid one, and adds nothing
        ordered = losses.sort(dim=1, descending=True).values
        ranks = torch.arange(losses.shape[1], device=losses.device)
        return (ordered * (ranks < self._kept(valid)[:, None])).sum()
