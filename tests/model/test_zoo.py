"""Public weight files: downloaded once, verified on each use, and loaded by name."""

import functools
import hashlib
import http.server
import io
import threading

import pytest
import torch

from pipeline.data.storage import StorageError
from pipeline.model import weights, zoo
from pipeline.model.config import ModelConfig
from pipeline.model.deeplab import DeepLabV3
from pipeline.model.formats import CheckpointError
from tests.model.published import constants, resnet_shapes, torchvision_shapes


def pickled(tensors):
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def published():
    """Return two small files, with names like those of the zoo."""
    networks = {
        "tiny_coco": pickled(constants(torchvision_shapes("resnet18", classes=5))),
        "tiny": pickled(constants(resnet_shapes("resnet18") | {"fc.bias": (1000,)})),
    }
    return {
        f"{name}-{hashlib.sha256(data).hexdigest()[:8]}.pth": data
        for name, data in networks.items()
    }


@pytest.fixture
def host(published, tmp_path, monkeypatch):
    """Run a local web server that holds the files and records its requests."""
    folder = tmp_path / "host"
    folder.mkdir()
    for name, data in published.items():
        (folder / name).write_bytes(data)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *_args):
            server.requests.append(self.path)  # type: ignore[attr-defined]

        def log_error(self, *_args):
            pass

    make = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), make) as server:
        server.requests, server.folder = [], folder  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(zoo, "HOST", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setattr(zoo, "FILES", tuple(published))
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setenv(zoo.CACHE_VARIABLE, str(tmp_path / "cache"))
        yield server
        server.shutdown()


def test_a_network_is_loaded_by_name_and_downloaded_once(host, published):
    for _ in range(2):
        model, _ = weights.load("zoo:tiny_coco", output_stride=16)
        assert (model.config.num_classes, model.config.output_stride) == (5, 16)
    assert len(host.requests) == 1
    path = zoo.fetch("tiny_coco")
    assert path.read_bytes() == published[path.name]
    assert [entry.name for entry in zoo.cache_folder().iterdir()] == [path.name]


@pytest.mark.slow
def test_a_backbone_is_loaded_by_name(host):
    model = DeepLabV3(ModelConfig(backbone="resnet18", style="torchvision", multi_grid=(1, 1)))
    weights.load_backbone(model, "zoo:tiny")
    wanted = constants(resnet_shapes("resnet18"))
    state = model.backbone.state_dict()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    with pytest.raises(CheckpointError, match="load_backbone"):
        weights.load("zoo:tiny")


def test_a_wrong_response_leaves_nothing_in_the_cache(host):
    (name,) = (file for file in zoo.FILES if file.startswith("tiny-"))
    (host.folder / name).write_bytes(b"<html>sign in to this network</html>")
    with pytest.raises(CheckpointError, match=rf"not the published {name}.*sha256.*deleted"):
        zoo.fetch("tiny")
    assert not list(zoo.cache_folder().iterdir())


def test_a_damaged_file_in_the_cache_is_deleted_and_downloaded_next_time(host, published):
    path = zoo.fetch("tiny")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"deleted: run again"):
        zoo.fetch("tiny")
    assert zoo.fetch("tiny").read_bytes() == published[path.name]


def test_without_a_network_the_error_names_the_file_and_its_place(host, monkeypatch, published):
    # A port on which no server listens.
    host.shutdown()
    host.server_close()
    with pytest.raises(StorageError) as error:
        weights.load("zoo:tiny_coco")
    file = next(name for name in published if name.startswith("tiny_coco"))
    message = str(error.value)
    assert f"{zoo.HOST}{file}" in message
    assert str(zoo.cache_folder() / file) in message
    assert "\n" not in message
    assert not list(zoo.cache_folder().iterdir())

    (zoo.cache_folder() / file).write_bytes(published[file])
    assert weights.load("zoo:tiny_coco")[0].config.num_classes == 5


def test_a_file_missing_on_the_host_is_reported(host):
    for path in host.folder.iterdir():
        path.unlink()
    with pytest.raises(StorageError, match="404"):
        zoo.fetch("tiny")


def test_a_broken_connection_leaves_nothing_in_the_cache(host, monkeypatch):
    def broken(self, source, outputfile):
        outputfile.write(source.read(100))

    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "copyfile", broken)
    with pytest.raises((StorageError, CheckpointError)):
        zoo.fetch("tiny")
    assert not list(zoo.cache_folder().iterdir())


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'resnet152'.*resnet101, mobilenet_v2$"):
        weights.load("zoo:resnet152")


def test_file_names_hold_a_unique_name_and_eight_digits():
    assert all(len(file.rpartition("-")[2].removesuffix(".pth")) == 8 for file in zoo.FILES)
    names = [file.rpartition("-")[0] for file in zoo.FILES]
    assert len(set(names)) == len(names) == 7
