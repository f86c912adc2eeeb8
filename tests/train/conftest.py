"""Fixtures of the training tests: one thread, a small data set, and a finished run on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.train.worker import loop
from pipeline.train.worker.distributed import ProcessGroup
from tests.train import tiny
from tests.train.tiny import RecordingListener


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread: faster for images this small; training sets the number per process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of six training and five val images."""
    root = tmp_path_factory.mktemp("set")
    tiny.write_dataset(root)
    return root


@pytest.fixture(scope="module")
def uninterrupted(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the --out of a finished run of four steps."""
    out = tmp_path_factory.mktemp("uninterrupted")
    listener = RecordingListener()
    loop.train(tiny.worker_spec(root, out, tiny.experiment()), ProcessGroup(), listener)
    assert [row.step for row in listener.rows] == [1, 2, 3, 4]
    assert listener.failures == []
    return out
