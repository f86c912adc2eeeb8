"""A run's own files, read back: what is there may not be what was written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa

from pipeline.data import storage
from pipeline.runs.ray_connection import RunStoppedError

T = TypeVar("T")


def read_artifact(uri: str, parse: Callable[[bytes], T], *, hint: str) -> T:
    """What `parse` makes of the object's bytes.

    Raises RunStoppedError that names the object and says the `hint` where it makes nothing of
    them: arguments are not to blame for a file that something else cut or wrote over. Raises
    StorageError where storage refuses.
    """
    data = storage.read(uri)
    try:
        return parse(data)
    except (ValueError, KeyError, TypeError, OSError, pa.ArrowException) as error:
        why = f"{type(error).__name__}: {error}"
        raise RunStoppedError(f"{uri} is broken ({why:.200}): {hint}") from error
