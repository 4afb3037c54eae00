"""Megatron-DeepSpeed checkpoints for tests: made, taken apart by a way of their own, damaged, compared."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from argparse import Namespace

import make_deepspeed_ckpt as maker
import numpy as np
import torch

from dmoe.checkpoint.__main__ import main
from dmoe.checkpoint.torch_reader import read_lazily
from dmoe.checkpoint.torch_writer import write_lazily


@contextlib.contextmanager
def megatron_classes():
    """What pickles of Megatron need to be loaded as they are; modules of that name are as before afterwards."""
    before = dict(sys.modules)
    try:
        maker.stand_in_modules()
        yield
    finally:
        for name in sys.modules.keys() - before.keys():
            if name.partition(".")[0] == "megatron":
                del sys.modules[name]


def make(folder, *arguments):
    """A checkpoint in a new folder, which is returned."""
    with megatron_classes():
        maker.main([str(folder), *map(str, arguments)])
    return folder


def convert(*arguments):
    """The command in this process; its exit status."""
    return main(["convert", *map(str, arguments)])


def original(*arguments):
    """The model that ``make`` writes for these arguments, as dmoe names and orders it: from the generator alone."""
    options = maker.parser().parse_args(["unused", *map(str, arguments)])
    full, moe = maker.full_model(options)
    kind = maker.DTYPES[options.dtype]
    heads, h = options.heads, options.hidden

    def tensor(array, dtype=kind):
        return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)

    def rows(array):  # head, then q, k, v -> all q, all k, all v
        cut = array.reshape(heads, 3, h // heads, -1)
        return np.concatenate([cut[:, n].reshape(h, -1) for n in range(3)]).reshape(array.shape)

    found = {
        "embedding.weight": tensor(full["word_embeddings.weight"]),
        "positions.weight": tensor(full["position_embeddings.weight"]),
    }
    for n in range(options.layers):
        ours, theirs = f"blocks.{n}.", f"layers.{n}."
        for kind_of in ("weight", "bias"):
            for a, b in (
                ("attention_norm", "input_layernorm"),
                ("attention.out", "self_attention.dense"),
                ("ffn_norm", "post_attention_layernorm"),
            ):
                found[f"{ours}{a}.{kind_of}"] = tensor(full[f"{theirs}{b}.{kind_of}"])
            qkv = full[f"{theirs}self_attention.query_key_value.{kind_of}"]
            found[f"{ours}attention.qkv.{kind_of}"] = tensor(rows(qkv))
        dense = {}
        if n not in moe:
            dense["ffn."] = "mlp."
        elif options.coefficient:
            dense["ffn.mlp."] = "mlp.mlp."
            for kind_of in ("weight", "bias"):
                found[f"{ours}ffn.coefficient.{kind_of}"] = tensor(full[f"{theirs}mlp.coefficient.{kind_of}"])
        for a, b in dense.items():
            for kind_of in ("weight", "bias"):
                found[f"{ours}{a}up_proj.{kind_of}"] = tensor(full[f"{theirs}{b}dense_h_to_4h.{kind_of}"])
                found[f"{ours}{a}down_proj.{kind_of}"] = tensor(full[f"{theirs}{b}dense_4h_to_h.{kind_of}"])
        if n in moe:
            layer = ours + ("ffn.moe." if options.coefficient else "ffn.")
            found[layer + "router.weight"] = tensor(full[f"{theirs}mlp.gate.wg.weight"], torch.float32)
            for a, b in (
                ("up_proj", "dense_h_to_4h.weight"),
                ("up_bias", "dense_h_to_4h.bias"),
                ("down_proj", "dense_4h_to_h.weight"),
                ("down_bias", "dense_4h_to_h.bias"),
            ):
                each = [full[f"{theirs}mlp.experts.{e}.{b}"] for e in range(options.experts)]
                found[f"{layer}experts.{a}"] = tensor(np.stack(each))
    for kind_of in ("weight", "bias"):
        found[f"norm.{kind_of}"] = tensor(full[f"final_layernorm.{kind_of}"])
    return found


def assert_tensors(model, expected):
    """Whether a model has these tensors, bit for bit."""
    assert model.tensors.keys() == expected.keys()
    for name, stored in model.tensors.items():
        assert same_bits(stored.read(), expected[name]), name


def same_bits(a, b):
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def edit(path, change):
    """Change what a file of torch.save holds; ``change`` gets it and works in place."""
    content = read_lazily(path)
    change(content)
    other = path.with_suffix(".new")
    with open(other, "wb") as file:
        write_lazily(file, content)
    os.replace(other, path)


def set_args(folder, **values):
    """Change arguments in the files of all ranks; None removes one."""

    def change(content):
        for name, value in values.items():
            vars(content["args"]).pop(name, None)
            if value is not None:
                vars(content["args"])[name] = value

    for path in folder.rglob("*.pt"):
        if "expert" not in path.name:
            edit(path, change)


def listing(*folders):
    """Every file below with its hash, and every folder."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return found


def loaded(path):
    """A file, by PyTorch itself and with the classes that its pickle names."""
    with megatron_classes():
        return torch.load(path, weights_only=False)


def differences(a, b, where=""):
    """Where two contents of files differ, in order of keys, types, or any bit of a tensor."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if same_bits(a, b) else [where]
    if isinstance(a, Namespace) and isinstance(b, Namespace):
        a, b = vars(a), vars(b)
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b):
            return [f"{where}: {list(a)} {list(b)}"]
        return [each for key in a for each in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and type(a) is type(b) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [each for n, (x, y) in pairs for each in differences(x, y, f"{where}/{n}")]
    if isinstance(a, np.ndarray):
        return [] if np.array_equal(a, b) else [where]
    return [] if type(a).__name__ == type(b).__name__ and str(a) == str(b) else [f"{where}: {a!r} {b!r}"]


def assert_same_files(first, other):
    """Whether two folders have the same files, with the same contents but for how the archives are packed."""
    names = sorted(str(path.relative_to(first)) for path in first.rglob("*"))
    assert names == sorted(str(path.relative_to(other)) for path in other.rglob("*"))
    for name in names:
        if name.endswith(".pt"):
            assert differences(loaded(first / name), loaded(other / name)) == [], name
        elif (first / name).is_file():
            assert (first / name).read_bytes() == (other / name).read_bytes()
