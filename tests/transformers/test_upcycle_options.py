"""Experts that begin apart, what is refused, and the command."""

from __future__ import annotations

import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GemmaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from upcycle_cases import FFN, LAYERS, WIDTH, dense_model, save_dense

from dmoe.integrations.transformers.__main__ import main
from dmoe.integrations.transformers.upcycle_command import verify
from dmoe.integrations.transformers.upcycle_files import upcycle
from dmoe.integrations.transformers.upcycle_verify import compare

FILE = "model.safetensors"
NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("dense"), "llama")


def experts_of(folder, num_experts, layer=0):
    """``{projection: (E, ...)}`` of a Mixtral layer in files."""
    tensors = load_file(folder / FILE)
    where = f"model.layers.{layer}.block_sparse_moe.experts"
    return {
        name: torch.stack([tensors[f"{where}.{e}.{theirs}.weight"] for e in range(num_experts)])
        for name, theirs in NAMES.items()
    }


def ffn_of(folder, layer=0):
    tensors = load_file(folder / FILE)
    return {name: tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in NAMES}


def test_perturbed_experts(dense, tmp_path):
    made = upcycle(dense, tmp_path / "a", num_experts=3, perturb=0.5, seed=1)
    assert not made.exact
    whole = ffn_of(dense)
    noises = []
    for layer in range(LAYERS):
        for name, weights in experts_of(tmp_path / "a", 3, layer).items():
            original = ffn_of(dense, layer)[name]
            noise = (weights - original) / (0.5 * original.std())
            assert (noise.std((1, 2)) - 1).abs().max() < 0.1
            noises.append(noise)
    drawn = torch.stack([noise[:, :5, :5].flatten(1) for noise in noises]).flatten(0, 1)
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.9  # each has noise of its own
    upcycle(dense, tmp_path / "again", num_experts=3, perturb=0.5, seed=1)
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "again" / FILE).read_bytes()
    upcycle(dense, tmp_path / "b", num_experts=3, perturb=0.5, seed=2)
    assert not torch.equal(experts_of(tmp_path / "a", 3)["up"], experts_of(tmp_path / "b", 3)["up"])
    more = upcycle(dense, tmp_path / "c", num_experts=4, perturb=0.5, seed=1)  # an expert is what it is among others
    assert torch.equal(experts_of(tmp_path / "a", 3)["up"], experts_of(more.folder, 4)["up"][:3])
    assert whole["up"].shape == (FFN, WIDTH)


def test_partly_redrawn_experts(dense, tmp_path):
    upcycle(dense, tmp_path / "moe", num_experts=3, reinit=0.25)
    whole, found = ffn_of(dense), experts_of(tmp_path / "moe", 3)
    columns = []
    for e in range(3):
        changed = (found["gate"][e] != whole["gate"]).any(1)
        assert torch.equal(changed, (found["up"][e] != whole["up"]).any(1))
        assert torch.equal(changed, (found["down"][e] != whole["down"]).any(0))
        assert changed.sum() == FFN // 4
        columns.append(tuple(changed.tolist()))
    assert len(set(columns)) == 3


def test_segments_of_redrawn_experts_are_parts_of_one(dense, tmp_path):
    upcycle(dense, tmp_path / "whole", num_experts=2, reinit=0.5)
    upcycle(dense, tmp_path / "cut", num_experts=2, reinit=0.5, granularity=2)
    whole, cut = experts_of(tmp_path / "whole", 2), experts_of(tmp_path / "cut", 4)
    assert torch.equal(cut["up"].view(2, FFN, WIDTH), whole["up"])
    for e in range(2):
        assert torch.equal(torch.cat([cut["down"][2 * e], cut["down"][2 * e + 1]], 1), 2 * whole["down"][e])


