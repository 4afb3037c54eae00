"""V-MoE's arrays: layers compute what its formulas say, and come back as the file they were."""

from __future__ import annotations

import math
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch

import dmoe
from dmoe.checkpoint.formats.base import Options
from dmoe.checkpoint.formats.vmoe import VMOE
from dmoe.checkpoint.model import Model
from dmoe.checkpoint.stored import held

H, F, E, T = 8, 12, 4, 24
LAYER = "Encoder/encoderblock_{}/Moe/"


def arrays(prefix="", dtype=np.float64):
    draw = np.random.default_rng(0)
    shapes = {"embedding/kernel": (4, 4, 3, H), "Encoder/encoderblock_0/MlpBlock_3/Dense_0/kernel": (H, F)}
    for layer in (1, 11):
        shapes |= {
            LAYER.format(layer) + "Mlp/Dense_0/bias": (E, F),
            LAYER.format(layer) + "Mlp/Dense_0/kernel": (E, H, F),
            LAYER.format(layer) + "Mlp/Dense_1/bias": (E, H),
            LAYER.format(layer) + "Mlp/Dense_1/kernel": (E, F, H),
            LAYER.format(layer) + "Router/dense/kernel": (H, E),
        }
    found = {prefix + name: draw.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    return found | {"step": np.array(7, dtype=np.int32), "none": np.zeros((0, 3), dtype=np.float16)}


def saved(path, content=None, save=np.savez):
    save(path, **(arrays() if content is None else content))
    return path


def read(path):
    return VMOE.read([path], Options())


def content(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def layer_of(model, prefix, **changed):
    layer = dmoe.MoE(replace(model.layers[prefix], **changed)).double().eval()
    layer.load_state_dict({name: tensor.read().double() for name, tensor in model.of_layer(prefix).items()})
    return layer


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def by_formula(given, prefix, x, capacity):
    """Two best of the softmax, first choices before second ones, later tokens dropped: V-MoE in evaluation."""
    logits = x @ given[prefix + "Router/dense/kernel"]
    scores = np.exp(logits - logits.max(1, keepdims=True))
    scores /= scores.sum(1, keepdims=True)
    best = np.argsort(-scores, 1)[:, :2]
    y, taken = np.zeros_like(x), [0] * E
    for choice in range(2):
        for token, expert in enumerate(best[:, choice]):
            taken[expert] += 1
            if taken[expert] <= capacity:
                weights = [given[f"{prefix}Mlp/Dense_{n}/kernel"][expert] for n in (0, 1)]
                biases = [given[f"{prefix}Mlp/Dense_{n}/bias"][expert] for n in (0, 1)]
                inner = gelu(x[token] @ weights[0] + biases[0])
                y[token] += scores[token, expert] * (inner @ weights[1] + biases[1])
    return y, max(taken) > capacity


@pytest.mark.parametrize("capacity", [None, 16])
@pytest.mark.parametrize("layer", [1, 11])
def test_layers_compute_what_the_formulas_say(tmp_path, layer, capacity):
    given = arrays()
    model = read(saved(tmp_path / "vmoe.npz", given))
    assert list(model.layers) == ["Encoder.encoderblock_1.Moe.", "Encoder.encoderblock_11.Moe."]
    x = np.random.default_rng(1).standard_normal((T, H)) + given[LAYER.format(layer) + "Router/dense/kernel"][:, 0]
    changed = {"capacity_factor": None} if capacity is None else {}
    found = layer_of(model, LAYER.format(layer).replace("/", "."), **changed)
    if capacity is not None:  # 1.05 * T * K / E, rounded up to a multiple of 4
        assert found.config.capacity_for(T, training=False) == capacity
    wanted, dropped = by_formula(given, LAYER.format(layer), x, capacity or 2 * T)
    assert dropped == (capacity is not None)
    with torch.no_grad():
        y = found(torch.from_numpy(x)).numpy()
    assert np.abs(y - wanted).max() < 1e-12 * np.abs(wanted).max()


@pytest.mark.parametrize("prefix", ["", "target/", "params/"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_is_written_back_is_the_same_file(tmp_path, prefix, dtype, save):
    given = arrays(prefix, dtype)
    path = saved(tmp_path / "vmoe.npz", given, save)
    assert VMOE.fits([path])
    model = read(path)
    assert "embedding/kernel" in {name.removeprefix(prefix) for name in model.tensors}
    assert VMOE.write(model, tmp_path / "again.npz", Options()) == [tmp_path / "again.npz"]
    assert_same(content(tmp_path / "again.npz"), given)


def test_arrays_in_the_order_of_columns(tmp_path):
    given = {name: np.asfortranarray(array) for name, array in arrays(dtype=np.float32).items()}
    VMOE.write(read(saved(tmp_path / "vmoe.npz", given)), tmp_path / "again.npz", Options())
    assert_same(
        content(tmp_path / "again.npz"), {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in given.items()}
    )


def test_bfloat16_is_two_bytes_of_no_type(tmp_path):
    given = {name: array.astype(np.float32) for name, array in arrays().items() if name not in ("step", "none")}
    narrow = {name: torch.from_numpy(array).bfloat16() for name, array in given.items()}
    given = {name: tensor.view(torch.int16).numpy().view("V2") for name, tensor in narrow.items()}
    model = read(saved(tmp_path / "vmoe.npz", given))
    name = "Encoder.encoderblock_1.Moe.experts.up_proj"
    assert torch.equal(model.tensors[name].read(), narrow[LAYER.format(1) + "Mlp/Dense_0/kernel"].mT)
    VMOE.write(model, tmp_path / "again.npz", Options())
    assert_same(content(tmp_path / "again.npz"), given)
    VMOE.write(model, tmp_path / "wide.npz", Options(dtype=torch.float32))
    assert {array.dtype for array in content(tmp_path / "wide.npz").values()} == {np.dtype(np.float32)}


def test_a_model_of_another_layout(tmp_path):
    config = dmoe.presets.vmoe(H, F, E)
    state = {name: held(tensor) for name, tensor in dmoe.MoE(config).state_dict().items()}
    model = Model({f"blocks.1.ffn.{name}": tensor for name, tensor in state.items()}, {"blocks.1.ffn.": config})
    VMOE.write(model, tmp_path / "vmoe.npz", Options())
    assert np.array_equal(
        content(tmp_path / "vmoe.npz")["blocks/1/ffn/Router/dense/kernel"].T, state["router.weight"].read()
    )
    with pytest.raises(FileExistsError, match="overwrite replaces a file"):
        VMOE.write(model, tmp_path / "vmoe.npz", Options())
    VMOE.write(model, tmp_path / "vmoe.npz", Options(overwrite=True))
    gated = dmoe.MoE(dmoe.MoEConfig(hidden_size=H, ffn_hidden_size=F, num_experts=E, bias="expert"))
    other = Model({name: held(tensor) for name, tensor in gated.state_dict().items()}, {"": gated.config})
    with pytest.raises(ValueError, match="expected experts without gates"):
        VMOE.write(other, tmp_path / "gated.npz", Options())
    assert [path.name for path in tmp_path.iterdir()] == ["vmoe.npz"]


def without(*names):
    return {name: array for name, array in arrays().items() if name not in names}


ROUTER, UP, BIAS = (
    LAYER.format(11) + name for name in ("Router/dense/kernel", "Mlp/Dense_0/kernel", "Mlp/Dense_1/bias")
)
WRONG = {
    "no router": (without(ROUTER), "expected Router/dense/kernel in a layer of V-MoE, got none"),
    "no bias": (without(BIAS), "with two biases or none, got"),
    "no kernel": (without(UP), r"expected Mlp\.Dense_0\.kernel beside .*, found none"),
    "too few experts": (arrays() | {UP: np.zeros((3, H, F))}, r"expected projections .* got \(3, 12, 8\)"),
    "another router": (
        arrays() | {ROUTER: np.zeros((H, 3))},
        r"a router for 4 experts of width 8, got .* router \(3, 8\)",
    ),
    "an unknown array": (arrays() | {LAYER.format(1) + "Mlp/scale": np.zeros(3)}, "Mlp.scale: expected a name of"),
    "no experts": ({"kernel": np.zeros(3)}, "expected arrays such as Encoder/encoderblock_1/Moe"),
    "text": (arrays() | {"name": np.array("vmoe")}, "name of dtype <U4, which PyTorch does not have"),
}


@pytest.mark.parametrize(("given", "problem"), WRONG.values(), ids=WRONG)
def test_arrays_that_are_no_model(tmp_path, given, problem):
    path = saved(tmp_path / "vmoe.npz", given)
    with pytest.raises(ValueError, match=problem) as told:
        read(path)
    assert str(told.value).startswith(f"{path}: ")


class Executed:
    def __reduce__(self):
        return (pytest.fail, ("it was executed",))


def test_objects_are_not_unpickled(tmp_path):
    objects = np.empty(1, dtype=object)
    objects[0] = Executed()
    path = saved(tmp_path / "vmoe.npz", arrays() | {"evil": objects})
    assert not VMOE.fits([path])
    with pytest.raises(ValueError, match=r"evil holds Python objects, .*: nothing of it was executed") as told:
        read(path)
    assert str(path) in str(told.value)


@pytest.mark.parametrize("length", [0, 1, 100, 4000, -1, -30])
def test_files_cut_off(tmp_path, length):
    path = saved(tmp_path / "vmoe.npz")
    path.write_bytes(path.read_bytes()[:length])
    assert not VMOE.fits([path])
    with pytest.raises(ValueError, match=r"expected a file of numpy\.savez, got: .") as told:
        read(path)
    assert str(path) in str(told.value)


def test_an_archive_of_other_files(tmp_path):
    path = tmp_path / "vmoe.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no arrays")
    with pytest.raises(ValueError, match=r"expected arrays \(\.npy\) alone, got notes\.txt"):
        read(path)
    assert not VMOE.fits([tmp_path])
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "other.npz")


def test_damage_inside_is_found_when_it_is_read(tmp_path):
    large = np.random.default_rng(2).standard_normal(1 << 16)
    path = saved(tmp_path / "vmoe.npz", arrays() | {"large": large}, np.savez_compressed)
    whole = bytearray(path.read_bytes())
    place = whole.index(b"large.npy") + (1 << 18)
    whole[place : place + 50] = bytes(50)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="expected a whole") as told:
        VMOE.write(read(path), tmp_path / "again.npz", Options())
    assert str(path) in str(told.value)
    assert [each.name for each in tmp_path.iterdir()] == ["vmoe.npz"]
