"""Fixtures for tests of the network: one thread, random weights, temporary files."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
def randomize() -> Callable[..., nn.Module]:
    """Return a function that sets random weights and batch statistics, unlike any default."""

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


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes bytes, or else an object by torch.save, to a file."""

    def write(content: Any, name: str = "file.bin") -> str:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        return str(path)

    return write
