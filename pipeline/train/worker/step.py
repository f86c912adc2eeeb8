"""One training step: a worker's part of a batch in, one update of the weights out.

The update is that of the mean loss over the valid pixels of the *global* batch, however many
workers and micro-batches it is split into (arXiv 1706.05587, Sec. 4.1). DDP averages the workers'
gradients, so each worker's sum is divided by the global weight and multiplied by the world size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.model import devices
from pipeline.model.deeplab import DeepLabV3, TrainingLogits
from pipeline.train.recipes.experiment import OptimizerConfig
from pipeline.train.worker import batch_norm
from pipeline.train.worker.distributed import ProcessGroup, seed_step
from pipeline.train.worker.loss import PixelLoss
from pipeline.train.worker.schedule import poly
from pipeline.train.worker.state import TrainingState

DECODER_STRIDE = 4
"""Output stride of the logits of a network with a decoder."""


class Objective(nn.Module):
    """The summed loss of images (n, h, w, 3) uint8 and labels (n, h, w) uint8.

    It contains the network, so that a wrapper for several workers sees a single forward pass.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: DeepLabV3, loss: PixelLoss, config: OptimizerConfig) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self._config = config
        dtype = next(model.parameters()).dtype
        for name in ("mean", "std"):
            values = torch.tensor(getattr(model.config, name), dtype=dtype).mul(255)[:, None, None]
            self.register_buffer(name, values, persistent=False)

    def train(self, mode: bool = True) -> Objective:
        """Set the training mode, but keep frozen batch normalization frozen."""
        super().train(mode)
        if mode and self._config.freeze_bn:
            batch_norm.freeze(self.model)
        return self

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        pixels = images.permute(0, 3, 1, 2).to(self.mean.dtype).sub_(self.mean).div_(self.std)
        if not self._config.upsample_logits:
            return self._loss(self.model.logits(pixels), labels)
        outputs = self.model(pixels)
        if not isinstance(outputs, TrainingLogits):
            return self._loss(outputs, labels)
        auxiliary = self._loss(outputs.auxiliary, labels)
        return self._loss(outputs.logits, labels) + self._config.auxiliary_weight * auxiliary

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the labels at the resolution of the loss: that of the features, if not upsampled.

        Feature i is compared with pixel i x stride. Source: arXiv 1706.05587, Table 8.
        """
        if self._config.upsample_logits:
            return labels
        stride = DECODER_STRIDE if self.model.config.decoder else self.model.config.output_stride
        return labels[:, ::stride, ::stride]

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        summed: torch.Tensor = self.loss(logits, labels)
        return summed


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Result of one step: global loss, this worker's share of it, and the learning rate."""

    loss: float
    own_loss: float
    lr: float


class Trainer:
    """The training steps of a run on one worker; each changes `state` in place."""

    def __init__(
        self,
        state: TrainingState,
        loss: PixelLoss,
        config: OptimizerConfig,
        group: ProcessGroup,
        seed: int,
    ) -> None:
        self._state, self._config, self._group, self._seed = state, config, group, seed
        self._objective = Objective(state.model, loss, config).to(group.device)
        self._wrapped = group.wrap(self._objective)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> StepResult:
        """Train on this worker's part of the batch: (n, h, w, 3) and (n, h, w), both uint8."""
        state, config = self._state, self._config
        lr = poly(
            state.step, base_lr=config.base_lr, max_steps=config.max_steps, power=config.power
        )
        for parameters in state.optimizer.param_groups:
            parameters["lr"] = lr * parameters["lr_factor"]
        self._wrapped.train()
        seed_step(self._seed, state.step, self._group.rank)
        state.optimizer.zero_grad(set_to_none=True)
        images = images.to(self._group.device)
        labels = self._objective.targets(labels.to(self._group.device))
        weight = float(self._group.sum(self._objective.loss.weight(labels)))
        own_loss = self._backward(images, labels, max(weight, 1e-12))
        state.optimizer.step()
        state.step += 1
        if state.average is not None:
            state.average.update_parameters(state.model)
        loss = float(self._group.sum(torch.tensor(own_loss, dtype=torch.float64)))
        return StepResult(loss=loss, own_loss=own_loss, lr=lr)

    def _backward(self, images: torch.Tensor, labels: torch.Tensor, weight: float) -> float:
        """Accumulate the gradients of all micro-batches; return this worker's share of the loss."""
        size = self._config.micro_batch or len(images)
        parts = list(zip(torch.split(images, size), torch.split(labels, size), strict=True))
        total = torch.zeros((), dtype=torch.float64)
        for index, (image, label) in enumerate(parts):
            with self._sync_if(index + 1 == len(parts)), self._autocast():
                summed = self._wrapped(image, label)
                (summed * (self._group.world_size / weight)).backward()
            total += summed.detach().double().cpu()
        return float(total) / weight

    @contextlib.contextmanager
    def _sync_if(self, last: bool) -> Iterator[None]:
        """Exchange gradients between workers only with the last micro-batch of a step."""
        wrapped = self._wrapped
        if last or not isinstance(wrapped, DistributedDataParallel):
            yield
            return
        with wrapped.no_sync():
            yield

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        enabled = self._config.bf16 and devices.has_bf16(self._group.device)
        return torch.autocast(self._group.device.type, torch.bfloat16, enabled=enabled)


def build_optimizer(model: DeepLabV3, config: OptimizerConfig) -> torch.optim.SGD:
    """Return SGD without decay of vectors (normalization, biases); its groups have `lr_factor`."""
    heads = [model.classifier] + ([model.aux_classifier] if model.aux_classifier else [])
    head_ids = {id(parameter) for head in heads for parameter in head.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        key = (id(parameter) in head_ids, parameter.ndim > 1)
        groups.setdefault(key, []).append(parameter)
    return torch.optim.SGD(
        [
            {
                "params": parameters,
                "lr_factor": config.head_lr_factor if is_head else 1.0,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (is_head, decays), parameters in groups.items()
        ],
        lr=config.base_lr,
        momentum=config.momentum,
    )


def build_average(model: DeepLabV3, config: OptimizerConfig) -> AveragedModel | None:
    """Return the moving average of weights and buffers, None if the experiment has none."""
    if not config.ema_decay:
        return None
    average = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
