"""Megatron-DeepSpeed's checkpoints of a GPT: read from any ranks, written back as they were, refused where damaged."""

from __future__ import annotations

import os
import pickle
import sys
from types import ModuleType

import pytest
import torch
from gpt_checkpoints import (
    assert_same_files,
    assert_tensors,
    convert,
    differences,
    edit,
    listing,
    loaded,
    make,
    original,
    set_args,
)

from dmoe import MoEConfig
from dmoe.checkpoint.formats.base import Options
from dmoe.checkpoint.formats.megatron_deepspeed import MegatronDeepSpeed

FORMAT = MegatronDeepSpeed()
RANKS = [
    (),
    ("--train-tp", 2),
    ("--train-tp", 4, "--spread-experts", "--pattern", "mp_file"),
    ("--train-pp", 2, "--pattern", "mp_dir_pp"),
    ("--train-pp", 4, "--train-tp", 2, "--pattern", "tp_pp_dir", "--spread-experts"),
    ("--train-pp", 2, "--pattern", "mp_file_pp", "--attention", "attention"),
    ("--train-pp", 2, "--pattern", "tp_pp_file", "--key", "model"),
    ("--pattern", "rng_dir", "--train-tp", 2, "--rng-states"),
    ("--train-pp", 2, "--pattern", "rng_dir_pp"),
    ("--train-pp", 2, "--pattern", "rng_tp_pp_dir", "--train-tp", 2),
    ("--views", "--train-tp", 2),
    ("--experts", 0, "--train-tp", 2),
    ("--expert-interval", 1, "--experts", 2, "--ffn", 48, "--layers", 2),
    ("--coefficient", "--train-tp", 2),
    ("--dtype", "fp32", "--rng-states"),
    ("--dtype", "bf16", "--no-padded-vocab-arg"),
]


def read(folder):
    assert FORMAT.fits([folder])
    return FORMAT.read([folder], Options())


@pytest.mark.parametrize("arguments", RANKS, ids=lambda given: " ".join(map(str, given)))
def test_any_ranks_hold_the_model_and_get_it_back(tmp_path, arguments):
    folder = make(tmp_path / "in", *arguments)
    model = read(folder)
    assert_tensors(model, original(*arguments))
    assert FORMAT.write(model, tmp_path / "out", Options()) == [tmp_path / "out"]
    assert_same_files(folder, tmp_path / "out")


def test_sizes_options_and_arguments(tmp_path):
    folder = make(tmp_path / "in", "--eps", 1e-6)
    model = read(folder)
    given = {
        "hidden_size": 32,
        "ffn_hidden_size": 128,
        "num_experts": 4,
        "top_k": 1,
        "gated": False,
        "activation": "gelu_tanh",
        "bias": "expert",
        "load_balancing_coefficient": 0.0,
    }
    moe = model.gpt.pop("moe")
    assert list(moe) == ["1", "3"]
    assert all(MoEConfig(**config) == MoEConfig(**given) for config in moe.values())
    assert model.layers == {f"blocks.{layer}.ffn.": MoEConfig(**given) for layer in (1, 3)}
    assert model.gpt == {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "ffn_hidden_size": 128,
        "max_positions": 24,
        "norm": "layer",
        "norm_eps": 1e-6,
        "positions": "learned",
        "qk_norm": False,
        "bias": True,
        "tied_head": True,
        "activation": "gelu_tanh",
        "gated": False,
    }
    args = dict(model.origin["args"])
    assert (args["num_experts"], args["model_type"], args["topk"]) == ("[4]", "ModelType.encoder_or_decoder", "1")
    assert not model.notes


def test_what_was_trained_is_what_runs(tmp_path):
    folder = make(tmp_path / "in", "--moe-topk", 2)
    set_args(folder, bias_gelu_fusion=False)
    model = read(folder)
    assert model.gpt["activation"] == "gelu"
    config = model.layers["blocks.1.ffn."]
    assert (config.top_k, config.gate_normalization, config.activation) == (2, 1.0, "gelu")


