"""Files of torch.save, read without running anything in them; and written again, one tensor at a time."""

from __future__ import annotations

import argparse
import enum
import io
import os
import pickle
import random
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import PATIENCE

from dmoe.checkpoint.stand_ins import StandIn
from dmoe.checkpoint.stored import Stored, cast, concatenated, cut, held, mapped, reshaped, same, stacked, taken
from dmoe.checkpoint.torch_reader import read_lazily
from dmoe.checkpoint.torch_writer import write_lazily

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def drawn(shape, dtype=torch.float32):
    return (
        torch.randint(0, 256, (torch.Size(shape).numel() * 16,), dtype=torch.uint8)[
            : torch.Size(shape).numel() * dtype.itemsize
        ]
        .view(dtype)
        .view(shape)
        if dtype != torch.bool
        else torch.randint(0, 2, shape).bool()
    )


def views():
    """Tensors as files may hold them: alone, parts of others, transposed, empty, single numbers, twice."""
    large = drawn((7, 9))
    twice = drawn((3, 2))
    return {
        "whole": drawn((4, 5, 2)),
        "rows": large[2:5],
        "columns": large[:, 3:6],
        "transposed": large.t(),
        "steps": large[::2, 1::3],
        "expanded": drawn((1, 4)).expand(3, 4),
        "number": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "first": twice,
        "second": twice,
        "parameter": torch.nn.Parameter(drawn((2, 2)).nan_to_num()),
    } | {str(dtype): drawn((3, 2), dtype) for dtype in DTYPES}


@pytest.mark.parametrize("old", [False, True], ids=["an archive", "as before 1.6"])
def test_tensors_are_read_when_asked_for_and_to_the_bit(tmp_path, old):
    tensors = views()
    if old:
        tensors = {name: tensor for name, tensor in tensors.items() if "float8" not in name}
    content = {"model": OrderedDict(tensors), "list": [1, (2.5, None)], "text": "ä"}
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=not old)
    found = read_lazily(tmp_path / "file.pt")
    assert found["list"] == content["list"]
    assert found["text"] == "ä"
    assert list(found["model"]) == list(tensors)
    for name, stored in found["model"].items():
        assert isinstance(stored, Stored)
        assert equal(stored.read(), tensors[name].detach()), name
        rows = stored.shape[0] if stored.shape else 0
        for start in range(rows):
            for stop in range(start, rows + 1):
                assert equal(stored.rows(start, stop), tensors[name].detach()[start:stop].contiguous())


def test_what_is_written_is_what_torch_reads(tmp_path):
    tensors = views()
    with open(tmp_path / "file.pt", "wb") as file:
        write_lazily(
            file, {"model": OrderedDict(tensors), "same": [tensors["first"]], "n": 3, "stored": held(tensors["rows"])}
        )
    found = torch.load(tmp_path / "file.pt", weights_only=True)
    assert all(equal(found["model"][name], tensors[name].detach()) for name in tensors)
    assert equal(found["stored"], tensors["rows"].contiguous())
    assert found["n"] == 3
    with zipfile.ZipFile(tmp_path / "file.pt") as archive:
        assert archive.testzip() is None
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in found["model"].values())


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """A writer asks for the next when it has written the one before, and tells how far it is."""
    alive, most, told = [], [], []

    def stored(number):
        def fetch(start, stop):
            made = torch.full((stop - start, 5), float(number))
            alive.append(number)
            most.append(len(alive) - len(told))
            return made

        return Stored((4, 5), torch.float32, fetch)

    with open(tmp_path / "file.pt", "wb") as file:
        write_lazily(file, {str(n): stored(n) for n in range(6)}, told.append)
    assert told == [80] * 6
    assert most == [1] * 6


@pytest.mark.parametrize("fails", ["reading", "the disk"])
def test_an_error_in_the_middle_is_an_error(tmp_path, fails):
    def fetch(start, stop):
        raise OSError(5, "Input/output error")

    content = {"a": held(torch.zeros(1000)), "b": Stored((2,), torch.float32, fetch)}
    if fails == "reading":
        with open(tmp_path / "file.pt", "wb") as file, pytest.raises(OSError, match="Input/output"):
            write_lazily(file, content)
    else:
        with pytest.raises(OSError, match="No space"), open("/dev/full", "wb") as file:
            write_lazily(file, {"a": held(torch.zeros(1 << 20))})


