"""Parsers for untrusted weight files: bytes -> named tensors, without running any code.

Reads safetensors, PyTorch's pickles (tensors only) and NumPy's npz (no objects).
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
"""Limit of the unpacked size, against zip bombs; the largest DeepLab needs a quarter of it."""

WRAPPERS = ("model", "state_dict", "model_state")
PREFIXES = ("module.", "_orig_mod.")


class CheckpointError(ValueError):
    """A weight file that cannot be used; the message is one line that names the file."""


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """The tensors of a file by name, its metadata, and whether it is an npz (TensorFlow)."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    npz: bool = False


def parse(data: bytes, *, name: str) -> TensorFile:
    """Return the tensors in `data`, the bytes of the file `name`.

    Raises CheckpointError if they cannot be read.
    """
    # Tested first, because safetensors begins with a length that may look like a magic number.
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
        f"{name} ({len(data)} bytes) is not a checkpoint: it is neither safetensors, a PyTorch "
        ".pth nor an npz file; is the download complete?"
    )


def _read_safetensors(data: bytes, name: str) -> TensorFile:
    try:
        tensors = safetensors.torch.load(data)
        # load() does not return the metadata, but has checked that it is a JSON object.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{name} is not a valid safetensors file ({first_line(error)}); is it complete?"
        ) from None
    return TensorFile(tensors=tensors, metadata=header.get("__metadata__") or {})


def _read_pickle(data: bytes, name: str) -> dict[str, torch.Tensor]:
    try:
        # The errors below say in one line what its warnings are about.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{name} is a pickle that is damaged or holds more than tensors, so it is not loaded; "
            "save only its state_dict, or use safetensors"
        ) from None
    # Given arbitrary bytes, torch's unpickler may raise anything.
    except Exception as error:
        raise CheckpointError(
            f"{name} cannot be read as a PyTorch file "
            f"({type(error).__name__}: {first_line(error)}); is it complete?"
        ) from None
    return _state_dict(content, name)


def _state_dict(content: Any, name: str) -> dict[str, torch.Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{name} holds a {type(content).__name__}, not a state_dict; save model.state_dict()"
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
            f"{name} is not a valid zip archive ({first_line(error)}); is it complete?"
        ) from None


def _read_npz(data: bytes, members: list[zipfile.ZipInfo], name: str) -> dict[str, torch.Tensor]:
    size = sum(member.file_size for member in members)
    if size > MAX_NPZ_BYTES:
        raise CheckpointError(
            f"{name} unpacks to {size} bytes; the limit is {MAX_NPZ_BYTES}, so it is not loaded"
        )
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        return {key: torch.from_numpy(array) for key, array in arrays.items()}
    # zlib, zipfile and NumPy raise many kinds of errors for damaged members.
    except Exception as error:
        raise CheckpointError(
            f"{name} cannot be read as an npz ({type(error).__name__}: {first_line(error)})"
        ) from None
