"""Converted state dicts: into Megatron's real modules and back, per rank, over ranks, from files."""

from __future__ import annotations

import argparse
import sys
import tempfile
import types

import numpy
import pytest
import torch
from make_deepspeed_ckpt import stand_in_modules
from megatron_cases import call
from rank_jobs_together import killed_at
from rank_pool import RankPool

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from dmoe.checkpoint import read_file
from dmoe.integrations.megatron import convert_ranks, convert_state
from dmoe.integrations.megatron.__main__ import main
from dmoe.integrations.megatron.expert_layouts import LAYOUTS

pytestmark = pytest.mark.xdist_group("megatron convert")  # one process with Megatron in it
CASES = ("gated", "plain", "biases", "gated biases", "shared", "sigmoid", "every other layer")
ACCURACY = 3e-5  # of float32, relative to the largest value


@pytest.fixture(scope="module")
def megatron_process():
    """One process in which Megatron runs on the CPU; ``run(job, *arguments)``."""
    pool = RankPool(1)
    with tempfile.TemporaryDirectory() as folder:
        runs = iter(range(1000))

        def run(job, *arguments):
            store = f"{folder}/{next(runs)}"
            return pool.run(call, "rank_jobs_megatron_convert", job, *arguments, store)[0]

        yield run
    pool.close()


@pytest.mark.parametrize("case", CASES)
def test_a_native_model_computes_the_same_in_dmoe_and_comes_back_to_the_bit(megatron_process, case):
    report = megatron_process("through_models", case)
    scale = report.pop("scale")
    assert scale > 1
    for found in report.values():
        assert found.pop("error") <= ACCURACY * scale
        assert all(found.values()), found


@pytest.mark.parametrize("case", CASES)
def test_layers_of_a_native_models_file(megatron_process, case, tmp_path):
    """Read by the general reader, with the options that Megatron's args in the file tell."""
    report = megatron_process("through_checkpoint", case, str(tmp_path))
    assert report["statuses"] == [0, 0]
    assert report["same names"]
    assert report["same values"]
    assert report["beside"]
    assert report["layers"]
    assert max(report["layers"].values()) <= ACCURACY


@pytest.mark.parametrize("gated", [True, False])
def test_megatrons_grouped_mlp(megatron_process, gated):
    report = megatron_process("through_grouped_mlp", gated)
    if report is None:
        pytest.skip("this megatron-core has no GroupedMLP any more")
    assert report["error"] <= ACCURACY * report["scale"]
    assert report["same"]


@pytest.mark.parametrize(("gated", "biased"), [(True, False), (False, True)])
def test_a_state_of_megablocks_fork(megatron_process, gated, biased):
    report = megatron_process("through_megablocks", gated, biased)
    assert report["error"] <= ACCURACY * report["scale"]
    assert ("mlp.output_bias" in report["keys"]) == biased


def test_options_on_the_command_line_reach_the_layers(megatron_process):
    nothing_else, found = megatron_process("options_of_the_command_line")
    assert found == [(2, "choice_major")] * 2
    assert all(nothing_else)


# ---------------------------------------------------------------------------------------------- state dicts by hand

E, H, F = 4, 6, 5  # experts, hidden size, width


def _native(experts=range(E), layers=2, gated=True, biased=False, prefix="decoder."):
    """The state dict of a rank with some of the experts, in SequentialMLP's layout: integers that tell their place."""
    width = 2 * F if gated else F
    state = {f"{prefix}embedding.weight": torch.arange(12.0)}
    for layer in range(layers):
        mlp = f"{prefix}layers.{layer}.mlp."
        state[f"{mlp}router.weight"] = torch.arange(E * H).view(E, H) + 1000.0 * layer
        for local, expert in enumerate(experts):
            for fc, shape in ((1, (width, H)), (2, (H, F))):
                name = f"{mlp}experts.local_experts.{local}.linear_fc{fc}."
                start = 1e6 * (2 * (layer * E + expert) + fc)
                state[f"{name}weight"] = torch.arange(shape[0] * shape[1], dtype=torch.float64).view(shape) + start
                if biased:
                    state[f"{name}bias"] = torch.arange(shape[0], dtype=torch.float64) - start
        state[f"{mlp}shared_experts.linear_fc1.weight"] = torch.ones(width, H)
        state[f"{mlp}dense.linear_fc1.weight"] = torch.ones(2)
    return state