# ------------------------------------------------------------------------------------- objects of other packages


class Color(enum.Enum):
    RED = 1


def module_of(monkeypatch, name):
    """An empty module of this name that can be imported, whoever has made one before."""
    made = types.ModuleType(name)
    parts = name.split(".")
    for depth in range(1, len(parts)):
        part = ".".join(parts[:depth])
        if part not in sys.modules:
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, made)
    return made


def pickled_as(monkeypatch, path, factory):
    """A class under a name of another package."""
    module, _, name = path.rpartition(".")
    made = factory(name)
    made.__module__, made.__qualname__ = module, name
    setattr(module_of(monkeypatch, module), name, made)
    return made


@pytest.mark.parametrize("importable", [True, False])
@pytest.mark.parametrize("path", ["megatron.model.enums.Thing", "deepspeed.utils.Thing", "fairseq.data.Thing"])
def test_objects_of_frameworks_are_named_and_never_made(tmp_path, monkeypatch, path, importable):
    made = []

    def factory(name):
        return type(
            name, (), {"__init__": lambda self, *a: made.append(a), "__setstate__": lambda self, s: made.append(s)}
        )

    thing = pickled_as(monkeypatch, path, factory)(1)
    thing.value = 7
    content = {"args": argparse.Namespace(thing=thing, number=3), "w": torch.ones(2)}
    torch.save(content, tmp_path / "file.pt")
    made.clear()
    if not importable:
        monkeypatch.delitem(sys.modules, path.rpartition(".")[0])
    found = read_lazily(tmp_path / "file.pt")
    assert not made
    stand_in = found["args"].thing
    assert isinstance(stand_in, StandIn)
    assert stand_in.path == path
    assert stand_in.state == {"value": 7}
    with open(tmp_path / "again.pt", "wb") as file:
        write_lazily(file, found)
    assert not made
    again = read_lazily(tmp_path / "again.pt")
    assert again["args"].thing == stand_in
    if importable:
        assert type(torch.load(tmp_path / "again.pt", weights_only=False)["args"].thing).__name__ == "Thing"


def test_random_states_and_enumerations_come_back_as_they_were(tmp_path, monkeypatch):
    kind = pickled_as(
        monkeypatch, "megatron.model.enums.ModelType", lambda name: enum.Enum(name, {"encoder_or_decoder": 1})
    )
    generator = numpy.random.RandomState(3).get_state()
    content = {
        "args": argparse.Namespace(model_type=kind.encoder_or_decoder),
        "np_rng_state": generator,
        "scalar": numpy.float64(2.5),
        "random_rng_state": random.Random(1).getstate(),
        "rng": torch.get_rng_state(),
    }
    torch.save(content, tmp_path / "file.pt")
    found = read_lazily(tmp_path / "file.pt")
    assert str(found["args"].model_type) == "ModelType.encoder_or_decoder"
    with open(tmp_path / "again.pt", "wb") as file:
        write_lazily(file, found)
    again = torch.load(tmp_path / "again.pt", weights_only=False)
    assert again["args"].model_type is kind.encoder_or_decoder
    assert (again["np_rng_state"][1] == generator[1]).all()
    assert again["np_rng_state"][2:] == generator[2:]
    assert again["scalar"] == 2.5
    assert again["random_rng_state"] == content["random_rng_state"]
    assert torch.equal(again["rng"], content["rng"])


class Calls:
    """A pickle that calls something when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def raw(*operations):
    """Bytes of a pickle, by hand."""
    return b"\x80\x02" + b"".join(operations) + b"."


def archive_of(path, pickle_bytes):
    """A file of torch.save with a pickle of one's own."""
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        kept = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in kept.items():
            archive.writestr(name, pickle_bytes if name.endswith("data.pkl") else data)


def text(words):
    return b"X" + len(words).to_bytes(4, "little") + words.encode()