@pytest.mark.parametrize("counts", [4, [4], [4, 4], [1, 4, 1, 4], [4, 4, 4, 4], [1, 4, 4], None])
def test_how_many_experts_is_said_in_several_ways(tmp_path, counts):
    folder = make(tmp_path / "in")
    set_args(folder, num_experts=counts)
    assert_tensors(read(folder), original())


@pytest.mark.parametrize("counts", [1, 8, [2], [1, 8], [1, 4, 1, 1], [4, 4, 4], ["four"], [True, 4]])
def test_other_numbers_of_experts_are_refused(tmp_path, counts):
    folder = make(tmp_path / "in")
    set_args(folder, num_experts=counts)
    with pytest.raises(ValueError, match=r"args.num_experts: expected"):
        read(folder)


def test_layers_may_have_different_numbers_of_experts(tmp_path):
    folder = make(tmp_path / "in", "--expert-interval", 2)
    set_args(folder, num_experts=[4, 2])

    def fewer(content):
        encoder = content["module"]["language_model"]["encoder"]
        gate = encoder["layers.3.mlp.deepspeed_moe.gate.wg.weight"]
        encoder["layers.3.mlp.deepspeed_moe.gate.wg.weight"] = gate.read()[:2].clone()

    edit(folder / "mp_rank_00/model_states.pt", fewer)
    for expert in (2, 3):
        (folder / f"layer_1_expert_{expert}_mp_rank_00_model_states.pt").unlink()
    model = read(folder)
    assert [config.num_experts for config in model.layers.values()] == [4, 2]
    assert torch.equal(
        model.tensors["blocks.3.ffn.experts.up_proj"].read(), original()["blocks.3.ffn.experts.up_proj"][:2]
    )
    assert convert(folder, tmp_path / "out", "--to", "fastertransformer") == 2
    assert not (tmp_path / "out").exists()


def test_the_folder_that_latest_names(tmp_path):
    folder = tmp_path / "in"
    make(folder / "global_step12", "--pattern", "mp_file")
    (folder / "latest").write_text("global_step12\n")
    model = read(folder)
    assert_tensors(model, original())
    FORMAT.write(model, tmp_path / "out", Options())
    assert (tmp_path / "out/latest").read_text() == "global_step12"
    assert_same_files(folder / "global_step12", tmp_path / "out/global_step12")
    (folder / "latest").write_text("../in/global_step12")
    with pytest.raises(ValueError, match="latest: expected the name of a folder beside it"):
        FORMAT.read([folder], Options())
    assert not FORMAT.fits([folder])


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (4, 1)])
def test_other_ranks_are_written_as_they_would_have_been(tmp_path, before, after):
    model = read(make(tmp_path / "in", "--train-tp", before, "--rng-states"))
    FORMAT.write(model, tmp_path / "out", Options(ranks=after))
    assert_same_files(make(tmp_path / "other", "--train-tp", after, "--rng-states"), tmp_path / "out")
    with pytest.raises(ValueError, match="ranks: expected a divisor of heads = 4, got 3"):
        FORMAT.write(model, tmp_path / "three", Options(ranks=3))
    assert not (tmp_path / "three").exists()


def test_experts_of_many_ranks_on_fewer(tmp_path):
    model = read(make(tmp_path / "in", "--train-tp", 4, "--spread-experts"))
    FORMAT.write(model, tmp_path / "out", Options(ranks=2))
    assert_same_files(make(tmp_path / "other", "--train-tp", 2, "--spread-experts"), tmp_path / "out")


def test_an_expert_in_the_files_of_two_ranks(tmp_path):
    folder = make(tmp_path / "in", "--train-tp", 2)
    first = folder / "layer_0_expert_1_mp_rank_00_model_states.pt"
    second = folder / "layer_0_expert_1_mp_rank_01_model_states.pt"
    second.write_bytes(first.read_bytes())
    model = read(folder)
    assert_tensors(model, original())
    FORMAT.write(model, tmp_path / "out", Options())
    assert_same_files(folder, tmp_path / "out")
    edit(second, lambda content: content.update({key: value.read() * 2 for key, value in content.items()}))
    with pytest.raises(ValueError, match=rf"{second}: dense_h_to_4h.weight: expected the same numbers"):
        FORMAT.read([folder], Options())


