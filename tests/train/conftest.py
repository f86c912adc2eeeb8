"""What the tests of training share: one thread, a small set, and a run that ended on it."""

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
    """Photos this small are slower on two, and what trains or looks sets the process's number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photos to train on and five of val."""
    root = tmp_path_factory.mktemp("set")
    tiny.write_dataset(root)
    return root


@pytest.fixture(scope="module")
def undisturbed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of four steps has ended."""
    out = tmp_path_factory.mktemp("undisturbed")
    heard = RecordingListener()
    loop.train(tiny.worker_spec(root, out, tiny.experiment()), ProcessGroup(), heard)
    assert [row.step for row in heard.rows] == [1, 2, 3, 4]
    assert heard.failures == []
    return out