def test_other_models_ffns_become_experts_in_turn(dense, tmp_path):
    others = [save_dense(tmp_path / f"other{n}", "mistral", seed=n, hidden_act="gelu") for n in (1, 2)]
    made = upcycle(dense, tmp_path / "moe", num_experts=4, experts=others)
    assert not made.exact
    found = experts_of(tmp_path / "moe", 4)
    for e in range(4):
        assert torch.equal(found["down"][e], ffn_of(others[e % 2])["down"])
    attention = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(load_file(tmp_path / "moe" / FILE)[attention], load_file(dense / FILE)[attention])
    assert upcycle(dense, tmp_path / "two", experts=others).num_experts == 2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_experts": 0}, "num_experts: expected at least 1, got 0"),
        ({"top_k": 9}, "top_k: expected 1 to num_experts, 8, got 9"),
        ({"top_k": 0}, "top_k: expected"),
        ({"granularity": 0}, "granularity: expected at least 1"),
        ({"granularity": 5}, f"granularity: expected a divisor of intermediate_size {FFN}, got 5"),
        ({"every": 0}, "every: expected at least 1"),
        ({"every": 3}, "every: expected at most the 2 layers of .*, got 3"),
        ({"every": 2, "to": "mixtral"}, "every: expected 1, as mixtral has experts in every layer, got 2"),
        ({"perturb": -1.0}, "perturb: expected at least 0"),
        ({"reinit": 1.5}, "reinit: expected a share from 0 to 1"),
        ({"reinit": 0.5, "perturb": 0.1}, "reinit: expected 0 beside perturb"),
        ({"router_std": 0.0}, "router_std: expected above 0"),
        ({"to": "dbrx"}, "to: expected one of mixtral, .*, got dbrx"),
        ({"to": "qwen3_moe"}, "q_norm and k_norm: expected norms of each head, as qwen3_moe has, got none"),
        ({"to": "flex_olmo"}, "norms: expected norms behind attention and FFN, as flex_olmo has, got norms before"),
        ({"experts": ["SRC", "SRC"], "num_experts": 3}, "num_experts: expected a multiple of the 2 models"),
        ({"max_shard_bytes": 0}, "max_shard_bytes: expected at least 1"),
    ],
)
def test_options_that_cannot_be(dense, tmp_path, options, match):
    if "experts" in options:
        options = options | {"experts": [dense] * len(options["experts"])}
    with pytest.raises(ValueError, match=match):
        upcycle(dense, tmp_path / "moe", **options)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "fields", "match"),
    [
        (
            "llama",
            {"attention_bias": True},
            r"attention_bias: expected none, as mixtral has, got biases of q, k, v and o; .* as qwen2_moe has",
        ),
        ("llama", {"mlp_bias": True}, "mlp_bias: expected an FFN without biases"),
        ("llama", {"layer_types": ["full_attention"] * LAYERS}, "layer_types: expected none"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
            "sliding_window: expected all layers with it or none, as qwen3_moe has, got some layers with it",
        ),
        ("qwen2", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config: expected"),
        ("qwen2", {"auto_map": {"AutoModel": "own.Model"}}, "auto_map: expected a model of Transformers itself"),
    ],
)
def test_models_that_no_mixture_preserves(tmp_path, kind, fields, match):
    model = dense_model(kind, **{name: value for name, value in fields.items() if name not in ("auto_map",)})
    model.config.update(fields)
    model.save_pretrained(tmp_path / "dense")
    if "quantization_config" in fields:
        text = (tmp_path / "dense" / "config.json").read_text()
        assert "gptq" in text
    with pytest.raises(ValueError, match=match):
        upcycle(tmp_path / "dense", tmp_path / "moe")
    assert os.listdir(tmp_path) == ["dense"]


