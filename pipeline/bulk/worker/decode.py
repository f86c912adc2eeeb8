"""Decode untrusted bytes in child processes, whose crashes affect no other process.

Each child decodes one object at a time under an address-space limit and a deadline. Bytes go in
and pixels come back as anonymous shared memory (memfd) whose descriptors travel over a socket:
nothing has a name, so nothing is left behind after a crash. A child's crash or silence is
attributed to the object that it held. The children are plain interpreters, started before CUDA,
that import neither torch nor Ray.
"""

from __future__ import annotations

import array
import json
import math
import mmap
import os
import queue
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import pipeline
from pipeline.data.labels import Classes

Pixels = npt.NDArray[np.uint8]

_MESSAGE_BYTES = 65536
_MAPPED_FROM_BYTES = 4 * 2**20


class DecodeError(ValueError):
    """An object could not be decoded. `kind` is one of images.IMAGE_ERROR_KINDS, `label`,
    `timeout` (past the deadline), `out_of_memory` or `worker_died`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """Limits for decoding one object."""

    max_pixels: int
    deadline_s: float = 30.0
    memory_bytes: int = 3 * 2**30  # of address space, on top of the bare child's


class DecoderPool:
    """A pool of `count` child processes; `image` and `label` may be called from many threads."""

    def __init__(self, count: int, limits: DecodeLimits, classes: Classes) -> None:
        self._limits = limits
        options = {**asdict(limits), "classes": classes.to_dict()}
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        self._children = [_Child(options) for _ in range(count)]
        for child in self._children:
            self._idle.put(child)

    def image(self, data: bytes) -> Pixels:
        """Return the encoded image as (h, w, 3) RGB uint8. Raises DecodeError."""
        return self._ask({"what": "image"}, data)

    def label(self, data: bytes, size: tuple[int, int]) -> Pixels:
        """Return the encoded label of an image of `size` as (h, w) ids. Raises DecodeError."""
        return self._ask({"what": "label", "size": size}, data)

    def pids(self) -> list[int]:
        """Return the process ids of the children."""
        return [child.process.pid for child in self._children]

    def close(self) -> None:
        """End the children."""
        for child in self._children:
            child.end()

    def _ask(self, request: dict[str, Any], data: bytes) -> Pixels:
        """Send the request to a child, and once more after a crash, whose cause may be another."""
        child = self._idle.get()
        try:
            try:
                return child.ask(request, data, self._limits.deadline_s)
            except DecodeError as error:
                if error.kind != "worker_died":
                    raise
                return child.ask(request, data, self._limits.deadline_s)
        finally:
            self._idle.put(child)


class _Child:
    """A child process and the socket to it; a crashed one is replaced in place."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._start()

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "pipeline.bulk.worker.decoder_process",
                    str(theirs.fileno()),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(),
            )
        self._socket.send(json.dumps(self._options).encode())

    def end(self) -> None:
        self._socket.close()
        self.process.kill()
        self.process.wait()

    def ask(self, request: dict[str, Any], data: bytes, deadline_s: float) -> Pixels:
        if self.process.poll() is not None:  # it crashed while idle: the object is not the cause
            self.end()
            self._start()
        try:
            self._socket.settimeout(deadline_s)
            with memory_file(data) as descriptor:
                send(self._socket, request, descriptor)
            answer, pixels = receive(self._socket)
        except TimeoutError as error:
            self.end()
            self._start()
            raise DecodeError("timeout", f"not decoded within {deadline_s:g} s") from error
        except (EOFError, OSError) as error:
            self.end()
            code = self.process.returncode
            self._start()
            raise DecodeError("worker_died", f"its decoder process {_exit_reason(code)}") from error
        if "error" in answer:
            raise DecodeError(answer["kind"], answer["error"])
        return _mapped(pixels, tuple(answer["shape"]))


def _environment() -> dict[str, str]:
    """Return the parent's environment with this package on the path, and one thread per child."""
    root = str(Path(pipeline.__file__).parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {**os.environ, **threads, "PYTHONPATH": path}


def _exit_reason(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


class memory_file:  # noqa: N801 - a context manager, used like `open`
    """A descriptor of anonymous memory that holds `data`."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data).cast("B")

    def __enter__(self) -> int:
        self._descriptor = os.memfd_create("pixels")
        left = self._data
        while left:
            left = left[os.write(self._descriptor, left) :]
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def send(to: socket.socket, header: dict[str, Any], descriptor: int | None = None) -> None:
    """Send the header as one message, with a duplicate of the descriptor."""
    ancillary = []
    if descriptor is not None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
    to.sendmsg([json.dumps(header).encode()], ancillary)


def receive(source: socket.socket) -> tuple[dict[str, Any], int]:
    """Return the next message and its descriptor, or -1 if it has none. Raises EOFError."""
    message, descriptors, _, _ = socket.recv_fds(source, _MESSAGE_BYTES, 1)
    if not message:
        raise EOFError
    header: dict[str, Any] = json.loads(message)
    return header, descriptors[0] if descriptors else -1


def _mapped(descriptor: int, shape: tuple[int, ...]) -> Pixels:
    """Return the memory behind the descriptor as a read-only array, without a copy if large.

    A mapping holds a descriptor, so small arrays are copied: there may be thousands of them.
    """
    size = math.prod(shape)
    try:
        if size < _MAPPED_FROM_BYTES:
            return np.frombuffer(os.pread(descriptor, size, 0), np.uint8).reshape(shape)
        memory = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    except OSError as error:
        raise DecodeError("out_of_memory", f"cannot map {size} bytes of pixels") from error
    finally:
        os.close(descriptor)
    return np.frombuffer(memory, np.uint8).reshape(shape)
