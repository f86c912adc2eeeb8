"""The process that decodes untrusted bytes: `python -m pipeline.bulk.worker.decoder_process FD`.

It reads requests from the socket FD until its parent exits. It limits its own address space by
`RLIMIT_AS` and its time by an alarm, whose default action ends the process even inside C code that
holds the interpreter's lock, so that no hung decoder outlives its parent.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from typing import Any

import numpy as np

from pipeline.bulk.worker.decode import memory_file, receive, send
from pipeline.data import images, masks
from pipeline.data.labels import Classes

_ALARM_AFTER_DEADLINE_S = 5.0


def main(descriptor: int) -> None:
    """Answer requests until the socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    _silence_libraries()
    with socket.socket(fileno=descriptor) as connection:
        options, _ = receive(connection)
        classes = Classes.from_dict(options["classes"])
        _limit_memory(options["memory_bytes"])
        while True:
            try:
                request, data = receive(connection)
            except (EOFError, ConnectionError):
                return
            signal.setitimer(signal.ITIMER_REAL, options["deadline_s"] + _ALARM_AFTER_DEADLINE_S)
            try:
                _answer(connection, request, data, classes, options["max_pixels"])
            except MemoryError:
                limit = options["memory_bytes"] // 2**20
                message = f"decoding needs more than {limit} MiB of memory"
                send(connection, {"kind": "out_of_memory", "error": message})
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                os.close(data)


def _answer(
    connection: socket.socket,
    request: dict[str, Any],
    data: int,
    classes: Classes,
    max_pixels: int,
) -> None:
    encoded = _content(data)
    try:
        if request["what"] == "image":
            pixels = images.decode(encoded, max_pixels=max_pixels)
        else:
            size = (request["size"][0], request["size"][1])
            pixels = masks.decode_label(encoded, classes, size=size, max_pixels=max_pixels)
    except images.ImageError as error:
        send(connection, {"kind": error.kind, "error": str(error)})
    except masks.LabelError as error:
        send(connection, {"kind": "label", "error": str(error)})
    else:
        with memory_file(np.ascontiguousarray(pixels).data) as descriptor:
            send(connection, {"shape": pixels.shape}, descriptor)


def _content(descriptor: int) -> bytes:
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        file.seek(0)  # the position is shared with the process that wrote it
        return file.readall()


def _silence_libraries() -> None:
    """Discard what C libraries write to stderr; what Python writes is still shown."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _limit_memory(more: int) -> None:
    """Allow `more` bytes of address space on top of what this process has mapped so far."""
    with open("/proc/self/statm") as statm:
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, mapped + more))


if __name__ == "__main__":
    main(int(sys.argv[1]))
