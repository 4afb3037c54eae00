"""Hugging Face's folders: layers compute what Transformers' blocks do, and come back as the files they were."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import dmoe
from dmoe.checkpoint.formats.base import Options
from dmoe.checkpoint.formats.hf import HF
from dmoe.checkpoint.formats.hf_files import CONFIG, INDEX, SINGLE

pytest.importorskip("transformers")
import hf_folder_cases as cases

FORMS = [(family, "files") for family in cases.CASES] + [(family, "memory") for family in cases.TWO_FORMS]
# Families whose names are the same.
IN_FILES, IN_MEMORY = [["qwen3_moe", "olmoe"]], [["mixtral", "qwen3_moe", "olmoe"]]
# What changes how a family computes.
VARIANTS = {
    "mixtral, gelu": ("mixtral", {"hidden_act": "gelu"}),
    "qwen2_moe, normalised": ("qwen2_moe", {"norm_topk_prob": True}),
    "qwen3_moe, not normalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "deepseek_v3, one group": ("deepseek_v3", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    "switch, biased": ("switch_transformers", {"router_bias": True, "dense_act_fn": "gelu_new", "expert_capacity": 64}),
    "nllb, priorities": ("nllb_moe", {"batch_prioritized_routing": True, "router_bias": True}),
    "nllb, before": ("nllb_moe", {"normalize_router_prob_before_dropping": True, "moe_token_dropout": 0.0}),
    "gpt_oss, tight": ("gpt_oss", {"swiglu_limit": 0.5, "swiglu_alpha": 1.1}),
    "llama4, one": ("llama4", {"num_experts_per_tok": 1}),
    "dbrx, p = 2": (
        "dbrx",
        {"ffn_config": {**cases.CASES["dbrx"][1]["ffn_config"], "moe_normalize_expert_weights": 2.0}},
    ),
}


def read(folder, **options):
    return HF.read([folder], Options(**options))


def layer_of(model, prefix):
    """The layer in float64, with the model's tensors."""
    layer = dmoe.MoE(model.layers[prefix]).double().eval()
    layer.load_state_dict({name: tensor.read() for name, tensor in model.of_layer(prefix).items()})
    return layer


