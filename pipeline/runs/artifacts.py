"""Read back files of a run and report corruption."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa

from pipeline.data import storage
from pipeline.runs.ray_connection import RunStoppedError

T = TypeVar("T")


def read_artifact(uri: str, parse: Callable[[bytes], T], *, hint: str) -> T:
    """Return `parse` of the object's bytes.

    Raises RunStoppedError, which names the object and ends with `hint`, if `parse` fails: the file
    was damaged, and the user's arguments are not the cause. Raises StorageError if the object
    cannot be read.
    """
    data = storage.read(uri)
    try:
        return parse(data)
    except (ValueError, KeyError, TypeError, OSError, pa.ArrowException) as error:
        why = f"{type(error).__name__}: {error}"
        raise RunStoppedError(f"{uri} is corrupt ({why:.200}): {hint}") from error