def _assert_same(found, expected):
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("prefix", ["", "module.decoder."])
@pytest.mark.parametrize(("gated", "biased"), [(True, False), (False, False), (True, True), (False, True)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_back(layout, gated, biased, prefix):
    state = _native(gated=gated, biased=biased, prefix=prefix)
    if layout == "grouped" and biased:
        with pytest.raises(ValueError, match="GroupedMLP has no biases"):
            convert_state(state, layout)
        return
    there = convert_state(state, layout)
    assert layout == "sequential" or not any("local_experts" in name for name in there)
    _assert_same(convert_state(there, "sequential"), state)
    for other in LAYOUTS:  # any to any
        if not (other == "grouped" and biased):
            _assert_same(convert_state(convert_state(there, other), "sequential"), state)
    for name, tensor in there.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{name} would be saved with memory of others"


def test_where_numbers_go():
    """Names and shapes of each layout, written out."""
    state = _native(layers=1, prefix="")
    fc1 = torch.stack([state[f"layers.0.mlp.experts.local_experts.{e}.linear_fc1.weight"] for e in range(E)])
    fc2 = torch.stack([state[f"layers.0.mlp.experts.local_experts.{e}.linear_fc2.weight"] for e in range(E)])
    found = {
        layout: {
            name.removeprefix("layers.0.mlp."): tensor
            for name, tensor in convert_state(state, layout).items()
            if "experts." in name and "shared" not in name
        }
        for layout in LAYOUTS
    }
    gate_up = torch.stack([fc1[:, :F], fc1[:, F:]], 1)
    _assert_same(found["dmoe"], {"moe.experts.gate_up_proj": gate_up, "moe.experts.down_proj": fc2})
    _assert_same(found["dmoe_experts"], {"experts.experts.gate_up_proj": gate_up, "experts.experts.down_proj": fc2})
    numbered = {}
    for e in range(E):
        numbered |= {f"experts.linear_fc1.weight{e}": fc1[e], f"experts.linear_fc2.weight{e}": fc2[e]}
    _assert_same(found["te"], numbered)
    weight1, weight2 = found["grouped"]["experts.weight1"], found["grouped"]["experts.weight2"]
    assert (tuple(weight1.shape), tuple(weight2.shape)) == ((H, E * 2 * F), (E * F, H))
    for e in range(E):  # as its forward takes them apart
        assert torch.equal(weight1.view(E, H, -1)[e], fc1[e].t())
        assert torch.equal(weight2.view(E, -1, H)[e], fc2[e].t())


def test_names_of_the_router_and_what_is_left_out():
    mlp = "layers.0.mlp."
    state = _native(layers=1, prefix="") | {
        f"{mlp}router.expert_bias": torch.ones(E),
        f"{mlp}router.bias": torch.ones(E),
    }
    state[f"{mlp}experts.local_experts.0.linear_fc1._extra_state"] = None
    state["layers.0.attention._extra_state"] = None
    found = convert_state(state, "dmoe")
    routers = {f"{mlp}moe.router.{name}" for name in ("weight", "bias", "selection_bias")}
    assert {name for name in found if "router" in name} == routers
    assert [name for name in found if name.endswith("_extra_state")] == ["layers.0.attention._extra_state"]
    del state[f"{mlp}experts.local_experts.0.linear_fc1._extra_state"]
    assert convert_state(found, "sequential").keys() == state.keys()
    quantile = {name.replace("expert_bias", "qb_beta"): value for name, value in state.items()}
    found = convert_state(quantile, "dmoe")
    assert torch.equal(found[f"{mlp}moe.router.qb_beta"], torch.ones(E))  # Megatron's sign in files of both
    assert convert_state(found, "sequential").keys() == quantile.keys()


@pytest.mark.parametrize("source", LAYOUTS)
def test_files_of_ranks(source):
    """Local numbers on each rank, global ones between them: 2 ranks to 1, 4 and 2."""
    whole = _native()
    halves = [_native(range(2)), _native(range(2, 4))]
    given = [convert_state(half, source, expert_parallel_size=2) for half in halves]
    (one,) = convert_ranks(given, "sequential", ranks=1)
    _assert_same(one, whole)
    four = convert_ranks(given, "sequential", ranks=4)
    for rank, state in enumerate(four):
        _assert_same(state, _native([rank]))
    for rank, state in enumerate(convert_ranks(given, "sequential")):
        _assert_same(state, halves[rank])
    for rank, state in enumerate(convert_ranks(four, source, ranks=2)):
        _assert_same(state, given[rank])


def test_megablocks_layer_with_a_capacity_keeps_its_first_matrix_the_other_way_round():
    dropless = {
        "router.layer.weight": torch.zeros(E, H),
        "experts.mlp.w1": torch.arange(float(E * F * H)).view(E * F, H),
        "experts.mlp.w2": -torch.arange(float(E * F * H)).view(E * F, H),
        "experts.bias": torch.arange(float(H)),
    }
    found = convert_state(dropless, "dmoe")
    assert torch.equal(found["moe.experts.up_proj"], dropless["experts.mlp.w1"].view(E, F, H))
    assert torch.equal(found["moe.experts.down_proj"], dropless["experts.mlp.w2"].view(E, F, H).transpose(1, 2))
    assert torch.equal(found["moe.output_bias"], dropless["experts.bias"])
    assert torch.equal(found["moe.router.bias"], torch.zeros(E))
    bounded = dropless | {
        "experts.mlp.w1": dropless["experts.mlp.w1"].view(E, F, H).transpose(1, 2).contiguous(),
        "experts.mlp.w2": dropless["experts.mlp.w2"].view(E, F, H),
    }
    _assert_same(convert_state(bounded, "dmoe"), found)
    _assert_same(convert_state(found, "dmoe"), found)
    for state in (dropless, found):
        with pytest.raises(ValueError, match="a bias of the whole layer, as MegaBlocks has it, has no"):
            convert_state(state, "sequential")


def _without(state, part):
    return {name: value for name, value in state.items() if part not in name}


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        (
            {"weight": torch.ones(1)},
            {},
            "expected experts of Megatron, MegaBlocks or dmoe in the state dict, found none",
        ),
        (
            _without(_native(), "local_experts.1.linear_fc2"),
            {},
            r"linear_fc2.weight of experts 0 to 3, found none of 1",
        ),
        (
            _without(_native(), "linear_fc1"),
            {},
            r"expected experts.local_experts.\*.linear_fc1.weight beside router.weight, ",
        ),
        (_without(_native(biased=True), "linear_fc2.bias"), {}, "with two biases or none"),
        (_native() | {"decoder.layers.0.mlp.experts.scales": torch.ones(1)}, {}, "experts.scales: expected a name of"),
        (
            _native() | {"decoder.layers.0.mlp.experts.weight1": torch.ones(1)},
            {},
            "expected one layout, found sequential and, in decoder.layers.0.mlp.experts.weight1, grouped",
        ),
        (
            _native() | {"decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight": torch.ones(3, H)},
            {},
            "linear_fc1.weight of one shape",
        ),
        (
            _without(convert_state(_native(), "grouped"), "router"),
            {},
            "grouped does not tell how many experts",
        ),
        (
            convert_state(_native(), "grouped"),
            {"expert_parallel_size": 3},
            "that 3 ranks can share evenly, got 4",
        ),
        (
            _without(convert_state(_native(), "dmoe"), "down_proj"),
            {},
            "expected moe.experts.down_proj or moe.down_proj beside .*gate_up_proj, found none",
        ),
    ],
)
def test_what_is_wrong_is_said(state, options, message):
    with pytest.raises(ValueError, match=message):
        convert_state(state, "dmoe", **options)


