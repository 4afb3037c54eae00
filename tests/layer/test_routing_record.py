"""``dmoe.RoutingRecord``: cut, joined, as engines' arrays, and in files, damaged ones too."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dmoe
from dmoe import RoutingRecord


@st.composite
def records(draw, layers=None):
    """A record of any sizes, with choices that take no expert."""
    names = [f"layers.{n}.moe" for n in range(draw(st.integers(1, 4)))] if layers is None else layers
    experts, tokens = draw(st.sampled_from([1, 2, 9, 255, 256, 257, 40000])), draw(st.integers(0, 12))
    top_k = draw(st.integers(1, min(experts, 5)))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    choices = {}
    for name in names:
        ids = torch.rand(tokens, min(experts, 300)).topk(top_k, 1).indices + experts - min(experts, 300)
        choices[name] = torch.where(torch.rand(tokens, top_k) < 0.2, experts, ids)
    return RoutingRecord(choices, experts)


def test_ids_are_as_narrow_as_experts_let_them():
    for experts, dtype in [
        (1, torch.uint8),
        (255, torch.uint8),
        (256, torch.int16),
        (32767, torch.int16),
        (32768, torch.int32),
    ]:
        ids = torch.tensor([[experts], [experts - 1]])
        record = RoutingRecord({"a": ids}, experts)
        assert record.choices["a"].dtype == dtype
        assert torch.equal(record.choices["a"].long(), ids)


@settings(max_examples=60)
@given(record=records(), data=st.data())
def test_cut_and_joined(record, data):
    cut = data.draw(st.integers(0, record.num_tokens))
    parts = [record.tokens(slice(None, cut)), record.tokens(slice(cut, None))]
    assert RoutingRecord.cat(parts) == record
    order = torch.tensor(data.draw(st.permutations(range(record.num_tokens))), dtype=torch.long)
    shuffled = record.tokens(order)
    assert shuffled.tokens(torch.argsort(order)) == record
    mask = torch.rand(record.num_tokens) < 0.5
    assert record.tokens(mask) == record.tokens(mask.nonzero()[:, 0].tolist())
    between = data.draw(st.integers(0, len(record.layers)))
    stages = [record.select(record.layers[:between]), record.select(record.layers[between:])]
    assert RoutingRecord.merge(stages) == record
    assert record.renamed(map(str, range(len(record.layers)))).renamed(record.layers) == record
    longer = record.padded(2)
    assert longer.tokens(slice(None, -2) if record.num_tokens else slice(0, 0)) == record
    for layer, ids in longer.choices.items():
        assert ids[record.num_tokens :].eq(record.num_experts[layer]).all()


@settings(max_examples=60)
@given(record=records())
def test_engines_arrays_and_back(record):
    array = record.to_array()
    assert array.shape == (record.num_tokens, len(record.layers), array.shape[2])
    assert array.dtype == torch.int32
    (experts,) = set(record.num_experts.values())
    assert RoutingRecord.from_array(array, experts, record.layers) == record
    assert RoutingRecord.from_array(array.numpy(), experts, record.layers) == record
    # An engine's layers without experts hold zeros.
    every = torch.zeros(array.shape[0], 2 * array.shape[1], array.shape[2], dtype=torch.int32)
    every[:, 1::2] = array
    assert RoutingRecord.from_array(every, experts, record.layers, where=range(1, every.shape[1], 2)) == record


def test_an_array_without_names_is_numbered():
    assert RoutingRecord.from_array([[[0, 1], [1, 0]]], 2).layers == ("0", "1")


@settings(max_examples=40)
@given(record=records(), old=st.booleans())
def test_files(tmp_path_factory, record, old):
    path = tmp_path_factory.mktemp("record") / "routing"
    if old:
        path.write_bytes(b"old")
    record.save(path)
    loaded = RoutingRecord.load(path)
    assert loaded == record
    assert loaded.num_experts == record.num_experts
    assert [file.name for file in path.parent.iterdir()] == ["routing"]


def _saved(tmp_path):
    record = RoutingRecord({"a": torch.tensor([[0, 3], [2, 1], [4, 4]]), "b": torch.tensor([[1, 2]] * 3)}, 4)
    record.save(tmp_path / "routing")
    return record, tmp_path / "routing"


def test_safetensors_reads_the_file(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    record, path = _saved(tmp_path)
    assert {name: ids.tolist() for name, ids in safetensors.load_file(path).items()} == {
        name: ids.tolist() for name, ids in record.choices.items()
    }


def test_any_damage_is_one_clear_error(tmp_path):
    """Every byte changed, in turn, and every length cut: never another record, never another error."""
    _, path = _saved(tmp_path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for data in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :]):
            path.write_bytes(data)
            with pytest.raises(ValueError, match=r"^RoutingRecord\.load: .*/routing: expected a whole file"):
                RoutingRecord.load(path)


@pytest.mark.parametrize("kind", ["empty", "text", "pickle", "other"])
def test_other_files(tmp_path, kind):
    path = tmp_path / "routing"
    if kind == "pickle":
        torch.save({"a": torch.ones(3)}, path)
    elif kind == "other":
        header = json.dumps({"__metadata__": {"sha256": "x"}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
    else:
        path.write_bytes(b"" if kind == "empty" else b"The quick brown fox jumps over the lazy dog")
    with pytest.raises(
        ValueError, match=r"^RoutingRecord\.load: .*: expected a whole file that RoutingRecord\.save wrote"
    ):
        RoutingRecord.load(path)
    with pytest.raises(OSError, match="nowhere"):
        RoutingRecord.load(tmp_path / "nowhere")


def test_a_file_that_lies_about_its_experts(tmp_path):
    from dmoe.record_file import write_tensors

    about = {"format": "dmoe.RoutingRecord", "version": "1", "num_experts": '{"a": 2}'}
    write_tensors(tmp_path / "f", {"a": torch.tensor([[7]], dtype=torch.uint8)}, about)
    with pytest.raises(ValueError, match=r"expected a record of version 1, got .*expected ids in \[0, 2\]"):
        RoutingRecord.load(tmp_path / "f")
    write_tensors(tmp_path / "f", {"a": torch.tensor([[1]], dtype=torch.uint8)}, about | {"version": "2"})
    with pytest.raises(
        ValueError, match=r"expected a record of version 1, got format 'dmoe.RoutingRecord', version '2'"
    ):
        RoutingRecord.load(tmp_path / "f")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    record, path = _saved(tmp_path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        record.padded(1).save(path)
    assert RoutingRecord.load(path) == record
    assert [file.name for file in tmp_path.iterdir()] == ["routing"]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: RoutingRecord({"a": torch.tensor([[5]])}, 4), r"layer a: expected ids in \[0, 4\]"),
        (lambda: RoutingRecord({"a": torch.tensor([[-1]])}, 4), r"layer a: expected ids in \[0, 4\].*got -1 to -1"),
        (lambda: RoutingRecord({"a": torch.tensor([[1, 1]])}, 4), r"layer a: expected different experts.*\[1, 1\]"),
        (lambda: RoutingRecord({"a": torch.tensor([1])}, 4), r"layer a: expected integers of shape \(tokens, K\)"),
        (lambda: RoutingRecord({"a": torch.tensor([[1.0]])}, 4), "layer a: expected integers of shape"),
        (
            lambda: RoutingRecord({"a": torch.tensor([[1]])}, {"b": 4}),
            "num_experts: expected one for each of the layers",
        ),
        (lambda: RoutingRecord({"a": torch.zeros(1, 1).int(), "b": torch.zeros(2, 1).int()}, 4), "as many tokens"),
        (
            lambda: RoutingRecord.from_array([[1, 2]], 4),
            r"from_array: expected integers of shape \(tokens, layers, K\)",
        ),
        (lambda: RoutingRecord.from_array([[[1, 2]]], 4, ["a", "b"]), "layers: expected 1 names"),
        (lambda: RoutingRecord.from_array([[[1, 2]]], 4, where=[1]), "where: expected layers of the array, 0 to 0"),
        (lambda: RoutingRecord.cat([]), "cat: expected at least one record"),
        (lambda: RoutingRecord.cat([_one(4), _one(5)]), "cat: expected records of the same layers"),
        (lambda: RoutingRecord.merge([_one(4), _one(4)]), "merge: expected each layer once"),
        (lambda: _one(4).select(["b"]), r"select: layers: expected some of \['a'\], got \['b'\]"),
        (lambda: _one(4).renamed(["b", "c"]), "renamed: layers: expected 1 different names"),
        (lambda: _one(4).tokens([3]), "tokens: expected a slice, a mask .* or ids of 2 tokens"),
        (lambda: _one(4).tokens(torch.ones(3).bool()), "tokens: expected a slice"),
    ],
    ids=range(17),
)
def test_what_does_not_fit_is_named(call, match):
    with pytest.raises(ValueError, match=f"^RoutingRecord.*{match}"):
        call()


def _one(experts):
    return RoutingRecord({"a": torch.tensor([[0, 1], [2, 3]])}, experts)


def test_public_names():
    assert dmoe.RoutingRecord is RoutingRecord
    assert "2]" in repr(_one(4))
    assert _one(4) != 3
