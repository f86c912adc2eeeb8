"""What the tests of the network share: one thread, seeded weights, small configs."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def randomise() -> Callable[..., nn.Module]:
    """Gives a network weights and BN statistics that no layer's default could hide behind."""

    def fill(model: nn.Module, *, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, nn.Conv2d):
                    fan = layer.weight[0].numel()
                    layer.weight.normal_(0, (2 / fan) ** 0.5, generator=generator)
                    if layer.bias is not None:
                        layer.bias.normal_(0, 0.3, generator=generator)
                if isinstance(layer, nn.BatchNorm2d):
                    layer.weight.uniform_(0.5, 1.2, generator=generator)
                    layer.bias.normal_(0, 0.3, generator=generator)
                    layer.running_mean.normal_(0, 0.3, generator=generator)
                    layer.running_var.uniform_(0.5, 2, generator=generator)
        return model.eval()

    return fill
