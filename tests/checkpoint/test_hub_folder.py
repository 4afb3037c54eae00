"""Folders in Hugging Face's format: what is written is read, in parts too, and a failure leaves nothing."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmoe.checkpoint.hub_folder import INDEX, SINGLE, HubFolder, read_index
from dmoe.checkpoint.hub_writer import ShardWriter, name_shards
from dmoe.checkpoint.new_folder import new_folder

TENSORS = {
    "embed": torch.arange(12.0).view(4, 3),
    "layer.0": torch.arange(40, dtype=torch.bfloat16).view(2, 5, 4),
    "scale": torch.tensor(7, dtype=torch.int64),
    "none": torch.empty(0, 3, dtype=torch.float16),
}


def add(writer, *names):
    for name in names:
        writer.add(name, torch.ones(3))


def stopped(folder):
    written(folder)
    raise KeyboardInterrupt


def written(folder, limit=2**20):
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, limit) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    return folder


@pytest.mark.parametrize(("limit", "files"), [(2**20, [SINGLE]), (90, 2), (1, 4)])
def test_what_is_written_is_read(tmp_path, limit, files):
    folder = written(tmp_path / "model", limit)
    index = read_index(folder)
    if limit == 2**20:
        assert os.listdir(folder) == files
    else:
        names = [f"model-{n:05d}-of-{files:05d}.safetensors" for n in range(1, files + 1)]
        assert sorted(os.listdir(folder)) == [*names, INDEX]
        assert json.loads((folder / INDEX).read_text())["metadata"] == {"total_size": 48 + 80 + 8}
    assert index.keys() == TENSORS.keys()
    with HubFolder(folder) as read:
        assert set(read) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert (read.shape(name), read.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
            assert torch.equal(read.read(name), tensor)
        assert torch.equal(read.read("layer.0", slice(1, 2), slice(0, 3)), TENSORS["layer.0"][1:2, 0:3])
        with pytest.raises(ValueError, match="expected a tensor other, got none"):
            read.read("other")


def test_tensors_that_share_memory_are_written_as_two(tmp_path):
    base = torch.arange(6.0)
    with ShardWriter(tmp_path) as writer:
        for name, tensor in {"a": base, "b": base, "c": base[2:], "d": base.view(2, 3).t()}.items():
            writer.add(name, tensor)
    read = load_file(tmp_path / SINGLE)
    assert read["a"].tolist() == read["b"].tolist() == [0, 1, 2, 3, 4, 5]
    assert (read["c"].tolist(), read["d"].tolist()) == ([2, 3, 4, 5], [[0, 3], [1, 4], [2, 5]])


def test_several_writers_leave_one_model(tmp_path):
    parts = {}
    for rank in range(2):
        writer = ShardWriter(tmp_path)
        writer.add(f"expert.{rank}", torch.full((3,), float(rank)))
        parts |= writer.close()
    with pytest.raises(FileNotFoundError):
        read_index(tmp_path)  # nothing before it is named
    assert len(name_shards(tmp_path, parts)) == 2
    with HubFolder(tmp_path) as read:
        assert read.read("expert.1").tolist() == [1, 1, 1]
    with pytest.raises(FileExistsError, match="expected a folder without a model"):
        name_shards(tmp_path, parts)


def test_an_error_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="twice: expected one tensor of this name"), ShardWriter(tmp_path, 1) as writer:
        add(writer, "once", "twice", "twice")
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="expected tensors to write, got none"), ShardWriter(tmp_path):
        pass
    with pytest.raises(ValueError, match="max_shard_bytes: expected at least 1, got 0"):
        ShardWriter(tmp_path, 0)


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt), new_folder(path) as folder:
        stopped(folder)
    assert os.listdir(tmp_path) == []
    path.mkdir()  # an empty one is as good as none
    with new_folder(path) as folder:
        written(folder)
        (folder / "config.json").write_text("{}")
        assert os.listdir(path) == []
    assert sorted(os.listdir(path)) == ["config.json", SINGLE]
    with pytest.raises(FileExistsError, match="expected nothing of that name"), new_folder(path):
        pass
    with new_folder(path, overwrite=True) as folder:
        (folder / "new").touch()
        assert (path / SINGLE).exists()
    assert os.listdir(path) == ["new"]
    with pytest.raises(FileExistsError, match="a model's folder to replace"), new_folder(path, overwrite=True):
        pass  # whatever it is, it is no model
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ("[]", "expected a JSON object, got list"),
        ("{", "expected a JSON object, got: "),
        ("{}", "expected a weight_map"),
        ('{"weight_map": {"a": "../other.safetensors"}}', r"in the same folder, got '\.\./other\.safetensors'"),
        ('{"weight_map": {"a": "part.bin"}}', "names of safetensors files"),
        ('{"weight_map": {"a": 3}}', "names of safetensors files"),
        ('{"weight_map": {"a": "part.safetensors", "b": 3}}', "names of safetensors files"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "expected gone.safetensors"),
        ('{"weight_map": {"b": "part.safetensors"}}', "expected b, as .* says"),
        ('{"weight_map": {"a": "broken.safetensors"}}', "expected a safetensors file, got: "),
    ],
)
def test_damaged_folders_are_refused(tmp_path, index, match):
    save_file({"a": torch.ones(2)}, tmp_path / "part.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"0123456789")
    (tmp_path / INDEX).write_text(index)
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        HubFolder(tmp_path)


def test_pickles_are_not_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="got neither"):
        read_index(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"got pytorch_model\.bin \(convert it: a pickle can run code\)"):
        read_index(tmp_path)
