"""Batch normalization in training: frozen, shared by workers, and on CPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.train.worker import batch_norm
from pipeline.train.worker.distributed import ProcessGroup, RayProcessGroup
from tests.train import tiny


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))


def test_frozen_layers_keep_their_statistics_and_train_scale_and_shift() -> None:
    torch.manual_seed(0)
    model = small().train()
    batch_norm.freeze(model)
    before = {key: value.clone() for key, value in model.named_buffers()}
    x = torch.randn(5, 3, 4, 4)
    model(x).pow(2).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())
    assert all(layer.weight.grad.any() for layer in batch_norm.layers(model))
    assert not torch.allclose(model(x).mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-3)
    model.train()
    model(x)
    assert all(int(layer.num_batches_tracked) == 1 for layer in batch_norm.layers(model))


def test_momentum_is_the_weight_of_a_batch_in_the_running_statistics() -> None:
    model = small().train()
    batch_norm.set_momentum(model, 0.25)
    x = torch.randn(6, 3, 4, 4)
    expected = 0.25 * model[0](x).mean(dim=(0, 2, 3)).detach()
    model(x)
    torch.testing.assert_close(model[1].running_mean, expected)


class Buffered(nn.Module):
    """A module with buffers of several types and shapes whose values depend on the rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.arange(6.0).reshape(2, 3) + 100 * rank)
        self.register_buffer("wide", torch.arange(3, dtype=torch.float64) - rank)
        self.register_buffer("count", torch.tensor(2**60 + rank))
        self.register_buffer("empty", torch.zeros(0))
        self.weight = nn.Parameter(torch.tensor(float(rank)))


def shared(group: ProcessGroup) -> tuple[dict[str, torch.Tensor], float]:
    module = Buffered(group.rank)
    group.broadcast_buffers(module)
    return dict(module.named_buffers()), float(module.weight.detach())


@pytest.mark.process
def test_every_worker_gets_the_buffers_of_rank_0_and_keeps_its_weights(tmp_path: Path) -> None:
    expected = dict(Buffered(0).named_buffers())
    for rank, (buffers, weight) in enumerate(tiny.run_workers(3, tmp_path, shared)):
        assert buffers.keys() == expected.keys()
        assert all(torch.equal(buffers[key], expected[key]) for key in expected)
        assert weight == rank


@pytest.mark.parametrize(
    ("device", "world_size", "converted"), [("cpu", 2, 0), ("cuda", 2, 2), ("cuda", 1, 0)]
)
def test_sync_batch_norm_is_used_on_several_gpus_only(
    device: str, world_size: int, converted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.train.torch.prepare_model", lambda module, **_: module)
    model = small()
    ids = {key: id(value) for key, value in model.named_parameters()}
    wrapped = RayProcessGroup(world_size=world_size, device=torch.device(device)).wrap(model)
    assert sum(isinstance(layer, nn.SyncBatchNorm) for layer in wrapped.modules()) == converted
    # an optimizer created before still holds the parameters
    assert {key: id(value) for key, value in wrapped.named_parameters()} == ids
