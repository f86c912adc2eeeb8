"""File formats of weight files: bytes -> named tensors, and never any code.

Enters: the bytes of an untrusted file. Leaves: a `TensorFile`, or a `CheckpointError` of one
line. Reads safetensors, PyTorch's pickles (tensors only) and NumPy's npz (no objects).
"""

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from pipeline.text import first_line, first_names

MAX_NPZ_BYTES = 1 << 30
"""Unpacked; the largest DeepLab has a quarter of it, a zip bomb more."""

WRAPPERS = ("model", "state_dict", "model_state")
PREFIXES = ("module.", "_orig_mod.")


class CheckpointError(ValueError):
    """A weight file that cannot be used; the message is one line: which file, what, way out."""


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """The tensors of a file by name, its metadata, and whether it is a TensorFlow npz."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    npz: bool = False


def parse(data: bytes, *, name: str) -> TensorFile:
    """The tensors in `data`; `name` is the file's, for messages. Raises CheckpointError."""
    # First: a header's length, in the first eight bytes, may look like any other magic number.
    if data[5:9] == b"\0\0\0{":
        return _read_safetensors(data, name)
    if data[:4] == b"PK\x03\x04":
        members = _zip_members(data, name)
        if any(member.filename.endswith(".npy") for member in members):
            return TensorFile(tensors=_read_npz(data, members, name), npz=True)
        return TensorFile(tensors=_read_pickle(data, name))
    if data[:1] == b"\x80":
        return TensorFile(tensors=_read_pickle(data, name))
    raise CheckpointError(
        f"{name} ({len(data)} bytes) is no checkpoint: it is neither safetensors, a PyTorch .pth "
        "nor an npz; was it downloaded whole?"
    )


def _read_safetensors(data: bytes, name: str) -> TensorFile:
    try:
        tensors = safetensors.torch.load(data)
        # load() leaves the metadata out; it has checked that this is a JSON object.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{name} is no whole safetensors file ({first_line(error)}); was it cut short?"
        ) from None
    return TensorFile(tensors=tensors, metadata=header.get("__metadata__") or {})


def _read_pickle(data: bytes, name: str) -> dict[str, torch.Tensor]:
    try:
        # Its warnings are about what the error below says in one line.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{name} is refused: it is a pickle that is damaged or holds more than tensors; save "
            "its state_dict alone, or as safetensors"
        ) from None
    # Bytes from anywhere drive torch's unpickler, which may fail in any way.
    except Exception as error:
        raise CheckpointError(
            f"{name} cannot be read as a PyTorch file "
            f"({type(error).__name__}: {first_line(error)}); was it cut short?"
        ) from None
    return _state_dict(content, name)


def _state_dict(content: Any, name: str) -> dict[str, torch.Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{name} holds a {type(content).__name__}, no state_dict; save model.state_dict()"
        )
    tensors = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{name} holds no tensors, only {first_names(sorted(map(str, content)))}; save "
            f"model.state_dict() itself or under one of {', '.join(WRAPPERS)}"
        )
    return {_strip(key): tensor for key, tensor in tensors.items()}


def _strip(key: str) -> str:
    while key.startswith(PREFIXES):
        key = key.partition(".")[2]
    return key


def _zip_members(data: bytes, name: str) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise CheckpointError(
            f"{name} is no whole zip archive ({first_line(error)}); was it cut short?"
        ) from None


def _read_npz(data: bytes, members: list[zipfile.ZipInfo], name: str) -> dict[str, torch.Tensor]:
    size = sum(member.file_size for member in members)
    if size > MAX_NPZ_BYTES:
        raise CheckpointError(f"{name} unpacks to {size} bytes, over {MAX_NPZ_BYTES}; not read")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        return {key: torch.from_numpy(array) for key, array in arrays.items()}
    # Damaged members fail in zlib, zipfile or NumPy, in many ways.
    except Exception as error:
        raise CheckpointError(
            f"{name} cannot be read as an npz ({type(error).__name__}: {first_line(error)})"
        ) from None