def test_a_layout_that_there_is_not():
    with pytest.raises(ValueError, match="expected one of dmoe, dmoe_experts, sequential, te, grouped, got 'other'"):
        convert_state(_native(), "other")


def test_states_without_a_router_need_a_number():
    state = _without(_native(range(2)), "router")
    grouped = convert_state(state, "grouped")
    _assert_same(convert_state(grouped, "sequential", expert_parallel_size=2, num_experts=E), state)


def test_files(tmp_path, capsys):
    """Two ranks' files to one of dmoe's and back; what stands beside the model stays, but for the optimizer."""
    halves = [_native(range(2)), _native(range(2, 4))]
    for rank, half in enumerate(halves):
        torch.save({"model": half, "iteration": 7, "optimizer": {"state": {}}}, tmp_path / f"rank{rank}.pt")
    files = [str(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    whole, parts = str(tmp_path / "whole.pt"), str(tmp_path / "part{rank}.pt")
    assert main(["convert", whole, *files, "--ranks", "1"]) == 0
    assert capsys.readouterr().out == f"{whole} (without the optimizer)\n"
    found = torch.load(whole)
    assert found.keys() == {"model", "iteration"}
    _assert_same(found["model"], convert_state(_native(), "dmoe"))
    assert main(["convert", "--to", "sequential", "--ranks", "2", parts, whole]) == 0
    for rank, half in enumerate(halves):
        found = torch.load(tmp_path / f"part{rank}.pt")
        _assert_same(found["model"], half)
    torch.save(halves[0], files[0])  # a bare state dict
    assert main(["convert", "--overwrite", whole, files[0]]) == 0
    _assert_same(torch.load(whole), convert_state(halves[0], "dmoe", expert_parallel_size=2))


def test_files_are_all_converted_or_none_of_them(tmp_path):
    """In place: what is read is what is written over."""
    halves = [_native(range(2)), _native(range(2, 4))]
    files = [str(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    convert = ["convert", "--overwrite", str(tmp_path / "rank{rank}.pt"), *files]
    for half, file in zip(halves, files, strict=True):
        torch.save({"model": half, "iteration": 7}, file)
    assert killed_at("half a file", lambda: main(convert), times=2)
    for half, file in zip(halves, files, strict=True):
        _assert_same(torch.load(file)["model"], half)
    assert killed_at("os.rename", lambda: main(convert), times=3)
    for half, file in zip(halves, files, strict=True):
        found = read_file(file)
        _assert_same(found["model"], convert_state(half, "dmoe", expert_parallel_size=2))
        assert found["iteration"] == 7


def test_files_that_cannot_be_converted(tmp_path, capsys):
    def error(*words):
        assert main(["convert", *map(str, words)]) == 2
        return capsys.readouterr().err

    given, out = tmp_path / "in.pt", tmp_path / "out.pt"
    assert "No such file" in error(out, given)
    torch.save({"model": _native(), "args": main}, given)
    assert "--trust reads any Python object" in error(out, given)
    assert main(["convert", "--trust", str(out), str(given)]) == 0
    assert f"{out} exists; --overwrite replaces it" in error(out, given)
    assert "expected a name with {rank} in it for 2 files" in error(out, given, given)
    torch.save({"model": {"weight": torch.ones(1)}}, given)
    assert "found none" in error("--overwrite", out, given)


def test_megatrons_own_files_need_no_trust(tmp_path, monkeypatch):
    """Their ``args`` and random states name Megatron's classes and numpy's: kept under their names, never looked up."""
    given, out = tmp_path / "in.pt", tmp_path / "out.pt"
    before = set(sys.modules)
    args = argparse.Namespace(model_type=stand_in_modules()["ModelType"].encoder_or_decoder, padded_vocab_size=64)
    rng = ("MT19937", numpy.arange(624, dtype=numpy.uint32), 5, 0, 0.0)
    torch.save({"model": _native(), "args": args, "np_rng_state": rng}, given)
    made = {name: module for name, module in sys.modules.items() if name not in before and name.startswith("megatron")}
    for name in made:
        monkeypatch.delitem(sys.modules, name)
    assert main(["convert", str(out), str(given)]) == 0
    assert not set(made) & set(sys.modules)
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    found = torch.load(out, weights_only=False)
    assert found["args"] == args
    assert found["args"].model_type is args.model_type
    assert (found["np_rng_state"][1] == rng[1]).all()
    _assert_same(found["model"], convert_state(_native(), "dmoe"))


def test_trusted_files_that_are_something_else(tmp_path, capsys, monkeypatch):
    """Objects of packages that are not here, text, half a file, another object: a sentence each, and no traceback."""
    given, out = tmp_path / "in.pt", tmp_path / "out.pt"

    def error():
        assert main(["convert", "--trust", str(out), str(given)]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert f"error: {given}: expected " in told
        return told

    package = types.ModuleType("a_package_of_old")
    package.Args = type("Args", (), {"__module__": "a_package_of_old"})
    monkeypatch.setitem(sys.modules, "a_package_of_old", package)
    torch.save({"model": _native(), "args": package.Args()}, given)
    whole = given.read_bytes()
    del package.Args
    assert "objects of packages that are installed here, got: Can't get attribute 'Args'" in error()
    monkeypatch.delitem(sys.modules, "a_package_of_old")
    told = error()
    assert "objects of packages that are installed here, got: No module named 'a_package_of_old'" in told
    assert "PYTHONPATH" in told
    for content in (b"iteration 7\nloss 3.2\n", b"", whole[: len(whole) // 2], b"\x80\x02K"):
        given.write_bytes(content)
        assert "a file of torch.save, got: " in error()
    torch.save([torch.ones(1)], given)
    assert "a state dict, or a dict around one, got list" in error()
    given.unlink()
    assert main(["convert", "--trust", str(out), str(given)]) == 2
    assert "No such file" in capsys.readouterr().err
