"""What version 84b697e left (`make.py` made it), uploaded to where it was made."""

from __future__ import annotations

import json
import lzma
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import storage

VERSION = "84b697e"
PREFIX = f"s3://tests/{VERSION}"
FOLDER = Path(__file__).parent / VERSION
CHECKPOINT = Path(__file__).parents[2] / "jobs" / "demo" / "tfzoo-voc-mobilenetv2.safetensors"
INPUTS = ("photos", "labels", "set", "inventory.csv", "init.safetensors.xz")

Upload = Callable[[str], str]


@pytest.fixture(scope="session")
def flags() -> dict[str, Any]:
    """The flags with which the runs were started."""
    found: dict[str, Any] = json.loads((FOLDER / "flags.json").read_text())
    return found


@pytest.fixture(scope="session")
def inputs(s3_environment: dict[str, str]) -> Iterator[None]:
    """Images, labels, data set and weights at their URIs."""
    for name in INPUTS:
        _upload(FOLDER / name)
    storage.write(f"{PREFIX}/checkpoint.safetensors", CHECKPOINT.read_bytes())
    yield
    storage.delete([each.uri for each in storage.list_objects(PREFIX)])


@pytest.fixture(scope="session")
def upload(inputs: None) -> Upload:
    """`upload("killed")` restores the files of a run, if any changed, and returns their URI.

    Its leases are rewritten to those of a process of this machine that has ended.
    """
    uploaded: dict[str, dict[str, str]] = {}

    def restore(place: str) -> str:
        uri = f"{PREFIX}/{place}"
        if uploaded.get(place) == _etags(uri):
            return uri
        storage.delete([each.uri for each in storage.list_objects(uri)])
        _upload(FOLDER / place)
        for each in list(storage.list_objects(uri)):
            if each.uri.endswith(".json") and "lease" in each.uri:
                lease = {**json.loads(storage.read(each.uri)), **_ended_process()}
                storage.write(each.uri, json.dumps(lease).encode())
        uploaded[place] = _etags(uri)
        return uri

    return restore


@pytest.fixture(scope="session")
def stored() -> Callable[[str], dict[str, str]]:
    """`stored(uri)`: the name and ETag of every object below `uri`."""
    return _etags


def _etags(uri: str) -> dict[str, str]:
    return {storage.relative(uri, each.uri): each.etag for each in storage.list_objects(uri)}


def _upload(path: Path) -> None:
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            name, data = file.relative_to(FOLDER).as_posix(), file.read_bytes()
            if name.endswith(".xz"):
                name, data = name.removesuffix(".xz"), lzma.decompress(data)
            storage.write(f"{PREFIX}/{name}", data)


def _ended_process() -> dict[str, Any]:
    """What a lease says of its holder, for a process that has just ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = os.readlink("/proc/self/ns/pid")
    return {"pid": process.pid, "host": socket.gethostname(), "boot": f"{boot} {namespace}"}