def calling(module, name, argument):
    return raw(f"c{module}\n{name}\n".encode(), text(argument), b"\x85R")


ATTACKS = {
    "os.system": calling("os", "system", "touch RAN"),
    "posix.system": calling("posix", "system", "touch RAN"),
    "subprocess": calling("subprocess", "getoutput", "touch RAN"),
    "eval": calling("builtins", "eval", "open('RAN', 'w')"),
    "eval of Python 2": calling("__builtin__", "eval", "open('RAN', 'w')"),
    "an import": calling("importlib", "import_module", "antigravity"),
    "runpy": calling("runpy", "run_path", "RAN.py"),
    "numpy": calling("numpy", "load", "RAN"),
    "numpy's own pickles": calling("numpy.core.multiarray", "fromfile", "RAN"),
    "torch.hub": calling("torch.hub", "load", "RAN"),
    "torch.load": calling("torch", "load", "RAN"),
    "a dotted name of a framework": calling("megatron", "os.system", "touch RAN"),
    "getattr of a module": raw(b"cbuiltins\ngetattr\n", b"cos\npath\n", text("system"), b"\x86R"),
    "getattr of a stand-in's class": raw(b"cbuiltins\ngetattr\n", b"cmegatron.a\nB\n", text("__init__"), b"\x86R"),
    "getattr of torch": raw(b"cbuiltins\ngetattr\n", b"ctorch\nfloat32\n", text("__reduce__"), b"\x86R"),
    "calling what getattr gave": raw(
        b"cbuiltins\ngetattr\n", b"cmegatron.a\nB\n", text("system"), b"\x86R", text("touch RAN"), b"\x85R"
    ),
}
# names of frameworks stand for themselves, and do nothing
HARMLESS = ("a dotted name of a framework", "getattr of a stand-in's class")