def test_without_what_stood_beside_it_the_arguments_come_from_their_text(tmp_path):
    folder = make(tmp_path / "in", "--train-tp", 2)
    model = read(folder)
    model.beside = {}
    FORMAT.write(model, tmp_path / "out", Options())
    name = "mp_rank_01/model_states.pt"
    was, now = loaded(folder / name), loaded(tmp_path / "out" / name)
    assert differences(was["module"], now["module"]) == []
    assert {key: str(value) for key, value in vars(was["args"]).items()} == {
        key: str(value) for key, value in vars(now["args"]).items()
    }
    assert (now["args"].num_experts, now["args"].lr, now["args"].onnx_safe) == ([4], 0.0003, None)
    assert_tensors(FORMAT.read([tmp_path / "out"], Options()), original())


def test_a_detour_over_dmoes_own_folder_loses_nothing(tmp_path):
    folder = make(tmp_path / "in", "--train-tp", 2, "--rng-states", "--spread-experts")
    assert convert(folder, tmp_path / "own", "--to", "dmoe") == 0
    assert convert(tmp_path / "own", tmp_path / "back", "--to", "deepspeed") == 0
    assert_same_files(folder, tmp_path / "back")
    for source, out in ((folder, tmp_path / "direct"), (tmp_path / "own", tmp_path / "detour")):
        assert convert(source, out, "--to", "fastertransformer", "--gpus", 2) == 0
    assert_same_files(tmp_path / "direct", tmp_path / "detour")


def test_a_model_from_elsewhere_and_another_dtype(tmp_path):
    model = read(make(tmp_path / "in"))
    model.origin, model.beside = {}, {}
    FORMAT.write(model, tmp_path / "out", Options(dtype=torch.float32, ranks=2))
    again = read(tmp_path / "out")
    wide = {name: tensor.float() for name, tensor in original().items()}
    assert_tensors(again, wide)
    assert again.gpt == model.gpt
    assert again.layers == model.layers


def test_nothing_else_fits(tmp_path):
    assert not FORMAT.fits([tmp_path])
    assert not FORMAT.fits([tmp_path / "nothing"])
    make(tmp_path / "in")
    assert not FORMAT.fits([tmp_path / "in", tmp_path / "in"])
    plain = tmp_path / "plain"
    plain.mkdir()
    torch.save({"module": {"weight": torch.ones(2)}}, plain / "mp_rank_00_model_states.pt")
    assert not FORMAT.fits([plain])  # DeepSpeed's, of any other model


class Trap:
    def __reduce__(self):
        return os.system, ("touch trapped",)


def lose_expert(folder):
    (folder / "layer_1_expert_2_mp_rank_00_model_states.pt").unlink()
    return "layer_1_expert_2_mp_rank_00_model_states.pt: expected expert 2 of 4"


def lose_rank(folder):
    (folder / "mp_rank_01/model_states.pt").unlink()
    return "mp_rank_01/model_states.pt: expected the file of tensor-parallel rank 1 of 2"


def lose_first_rank(folder):
    (folder / "mp_rank_00/model_states.pt").unlink()
    return "mp_rank_00/model_states.pt: expected the file of tensor-parallel rank 0 of 2"


def cut_dense(folder):
    path = folder / "mp_rank_01/model_states.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return "mp_rank_01/model_states.pt: expected a whole file"


def cut_expert(folder):
    path = folder / "layer_0_expert_3_mp_rank_00_model_states.pt"
    path.write_bytes(path.read_bytes()[:-700])
    return "layer_0_expert_3_mp_rank_00_model_states.pt: expected a whole file"