def assert_computes(family, folder, form="files", **given):
    read_model, theirs = read(folder), cases.tiny(family, **given)
    assert read_model.origin["family"] == family
    assert read_model.origin["form"] == form
    assert read_model.layers
    x = torch.randn(2, 12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for prefix in read_model.layers:
        wanted = cases.expected(family, cases.block_of(family, theirs, prefix), x)
        with torch.no_grad():
            found = layer_of(read_model, prefix)(x)
        far = ((found - wanted).abs().max() / wanted.abs().max()).item()
        assert far < (1e-6 if family in cases.FLOAT32_SCORES else 1e-12), (prefix, far)
    return read_model


@pytest.mark.parametrize(("family", "form"), FORMS)
def test_layers_compute_what_blocks_do(tmp_path, family, form):
    model = assert_computes(family, cases.saved(family, tmp_path, form), form)
    assert HF.fits([tmp_path])
    assert len(model.notes) == (family == "nllb_moe")


@pytest.mark.parametrize(("family", "given"), VARIANTS.values(), ids=VARIANTS)
def test_config_json_settles_how_they_compute(tmp_path, family, given):
    assert_computes(family, cases.saved(family, tmp_path, **given), **given)


@pytest.mark.parametrize(("family", "form"), FORMS)
def test_what_is_written_back_is_the_same_model(tmp_path, family, form):
    folder = cases.saved(family, tmp_path / "theirs", form, torch.bfloat16)
    told = []
    assert HF.write(read(folder), tmp_path / "ours", Options(progress=told.append)) == [tmp_path / "ours"]
    wanted = cases.contents(folder)
    cases.assert_same(cases.contents(tmp_path / "ours"), wanted)
    assert sum(told) == sum(tensor.nbytes for tensor in wanted.values())
    assert json.loads((tmp_path / "ours" / CONFIG).read_text()) == json.loads((folder / CONFIG).read_text())
    first, again = cases.loaded(family, folder), cases.loaded(family, tmp_path / "ours")
    cases.assert_same(again.state_dict(), first.state_dict())
    if family != "nllb_moe":  # whose forward is not to be relied on
        assert torch.equal(cases.logits(family, again), cases.logits(family, first))


def test_everything_else_passes_through_in_its_place(tmp_path):
    names = list(read(cases.saved("mixtral", tmp_path)).tensors)
    ours = [name for name in names if ".block_sparse_moe." in name]
    layer = "model.layers.0.block_sparse_moe."
    assert {name.removeprefix(layer) for name in ours if name.startswith(layer)} == {
        "router.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
    }
    theirs = [name for name in load_file(tmp_path / SINGLE) if ".block_sparse_moe." not in name]
    assert sorted(set(names) - set(ours)) == sorted(theirs)
    assert names.index("model.layers.0.input_layernorm.weight") < names.index("model.layers.1.input_layernorm.weight")


def test_a_folder_of_several_files_stays_one(tmp_path):
    cases.tiny("qwen3_moe").save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    files = sorted(path.name for path in (tmp_path / "theirs").glob("*.safetensors"))
    assert len(files) > 2
    model = read(tmp_path / "theirs")
    HF.write(model, tmp_path / "ours", Options())
    assert (tmp_path / "ours" / INDEX).is_file()
    cases.assert_same(cases.contents(tmp_path / "ours"), cases.contents(tmp_path / "theirs"))
    assert torch.equal(
        cases.logits("qwen3_moe", cases.loaded("qwen3_moe", tmp_path / "ours")),
        cases.logits("qwen3_moe", cases.loaded("qwen3_moe", tmp_path / "theirs")),
    )


@pytest.mark.parametrize("several", [False, True])
def test_pickled_weights_are_read_and_nothing_else_of_them(tmp_path, several):
    folder = cases.saved("olmoe", tmp_path / "theirs")
    state = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    if several:
        names = [f"pytorch_model-{n}-of-2.bin" for n in (1, 2)]
        parts = {name: names[number % 2] for number, name in enumerate(state)}
        for file in names:
            torch.save({name: tensor for name, tensor in state.items() if parts[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": parts}))
    else:
        torch.save(state, folder / "pytorch_model.bin")
    assert HF.fits([folder])
    HF.write(read(folder), tmp_path / "ours", Options())
    cases.assert_same(cases.contents(tmp_path / "ours"), state)


def test_names_tell_the_family_where_they_can(tmp_path):
    for family, form in FORMS:
        folder = cases.saved(family, tmp_path / family / form, form)
        (folder / CONFIG).unlink()
        assert HF.fits([folder])
        alike = [each for each in (IN_MEMORY if form == "memory" else IN_FILES) if family in each]
        like = alike[0] if alike else [family]
        if len(like) > 1:
            with pytest.raises(ValueError, match=f"got those of {' and '.join(like)}; --family says which") as told:
                read(folder)
            assert str(folder / SINGLE) in str(told.value)
        model = read(folder, family=family) if len(like) > 1 else read(folder)
        assert model.origin["family"] == family
        assert set(model.layers.values()) == {None}
        assert f"There is no {folder / CONFIG}" in model.notes[0]
        HF.write(model, tmp_path / family / f"{form} again", Options())
        cases.assert_same(cases.contents(tmp_path / family / f"{form} again"), cases.contents(folder))
        assert not (tmp_path / family / f"{form} again" / CONFIG).exists()


def test_a_config_of_another_model_type(tmp_path):
    folder = cases.saved("deepseek_v3", tmp_path)
    cases.change_json(folder / CONFIG, model_type="kimi_k2")
    assert None not in read(folder).layers.values()  # its architectures say it
    cases.change_json(folder / CONFIG, architectures=["OtherForCausalLM"])
    assert HF.fits([folder])
    model = read(folder)
    assert set(model.layers.values()) == {None}
    assert "model_type 'kimi_k2'" in model.notes[0]
    assert None not in read(folder, family="deepseek-v3").layers.values()
    with pytest.raises(ValueError, match=r"family: expected one of mixtral, .*got 'kimi_k2'"):
        read(folder, family="kimi_k2")


def test_losses_are_those_of_the_config(tmp_path):
    folder = cases.saved("mixtral", tmp_path)
    cases.change_json(folder / CONFIG, router_aux_loss_coef=0.02, router_jitter_noise=0.1)
    config = next(iter(read(folder).layers.values()))
    assert config.load_balancing_coefficient == pytest.approx(3 * 0.02)  # theirs is K times ours
    assert (config.input_jitter, config.input_jitter_on) == (0.1, "layer")


@pytest.mark.parametrize(
    ("family", "fields", "note"),
    [
        ("mixtral", {"hidden_act": "quick_gelu"}, "the activation 'quick_gelu', hidden_act"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method 'greedy'"),
        ("nllb_moe", {"second_expert_policy": "other"}, "second_expert_policy 'other'"),
    ],
)
def test_what_dmoe_cannot_compute_is_said(tmp_path, family, fields, note):
    folder = cases.saved(family, tmp_path / "theirs")
    cases.change_json(folder / CONFIG, **fields)
    model = read(folder)
    assert set(model.layers.values()) == {None}
    assert note in model.notes[0]
    assert str(folder / CONFIG) in model.notes[0]
    HF.write(model, tmp_path / "ours", Options())
    cases.assert_same(cases.contents(tmp_path / "ours"), cases.contents(folder))


def test_another_dtype_is_in_the_config_too(tmp_path):
    HF.write(read(cases.saved("granitemoe", tmp_path / "theirs")), tmp_path / "ours", Options(dtype=torch.bfloat16))
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in cases.contents(tmp_path / "ours").values()} == {torch.bfloat16}


def test_mxfp4_becomes_the_same_numbers_in_bfloat16(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = cases.saved(
        "gpt_oss", tmp_path / "theirs", intermediate_size=64, num_local_experts=2, num_experts_per_tok=1
    )
    state = load_file(folder / SINGLE)
    torch.manual_seed(0)
    wanted = dict(state)
    for name in [name for name in state if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, rows, columns = state.pop(name).shape
        state[f"{name}_blocks"] = torch.randint(0, 256, (experts, columns, rows // 32, 16), dtype=torch.uint8)
        state[f"{name}_scales"] = torch.randint(0, 200, (experts, columns, rows // 32), dtype=torch.uint8)
        wanted[name] = convert_moe_packed_tensors(state[f"{name}_blocks"], state[f"{name}_scales"])
    save_file(state, folder / SINGLE)
    cases.change_json(folder / CONFIG, quantization_config={"quant_method": "mxfp4"})
    model = read(folder)
    assert "4 tensors of" in model.notes[0]
    assert "MXFP4" in model.notes[0]
    HF.write(model, tmp_path / "ours", Options())
    cases.assert_same(cases.contents(tmp_path / "ours"), wanted)
    assert "quantization_config" not in json.loads((tmp_path / "ours" / CONFIG).read_text())
