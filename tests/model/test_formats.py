"""File formats: tensors are read, no code runs, damaged files are refused in one line."""

import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from pipeline.model import weights
from pipeline.model.formats import CheckpointError, parse


class Bomb:
    """A pickle that creates a folder if its code is run."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_is_not_run(tmp_path):
    target = tmp_path / "made"
    torch.save({"state_dict": Bomb(target)}, tmp_path / "zip.pth")
    torch.save(Bomb(target), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Bomb(target)))
    for name in ("zip.pth", "old.pth", "plain.pkl"):
        with pytest.raises(CheckpointError, match=r"not loaded|cannot be read") as error:
            weights.load(str(tmp_path / name))
        assert "\n" not in str(error.value)
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "not a checkpoint"),
        (b"PK\x03\x04 and nothing of a zip", "not a valid zip archive"),
        (b"\x80\x02 no pickle", "not loaded|cannot be read"),
        (struct.pack("<Q", 10**9) + b'{"a":1}', "not a valid safetensors"),
        (struct.pack("<Q", 2) + b"{}", "no known checkpoint format"),
        ({"epoch": 3}, "no tensors"),
        (torch.zeros(3), "not a state_dict"),
        ({"conv1.weight": torch.zeros(1)}, "load_backbone"),
    ],
)
def test_a_file_that_is_not_a_checkpoint_is_refused(content, message, tmp_path):
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        weights.load(str(path))


def test_a_safetensors_length_is_not_mistaken_for_a_magic_number():
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    length = 0x0280
    data = struct.pack("<Q", length) + header.ljust(length) + bytes(4)
    assert data.startswith(b"\x80\x02")
    assert parse(data, name="file").tensors["w"].shape == (1,)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},  # beyond the end
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]},  # overflows
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},  # hides bytes
        {"dtype": "OBJ", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]},
        7,
    ],
)
def test_a_header_that_contradicts_its_tensors_is_refused_in_one_line(entry):
    header = json.dumps({"w": entry}).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    with pytest.raises(CheckpointError) as error:
        parse(struct.pack("<Q", len(header)) + header + bytes(4), name="file")
    assert "file" in str(error.value)
    assert "\n" not in str(error.value)


def test_overlapping_tensors_and_impossible_header_lengths_are_refused():
    both = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"a": both, "b": both}).encode()
    assert refusal(struct.pack("<Q", len(header)) + header + bytes(4))
    for length in (2**63, 2**64 - 1, 10**9, 5):
        assert refusal(struct.pack("<Q", length) + header + bytes(4))


def refusal(data):
    try:
        parse(data, name="file")
    except CheckpointError as error:
        return str(error)
    return ""


@settings(max_examples=80)
@given(cut=st.integers(0, 200), position=st.integers(0, 200), byte=st.integers(0, 255))
def test_damaged_bytes_give_tensors_or_a_one_line_error(cut, position, byte, damaged_files):
    for whole in damaged_files:
        data = bytearray(whole[: max(len(whole) - cut, 0)])
        if data:
            data[position * len(data) // 201] = byte
        assert "\n" not in refusal(bytes(data))


@pytest.fixture(scope="module")
def damaged_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tensors = {"w": torch.arange(6.0), "b": torch.ones(2)}
    torch.save(tensors, folder / "zip")
    torch.save(tensors, folder / "old", _use_new_zipfile_serialization=False)
    np.savez_compressed(folder / "npz.npz", w=np.arange(6.0))
    files = [(folder / name).read_bytes() for name in ("zip", "old", "npz.npz")]
    return [*files, save_safetensors(tensors, {"deeplab": "{}"})]