def empty(folder):
    (folder / "mp_rank_00/model_states.pt").write_bytes(b"")
    return "mp_rank_00/model_states.pt: expected a whole file"


def exchange(folder, first, second):
    content = (folder / first).read_bytes()
    (folder / first).write_bytes((folder / second).read_bytes())
    (folder / second).write_bytes(content)


def exchange_experts(folder):
    name = "layer_0_expert_{}_mp_rank_00_model_states.pt"
    exchange(folder, name.format(0), name.format(1))
    return f"{name.format(0)}: expected expert 0 of layer 1, as its name says, got"


def exchange_layers(folder):
    name = "layer_{}_expert_0_mp_rank_00_model_states.pt"
    exchange(folder, name.format(0), name.format(1))
    return f"{name.format(0)}: expected expert 0 of layer 1, as its name says, got"


def one_layer_more(folder):
    source = folder / "layer_1_expert_0_mp_rank_00_model_states.pt"
    (folder / "layer_2_expert_0_mp_rank_00_model_states.pt").write_bytes(source.read_bytes())
    return "layer_2_expert_0_mp_rank_00_model_states.pt: expected experts of 2 MoE layers"


def change_encoder(folder, rank, name, change):
    def inside(content):
        encoder = content["module"]["language_model"]["encoder"]
        made = change(encoder.pop(name).read())
        if made is not None:
            encoder[name] = made

    edit(folder / f"mp_rank_0{rank}/model_states.pt", inside)


def one_bit(tensor):
    tensor.view(torch.int16)[-1] ^= 1
    return tensor


def ranks_differ(folder):
    change_encoder(folder, 1, "layers.2.input_layernorm.bias", one_bit)
    return "mp_rank_01/model_states.pt: layers.2.input_layernorm.bias: expected the same numbers as in"


def gates_differ(folder):
    change_encoder(folder, 1, "layers.3.mlp.deepspeed_moe.gate.wg.weight", lambda tensor: tensor * 2)
    return "mp_rank_01/model_states.pt: layers.3.mlp.deepspeed_moe.gate.wg.weight: expected the same numbers as in"


def lose_gate(folder):
    for rank in (0, 1):
        change_encoder(folder, rank, "layers.3.mlp.deepspeed_moe.gate.wg.weight", lambda tensor: None)
    return "mp_rank_00/model_states.pt: layers.3: expected mlp.deepspeed_moe.gate.wg.weight or"


def lose_norm(folder):
    change_encoder(folder, 1, "final_layernorm.weight", lambda tensor: None)
    return "mp_rank_01/model_states.pt: expected a tensor final_layernorm.weight, got none"


def one_tensor_more(folder):
    def more(content):
        content["module"]["language_model"]["encoder"]["layers.0.extra"] = torch.ones(2)

    edit(folder / "mp_rank_01/model_states.pt", more)
    return "mp_rank_01/model_states.pt: expected a GPT's tensors, got layers.0.extra"


def other_shape(folder):
    change_encoder(folder, 0, "layers.0.self_attention.dense.weight", lambda tensor: tensor[:, :8].clone())
    return (
        "mp_rank_00/model_states.pt: layers.0.self_attention.dense.weight: expected floating-point numbers of (32, 16)"
    )


def other_version(folder):
    edit(folder / "mp_rank_01/model_states.pt", lambda content: content.update(checkpoint_version=2.0))
    return "mp_rank_01/model_states.pt: checkpoint_version: expected 3.0, got 2.0"


def no_version(folder):
    edit(folder / "mp_rank_00/model_states.pt", lambda content: content.pop("checkpoint_version"))
    return "mp_rank_00/model_states.pt: checkpoint_version: expected 3.0, got none"


def no_args(folder):
    edit(folder / "mp_rank_00/model_states.pt", lambda content: content.pop("args"))
    return "mp_rank_00/model_states.pt: args: expected a Namespace"


def trap(folder):
    path = folder / "mp_rank_01/model_states.pt"
    with open(path, "wb") as file:
        pickle.dump({"module": Trap()}, file, protocol=2)
    return "mp_rank_01/model_states.pt: expected tensors, plain data and objects of known frameworks, got"


