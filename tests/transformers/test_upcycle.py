"""Dense checkpoints become mixtures that plain Transformers loads, with the same logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from upcycle_cases import DENSE, LAYERS, WIDTH, apart, logits, save_dense, token_ids

from dmoe.checkpoint.hub_folder import INDEX, HubFolder
from dmoe.integrations.transformers import to_dmoe
from dmoe.integrations.transformers.upcycle_files import upcycle

# fp32, relative to the largest logit: the bound that the issue of this piece names.
BOUND = 1e-6


class Made(NamedTuple):
    dense: str
    moe: str
    family: str
    granularity: int


_PLAIN = """
import json, sys
sys.modules["dmoe"] = None  # importing it is an error from here on
import torch
from transformers import AutoModelForCausalLM

given, out = json.loads(sys.argv[1]), {}
ids = torch.tensor(given["ids"])
for folder in given["folders"]:
    model, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    left = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in notes[kind]]
    assert not left, (folder, left)
    with torch.no_grad():
        out[folder] = model.eval()(ids).logits
torch.save(out, given["out"])
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every family at granularity 1, 2 and 4, with tied embeddings at 2, from several files at 4."""
    root, found = tmp_path_factory.mktemp("upcycle"), []
    for kind in DENSE:
        for granularity in (1, 2, 4):
            dense = root / f"{kind}-{granularity}"
            shards = "20KB" if granularity == 4 else "50GB"
            save_dense(dense, kind, max_shard_size=shards, tie_word_embeddings=granularity == 2)
            assert (dense / INDEX).exists() == (granularity == 4)
            moe = root / f"{kind}-{granularity}-moe"
            limit = 30_000 if granularity == 4 else 2**30
            result = upcycle(dense, moe, num_experts=4, top_k=2, granularity=granularity, max_shard_bytes=limit)
            assert (result.folder, result.num_experts, result.top_k) == (moe, 4 * granularity, 2 * granularity)
            found.append(Made(str(dense), str(moe), result.model_type, granularity))
    return found


def test_plain_transformers_loads_them_with_the_same_logits(made, tmp_path):
    given = {"ids": token_ids().tolist(), "folders": [one.moe for one in made], "out": str(tmp_path / "logits.pt")}
    program = [sys.executable, "-c", _PLAIN, json.dumps(given)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    actual = torch.load(given["out"])
    for one in made:
        difference = apart(logits(one.dense), actual[one.moe])
        assert difference <= BOUND, (one, difference)


def test_each_becomes_its_family(made):
    for one, (kind, granularity) in zip(made, [(kind, g) for kind in DENSE for g in (1, 2, 4)], strict=True):
        assert one.family == DENSE[kind][2]
        config = AutoConfig.from_pretrained(one.moe)
        assert config.model_type == one.family
        assert config.tie_word_embeddings == (granularity == 2)
        assert config.dtype == torch.float32
        assert os.path.exists(f"{one.moe}/{INDEX}") == (granularity == 4)
        sizes = [os.path.getsize(f"{one.moe}/{name}") for name in os.listdir(one.moe) if name.endswith("safetensors")]
        assert granularity < 4 or max(sizes) < 40_000  # headers included


def test_experts_differ_in_nothing_and_segments_are_chosen_together(made):
    for one in made:
        model = AutoModelForCausalLM.from_pretrained(one.moe)
        block, G = model.model.layers[1].mlp, one.granularity
        gate = block.gate.weight.view(4, G, WIDTH)
        assert torch.equal(gate, gate[:, :1].expand_as(gate))
        assert len({tuple(row.tolist()) for row in gate[:, 0]}) == 4
        down = block.experts.down_proj.unflatten(0, (4, G))
        assert torch.equal(down, down[:1].expand_as(down))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "longrope", "short_factor": [1.5] * 4, "long_factor": [3.0] * 4, "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_positions_are_encoded_as_before(tmp_path, kind, rope):
    if rope["rope_type"] == "longrope":
        rope = rope | {"original_max_position_embeddings": 16}
    fields = {"head_dim": 8} if kind == "llama" else {}
    dense = save_dense(tmp_path / "dense", kind, rope_parameters={"rope_theta": 300.0, **rope}, **fields)
    upcycle(dense, tmp_path / "moe", num_experts=2, top_k=1)
    assert apart(logits(dense), logits(tmp_path / "moe")) <= BOUND


@pytest.mark.parametrize(("kind", "family"), [("llama", "qwen2_moe"), ("mistral", "qwen2_moe"), ("qwen3", "qwen3_moe")])
def test_only_each_second_layer_becomes_a_mixture(tmp_path, kind, family):
    dense = save_dense(tmp_path / "dense", kind)
    made = upcycle(dense, tmp_path / "moe", every=2, granularity=3)
    assert made.model_type == family  # for Llama and Mistral another one than Mixtral, which has no dense layers
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == [False, True]
    assert apart(logits(dense), logits(tmp_path / "moe")) <= BOUND


def test_what_lies_beside_the_tensors_is_copied_and_nothing_else(tmp_path):
    dense = save_dense(tmp_path / "dense", "qwen3")
    beside = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE")
    for name in (*beside, "README.md", "modeling_own.py", "optimizer.pt"):
        (dense / name).write_text(f'{{"of": "{name}"}}')
    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates" / "tools.jinja").write_text("tools")
    upcycle(dense, tmp_path / "moe", num_experts=2)
    found = sorted(os.listdir(tmp_path / "moe"))
    assert found == sorted([*beside, "additional_chat_templates", "config.json", "model.safetensors"])
    for name in (*beside, "additional_chat_templates/tools.jinja"):
        assert (tmp_path / "moe" / name).read_bytes() == (dense / name).read_bytes()


def test_a_model_in_the_hubs_cache_is_found_by_its_id(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError, match=r"some/model: expected a folder, or a model .* got neither"):
        upcycle("some/model", tmp_path / "moe")
    cached = tmp_path / "hub" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    save_dense(cached / "snapshots" / ("0" * 40), "llama")
    upcycle("some/model", tmp_path / "moe", num_experts=2)
    assert (tmp_path / "moe" / "config.json").exists()


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    dense = save_dense(tmp_path / "dense", "llama")
    from dmoe.checkpoint import hub_writer

    written = []

    def interrupted(tensors, path, **how):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        torch.save({}, path)

    monkeypatch.setattr(hub_writer, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        upcycle(dense, tmp_path / "moe", max_shard_bytes=10_000)
    assert os.listdir(tmp_path) == ["dense"]


def test_what_was_there_stays_unless_it_is_to_be_replaced(tmp_path):
    dense = save_dense(tmp_path / "dense", "llama")
    upcycle(dense, tmp_path / "moe", num_experts=2)
    with pytest.raises(FileExistsError, match="expected nothing of that name"):
        upcycle(dense, tmp_path / "moe", num_experts=4)
    with HubFolder(tmp_path / "moe") as folder:
        assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" not in folder
    upcycle(dense, tmp_path / "moe", num_experts=4, overwrite=True)
    with HubFolder(tmp_path / "moe") as folder:
        assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in folder
        assert len(folder) == 3 + LAYERS * (6 + 1 + 3 * 4)


def test_it_takes_another_dtype(tmp_path):
    dense = save_dense(tmp_path / "dense", "qwen2")
    upcycle(dense, tmp_path / "moe", num_experts=2, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name, parameter in AutoModelForCausalLM.from_pretrained(dense).named_parameters():
        if ".mlp." not in name:
            assert torch.equal(model.get_parameter(name), parameter.to(torch.bfloat16)), name


def test_a_shared_expert_that_a_family_needs_stays_out_of_it(tmp_path):
    dense = save_dense(tmp_path / "dense", "qwen2")
    upcycle(dense, tmp_path / "moe", num_experts=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model.lm_head.weight, AutoModelForCausalLM.from_pretrained(dense).lm_head.weight)
    shared = [parameter for name, parameter in model.named_parameters() if "shared_expert" in name]
    assert len(shared) == 4 * LAYERS
    assert all(parameter.count_nonzero() == 0 for parameter in shared)


@torch.no_grad()
def test_its_blocks_can_become_dmoes_own(made):
    for one in made:
        if one.granularity == 2:
            model = AutoModelForCausalLM.from_pretrained(one.moe).eval()
            expected = model(token_ids()).logits
            to_dmoe(model)
            assert apart(expected, model(token_ids()).logits) <= BOUND, one