def test_other_models_are_refused(dense, tmp_path):
    GemmaConfig().save_pretrained(tmp_path / "gemma")
    with pytest.raises(ValueError, match=r"model_type: expected a dense model of qwen2, .*, got gemma"):
        upcycle(tmp_path / "gemma", tmp_path / "moe")
    head = LlamaForSequenceClassification(dense_model("llama").config)
    head.save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"architectures: expected a language model, .*, got LlamaForSequence"):
        upcycle(tmp_path / "classifier", tmp_path / "moe")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError):
        upcycle(tmp_path / "nothing", tmp_path / "moe")
    (tmp_path / "nothing" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a model_type, got none"):
        upcycle(tmp_path / "nothing", tmp_path / "moe")
    wider = save_dense(tmp_path / "wider", "llama", intermediate_size=2 * FFN)
    with pytest.raises(ValueError, match=f"wider: intermediate_size: expected {FFN}, as .* has, got {2 * FFN}"):
        upcycle(dense, tmp_path / "moe", experts=[dense, wider])
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
            "expected a tensor model.layers.1.mlp.up_proj",
        ),
        (
            lambda tensors: tensors.update({"model.own": torch.ones(1)}),
            "expected the tensors of llama, got model.own too",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}),
            rf"model\.norm\.weight: expected the shape \({WIDTH},\), as config.json says, got \(3,\)",
        ),
    ],
)
def test_tensors_must_be_those_of_the_config(tmp_path, change, match):
    dense = save_dense(tmp_path / "dense", "llama")
    tensors = load_file(dense / FILE)
    change(tensors)
    save_file(tensors, dense / FILE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=match):
        upcycle(dense, tmp_path / "moe")


def test_buffers_of_old_files_are_left_out(tmp_path):
    dense = save_dense(tmp_path / "dense", "llama")
    tensors = load_file(dense / FILE) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors, dense / FILE, metadata={"format": "pt"})
    upcycle(dense, tmp_path / "moe", num_experts=2)
    assert not [name for name in load_file(tmp_path / "moe" / FILE) if "inv_freq" in name]


def test_a_field_of_a_newer_release_is_refused(monkeypatch, tmp_path, dense):
    from dmoe.integrations.transformers import dense_traits

    monkeypatch.setattr(dense_traits, "CARRIED", tuple(set(dense_traits.CARRIED) - {"rms_norm_eps"}))
    with pytest.raises(ValueError, match="rms_norm_eps: expected 1e-06, for which alone llama is known"):
        upcycle(dense, tmp_path / "moe")  # as if it were not known


def with_tokenizer(folder):
    words = {"[UNK]": 0} | {word: n for n, word in enumerate(["the", "was", "of", "and", "a"], 1)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


def test_the_command(tmp_path, capsys):
    dense = with_tokenizer(save_dense(tmp_path / "dense", "qwen3"))
    line = ["upcycle", str(dense), str(tmp_path / "moe"), "--num-experts", "4", "--granularity", "3", "--verify"]
    assert main([*line, "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{tmp_path / 'moe'}: qwen3_moe with 12 experts, 6 for each token"
    assert [re.split(r"\s\s+", row)[0] for row in printed[1:4]] == ["input", "random tokens", "text"]
    assert printed[2].endswith("100.0%")
    assert main(line) == 2  # it is there
    assert "expected nothing of that name, got something" in capsys.readouterr().err
    assert main([*line, "--overwrite", "--reinit", "0.5", "--every", "2"]) == 0
    row = capsys.readouterr().out.splitlines()[2].split()
    assert float(row[4]) > 1e-3  # no bound holds
    assert main(["upcycle", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        main([*line, "--perturb", "0.1", "--reinit", "0.1"])


def test_verification_finds_an_expert_that_is_no_copy(dense, tmp_path):
    made = upcycle(dense, tmp_path / "moe", num_experts=2)
    verify(made)
    (row,) = compare(dense, made.folder)
    assert 0 <= row.relative <= 1e-6
    assert (row.tokens, row.top_1) == (128, 1)
    assert abs(row.kl) < 1e-9
    name = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    tensors = load_file(made.folder / FILE)
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, made.folder / FILE, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"expected logits within 1\.0e-05 of the dense model's, got .* on random tokens"
    ):
        verify(made)
    (row,) = compare(dense, made.folder)
    assert row.kl > 0


def test_the_command_tells_what_it_can(capsys):
    with pytest.raises(SystemExit):
        main(["upcycle", "--help"])
    told = capsys.readouterr().out
    for option in (
        "num-experts",
        "top-k",
        "granularity",
        "perturb",
        "reinit",
        "router-std",
        "experts",
        "every",
        "dtype",
    ):
        assert f"--{option}" in told
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "upcycle" in capsys.readouterr().out