def trap_of_a_newer_protocol(folder):
    path = folder / "mp_rank_01/model_states.pt"
    with open(path, "wb") as file:
        pickle.dump({"module": Trap()}, file, protocol=4)
    return "mp_rank_01/model_states.pt: expected a whole file of torch.save, got: Unsupported operand"


def trap_in_archive(folder):
    path = folder / "layer_0_expert_0_mp_rank_00_model_states.pt"
    torch.save({"layers.1": Trap()}, path)
    return f"{path.name}: expected tensors, plain data and objects of known frameworks, got posix.system"


def wrong_args(name, value):
    def change(folder):
        set_args(folder, **{name: value})
        return f"mp_rank_00/model_states.pt: args.{name}: expected"

    change.__name__ = name
    return change


DAMAGE = [
    lose_expert,
    lose_rank,
    lose_first_rank,
    cut_dense,
    cut_expert,
    empty,
    exchange_experts,
    exchange_layers,
    one_layer_more,
    ranks_differ,
    gates_differ,
    lose_gate,
    lose_norm,
    one_tensor_more,
    other_shape,
    other_version,
    no_version,
    no_args,
    trap,
    trap_of_a_newer_protocol,
    trap_in_archive,
    wrong_args("hidden_size", 64),
    wrong_args("num_layers", 6),
    wrong_args("ffn_hidden_size", 64),
    wrong_args("kv_channels", 16),
    wrong_args("num_attention_heads", 5),
    wrong_args("max_position_embeddings", 25),
    wrong_args("padded_vocab_size", 128),
    wrong_args("num_experts", [8]),
    wrong_args("pipeline_model_parallel_size", 2),
    wrong_args("tensor_model_parallel_size", 1),
    wrong_args("layernorm_epsilon", "small"),
    wrong_args("apply_residual_connection_post_layernorm", True),
]


@pytest.mark.parametrize("target", ["fastertransformer", "deepspeed"])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda given: given.__name__)
def test_damage_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, capsys, damage, target):
    monkeypatch.chdir(tmp_path)
    # An installed Megatron changes nothing: its name is never looked up.
    monkeypatch.setitem(sys.modules, "megatron", poisoned := Poisoned("megatron"))
    folder = make(tmp_path / "in", "--train-tp", 2)
    said = damage(folder)
    before = listing(tmp_path)
    poisoned.armed = True
    assert convert(folder, tmp_path / "out", "--to", target) == 2
    poisoned.armed = False
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert str(folder / said.partition(":")[0]) in lines[0], lines[0]
    assert said.partition(":")[2] in lines[0], lines[0]
    assert listing(tmp_path) == before


class Poisoned(ModuleType):
    armed = False

    def __getattr__(self, name):
        if self.armed and not name.startswith("__"):
            raise AssertionError(f"megatron.{name} was looked up")
        raise AttributeError(name)


def test_objects_of_megatron_are_never_made(tmp_path, monkeypatch):
    folder = make(tmp_path / "in")
    monkeypatch.setitem(sys.modules, "megatron", Poisoned("megatron"))
    sys.modules["megatron"].armed = True
    assert_tensors(read(folder), original())


def test_what_exists_is_not_replaced_unless_asked(tmp_path, capsys):
    folder, out = make(tmp_path / "in"), make(tmp_path / "out", "--seed", 3)
    before = listing(tmp_path)
    assert convert(folder, out, "--to", "deepspeed") == 2
    assert f"{out}: expected nothing of that name" in capsys.readouterr().err
    assert listing(tmp_path) == before
    assert convert(folder, out, "--to", "deepspeed", "--overwrite") == 0
    assert_same_files(folder, out)
    assert convert(tmp_path / "nothing", tmp_path / "new", "--to", "deepspeed") == 2
    assert f"{tmp_path / 'nothing'}: expected a checkpoint in one of the layouts" in capsys.readouterr().err