@pytest.mark.parametrize("old", [False, True], ids=["an archive", "as before 1.6"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_executed(tmp_path, monkeypatch, attack, old):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file.pt"
    if old:
        torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
        magic = io.BytesIO()
        for header in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(header, magic, protocol=2)
        file.write_bytes(magic.getvalue() + ATTACKS[attack] + pickle.dumps([], protocol=2))
    else:
        archive_of(file, ATTACKS[attack])
    imported = set(sys.modules)
    before = sorted(os.listdir(tmp_path))
    found = tried(file)
    assert isinstance(found, StandIn) or str(found).startswith(f"{file}: expected ")
    assert isinstance(found, StandIn) == (attack in HARMLESS)
    assert sorted(os.listdir(tmp_path)) == before
    assert "antigravity" not in set(sys.modules) - imported


def tried(file):
    """What is read, or the error."""
    try:
        return read_lazily(file)
    except ValueError as error:
        return error


def test_the_name_that_is_refused_is_told(tmp_path):
    torch.save({"a": torch.ones(1), "b": Calls(os.system, "touch ran")}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"file.pt: .* got posix.system: nothing of the file was executed"):
        read_lazily(tmp_path / "file.pt")


def test_installed_frameworks_are_not_imported(tmp_path):
    """In a process of its own, where nothing else has imported them."""
    for name in ("megatron", "fairseq"):
        file = tmp_path / f"{name}.pt"
        archive_of(file, calling(f"{name}.data", "Thing", "x"))
        code = (
            "import sys; from dmoe.checkpoint.torch_reader import read_lazily; "
            f"found = read_lazily({str(file)!r}); print(found.path, '{name}' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
        assert done.stdout.strip() == f"{name}.data.Thing False", done.stderr


def test_files_that_are_no_checkpoints(tmp_path):
    for name, content in {
        "empty": b"",
        "text": b"hello",
        "half an archive": b"PK\x03\x04" + bytes(100),
        "a pickle": pickle.dumps({"a": 1}),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: expected a whole file of torch.save, got"):
            read_lazily(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_lazily(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        read_lazily(tmp_path)


def test_a_file_cut_anywhere_is_told(tmp_path):
    torch.save({"a": torch.arange(100.0), "b": [torch.ones(3)]}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for length in range(0, len(whole) - 1, 97):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut.pt: expected a whole file of torch.save, got"):
            read_lazily(tmp_path / "cut.pt")


def test_a_file_that_changes_after_it_was_read_is_told(tmp_path):
    torch.save({"a": torch.arange(1000.0)}, tmp_path / "file.pt")
    stored = read_lazily(tmp_path / "file.pt")["a"]
    (tmp_path / "file.pt").write_bytes((tmp_path / "file.pt").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"file.pt: expected 4000 bytes at \d+, got \d+: the file is cut off"):
        stored.read()


# ------------------------------------------------------------------------------------------- tensors made of others


@st.composite
def tensors(draw, dims=(1, 4)):
    shape = draw(st.lists(st.integers(0, 5), min_size=dims[0], max_size=dims[1]))
    return torch.arange(torch.Size(shape).numel()).view(shape).float()


def agrees(stored, tensor):
    """Whether all of a tensor, and every range of its rows, is the one expected."""
    assert stored.shape == tuple(tensor.shape)
    assert stored.dtype == tensor.dtype
    assert torch.equal(stored.read(), tensor)
    for start in range(tensor.shape[0] + 1 if tensor.dim() else 0):
        for stop in range(start, tensor.shape[0] + 1):
            assert torch.equal(stored.rows(start, stop), tensor[start:stop])


@settings(deadline=None, max_examples=60)
@given(tensors(dims=(2, 4)), st.data())
def test_what_is_made_of_tensors_is_what_torch_makes(tensor, data):
    one = held(tensor) if data.draw(st.booleans()) else held(tensor.transpose(0, -1).clone().transpose(0, -1))
    dim = data.draw(st.integers(0, tensor.dim() - 1))
    start = data.draw(st.integers(0, tensor.shape[dim]))
    stop = data.draw(st.integers(start, tensor.shape[dim]))
    agrees(one, tensor)
    agrees(cut(one, dim, start, stop), tensor.narrow(dim, start, stop - start))
    agrees(
        concatenated([one, held(tensor + 1), cut(one, dim, start, stop)], dim),
        torch.cat([tensor, tensor + 1, tensor.narrow(dim, start, stop - start)], dim),
    )
    agrees(stacked([one, held(tensor + 1)]), torch.stack([tensor, tensor + 1]))
    agrees(reshaped(one, (tensor.numel(),)), tensor.reshape(-1))
    agrees(reshaped(reshaped(one, (tensor.numel(), 1)), tuple(tensor.shape)), tensor)
    agrees(cast(one, torch.float16), tensor.half())
    agrees(mapped([one], lambda t: t[0] * 2, by_rows=True), tensor * 2)
    agrees(mapped([one], lambda t: t[0].transpose(0, -1)), tensor.transpose(0, -1))
    for row in range(tensor.shape[0]):
        agrees(taken(one, row), tensor[row])
    assert same(one, held(tensor.clone()))
    if tensor.numel():
        assert not same(one, held(tensor + 1))
    assert not same(one, held(tensor.double()))


def test_parts_that_do_not_go_together():
    a, b = held(torch.zeros(2, 3), "a.pt"), held(torch.zeros(2, 4), "b.pt")
    for join in (stacked, concatenated):
        with pytest.raises(ValueError, match=r"b.pt: expected torch.float32 of \(2, 3\) as in a.pt, got .*\(2, 4\)"):
            join([a, b])
    with pytest.raises(ValueError, match=r"a.pt: expected numbers for \(7,\), got a tensor of \(2, 3\)"):
        reshaped(a, (7,))
    wrong = Stored((2, 3), torch.float32, lambda start, stop: torch.zeros(1), "c.pt")
    with pytest.raises(ValueError, match=r"c.pt: expected torch.float32 of \(2, 3\), got torch.float32 of \(1,\)"):
        wrong.read()


def test_bits_are_compared_not_numbers():
    nan = torch.tensor([float("nan")])
    assert same(held(nan), held(nan.clone()))
    assert not same(held(torch.tensor([0.0])), held(torch.tensor([-0.0])))
