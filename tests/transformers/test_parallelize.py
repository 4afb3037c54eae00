"""Models of Transformers spread over gloo ranks, from files to files, against plain Transformers in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rank_jobs_parallelize as jobs
import torch
from hf_families import families, run, tiny_model, token_ids
from hub_cases import batches_of, model_of, write_checkpoint
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig

import dmoe
from dmoe.checkpoint.hub_folder import HubFolder
from dmoe.integrations.transformers.parallel import parallelize
from dmoe.integrations.transformers.parallel_optimizer import load_optimizer
from dmoe.integrations.transformers.parallel_save import save_pretrained

# Ranks import transformers, which takes them seconds: in one worker they do so once.
pytestmark = pytest.mark.xdist_group("transformers")
NO_LOSS = {"load_balancing_coefficient": 0.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders by family and form, each written once, with the model."""
    made = {}

    def folder(family, **options):
        key = (family, *sorted(options.items()))
        if key not in made:
            path = tmp_path_factory.mktemp(family)
            made[key] = (str(path), write_checkpoint(path, family, **options))
        return made[key]

    return folder


@pytest.mark.parametrize("grid", [(4, 1), (2, 2)])
@pytest.mark.parametrize(("family", "fused"), [("qwen3_moe", False), ("qwen3_moe", True), ("mixtral", False)])
def test_ranks_read_what_they_hold_and_compute_what_transformers_does(ranks, folders, family, fused, grid):
    path, model = folders(family, fused=fused)
    x = batches_of(1, 4, seed=3)[0].unsqueeze(1)
    results = ranks.run(jobs.read_back, path, grid, x)
    with HubFolder(path) as files:
        sizes = {name: files.read(name).nbytes for name in files}
    for rank, result in enumerate(results):
        assert_close(result["logits"], model(x[rank]).logits)
        assert result["own"]
        assert result["here"] == ([rank] if grid == (4, 1) else [[0, 1], [2, 3]][rank % 2])
        assert result["tied"] == model.config.tie_word_embeddings
        assert not result["training"]
        assert result["generation"]["max_new_tokens"] == 7
        of_experts = sum(size for name, size in result["read"].items() if ".experts." in name)
        assert of_experts * 4 == sum(size for name, size in sizes.items() if ".experts." in name)
    for name, size in sizes.items():  # experts, and what FSDP cuts, are read once by all ranks together
        copies = 4 if grid == (4, 1) and ".experts." not in name else 1
        assert sum(result["read"].get(name, 0) for result in results) == copies * size, name


def test_a_built_model_is_spread_and_each_rank_keeps_its_experts_alone(ranks):
    x = batches_of(1, 4, seed=3)[0].unsqueeze(1)
    model = model_of("mixtral")
    for rank, (logits, own) in enumerate(ranks.run(jobs.built, "mixtral", x)):
        assert_close(logits, model(x[rank]).logits)
        assert own


def test_dtype_is_the_configs_unless_told(folders):
    path, model = folders("mixtral", dtype=torch.bfloat16)
    assert parallelize(path, progress=False).dtype == torch.bfloat16
    told = parallelize(path, dtype="float32", progress=False)
    x = torch.arange(6).unsqueeze(0)
    assert_close(told(x).logits, model.float()(x).logits)


def test_the_balance_loss_is_that_of_transformers():
    """Theirs joins all layers before it multiplies: of one layer the two are the same."""
    model = model_of("mixtral", num_hidden_layers=1)
    ids = batches_of(1, 3)[0]
    theirs = model(ids, output_router_logits=True).aux_loss * model.config.router_aux_loss_coef
    ours = parallelize(model).train()
    ours(ids)
    assert_close(dmoe.aux_loss(ours), theirs)


def transformers_alone(path, batches):
    """Steps of plain Transformers, without the balance loss, on all ranks' tokens."""
    model = AutoModelForCausalLM.from_pretrained(path).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=jobs.LR)

    def clip(model, norm):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), norm)

    losses, norms = jobs.steps(model, optimizer, batches, clip, aux=False)
    return losses, norms, model.state_dict()


def assert_same_training(results, expected):
    """Losses are means over ranks; norms and weights are the same on all of them."""
    losses, norms, weights = expected
    assert_close(torch.stack([result[0] for result in results]).mean(0), losses, rtol=1e-5, atol=1e-6)
    assert (norms > jobs.MAX_NORM).all()  # clipping was at work
    for _, norms_there, weights_there in results:
        assert_close(norms_there, norms, rtol=1e-4, atol=1e-6)
        for name, value in weights.items():
            if "load_since_update" not in name:
                assert_close(weights_there[name], value, rtol=1e-4, atol=3e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_training_with_replicated_attention_equals_plain_transformers(ranks, folders, family):
    path, _ = folders(family)
    batches = batches_of(3, 4)
    results = ranks.run(jobs.train, path, (4, 1), batches, None, False, NO_LOSS)
    assert_same_training(results, transformers_alone(path, batches))


# Replicas cut experts into whole ones, or across (two replicas of one expert each).
@pytest.mark.parametrize(("ep", "fsdp", "experts"), [(2, 2, 4), (1, 4, 4), (2, 2, 2)])
def test_grids_of_ranks_train_with_the_balance_loss_of_all_tokens(ranks, folders, tmp_path, ep, fsdp, experts):
    path, _ = folders("qwen3_moe", experts=experts)
    batches = batches_of(2, 4)
    expected = jobs.train(None, path, (1, 1), batches)
    results = ranks.run(jobs.train, path, (ep, fsdp), batches, tmp_path / "many")
    assert_same_training(results, expected)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    for name, value in results[0][2].items():
        if "load_since_update" not in name:
            assert torch.equal(saved[name], value)


def test_a_run_of_two_ranks_goes_on_alone_or_on_four(ranks, folders, tmp_path):
    """Weights and AdamW's state, through Hugging Face's format: losses are those of a run that never stopped."""
    path, _ = folders("mixtral")
    batches = batches_of(4, 4)
    losses, norms, weights = jobs.train(None, path, (1, 1), batches)
    ranks.run(jobs.train, path, "halves", batches[:2], tmp_path / "half")
    assert files_in(tmp_path / "half0") == files_in(tmp_path / "half1")  # two runs, two folders, the same bytes

    saved = str(tmp_path / "half0")
    alone = jobs.train(None, saved, (1, 1), batches[2:], None, True)
    assert_same_training([alone], (losses[2:], norms[2:], weights))
    for grid in ((4, 1), (2, 2)):
        results = ranks.run(jobs.train, saved, grid, batches[2:], None, True)
        assert_same_training(results, (losses[2:], norms[2:], weights))

    # What is read by other ranks and written again is the same file, the optimizer's state included.
    again = tmp_path / "again"
    ranks.run(jobs.train, saved, (2, 2), batches[:0], again, True)
    assert files_in(again) == files_in(saved)


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# Stacked and transposed, with biases; shared experts beside them; under other names; interleaved in the files.
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "granitemoe", "inkling2"])
def test_other_families_are_written_as_they_were_read(ranks, tmp_path, family):
    if family not in families():
        pytest.skip("this release has no such family")
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    ids = token_ids()
    for y in ranks.run(jobs.there_and_back, str(tmp_path / "theirs"), (2, 2), ids, str(tmp_path / "ours")):
        assert_close(y, run(model, ids), rtol=1e-4, atol=1e-5)
    with HubFolder(tmp_path / "theirs") as theirs, HubFolder(tmp_path / "ours") as ours:
        assert set(ours) == set(theirs)
        for name in theirs:
            assert torch.equal(ours.read(name), theirs.read(name)), name


@pytest.mark.parametrize(
    ("at", "where", "grid"),
    [("pwrite", 1, (4, 1)), ("pwrite", 3, (2, 2)), ("fsync", 2, (4, 1)), ("replace", 0, (4, 1))],
)
def test_a_disk_that_is_full_on_one_rank_leaves_nothing_and_all_ranks_know(ranks, folders, tmp_path, at, where, grid):
    """With two replicas of one expert each, ranks gather experts while one of them cannot write."""
    path, _ = folders("mixtral", experts=2 if grid == (2, 2) else 4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "other").write_text("")
    results = ranks.run(jobs.save_fails, path, str(tmp_path / "mine" / "new"), where, at, grid)
    for rank, (told, left) in enumerate(results):
        assert left == ["other"]
        if rank == where:
            assert told.startswith("OSError: [Errno 28] No space left on device")
        else:
            assert told == (
                f"RuntimeError: rank {where} failed, and so all ranks stop: OSError: [Errno 28] No space left on device"
            )


def test_a_file_that_one_rank_cannot_read_stops_all(ranks, folders):
    path, _ = folders("mixtral")
    told = ranks.run(jobs.damaged, path)
    assert told[1] == "OSError: [Errno 5] Input/output error"
    assert told[0] == told[2] == told[3] == "RuntimeError: rank 1 failed, and so all ranks stop: " + told[1]


def test_a_model_is_replaced_only_when_told(folders, tmp_path):
    path, _ = folders("mixtral")
    model = parallelize(path, progress=False)
    save_pretrained(model, tmp_path / "new", progress=False)
    before = files_in(tmp_path / "new")
    assert "tokenizer.json" in before
    with pytest.raises(FileExistsError, match="expected nothing of that name, got something"):
        save_pretrained(model, tmp_path / "new", progress=False)
    with torch.no_grad():
        model.model.norm.weight.fill_(2)
    save_pretrained(model, tmp_path / "new", overwrite=True, progress=False)
    after = files_in(tmp_path / "new")
    assert after.keys() == before.keys()
    assert after != before


REFUSED = [
    ({"ep": 0}, "ValueError: parallelize: ep: expected an integer of at least 1, got 0"),
    ({"ep": 4}, "RuntimeError: parallelize: expected a process group of ep * fsdp = 4 * 1 ranks, got none: call"),
    ({"dtype": "float7"}, "ValueError: parallelize: dtype: expected a floating-point dtype of torch or its name, got"),
    ({"dtype": torch.int8}, "ValueError: parallelize: dtype: expected a floating-point dtype of torch or its name"),
    ({"model_or_path": 3}, "TypeError: parallelize: expected a path or a model of Transformers, got int"),
    ({"model_or_path": "no/such-model"}, "FileNotFoundError: no/such-model: expected a folder, or a model that is in"),
    ({"top_k": 3}, "ValueError: to_dmoe: top_k: expected no value, the model settles it as 2, got 3"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_cannot_be_is_said_in_a_sentence(folders, call, message):
    path, _ = folders("mixtral")
    assert jobs.refused(None, {"model_or_path": path, **call}).startswith(message)


def test_sizes_that_do_not_fit_the_ranks_are_said_in_a_sentence(ranks, folders):
    path, _ = folders("mixtral", experts=6)
    for call, message in [
        ({"ep": 4}, "ValueError: parallelize: ep: expected a divisor of the 6 experts of model.layers.0.mlp, got 4"),
        (
            {"ep": 3, "fsdp": 1},
            "ValueError: parallelize: expected ep * fsdp to be the 4 ranks of the process group, got ep=3 * fsdp=1",
        ),
    ]:
        assert ranks.run(jobs.refused, {"model_or_path": path, **call}) == [message] * 4


def damage(folder, what):
    """One thing wrong with a folder."""
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    key = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    file = folder / weight_map[key]
    tensors = load_file(file)
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif what == "no file":
        file.unlink()
    elif what == "no config":
        (folder / "config.json").unlink()
    elif what in ("no key", "no norm"):
        key = key if what == "no key" else "model.norm.weight"
        file = folder / weight_map.pop(key)
        tensors = {name: tensor for name, tensor in load_file(file).items() if name != key}
        index.write_text(json.dumps({"weight_map": weight_map}))
        save_file(tensors, file)
    elif what == "shape":
        save_file(tensors | {key: torch.zeros(24, 15)}, file)
    elif what == "embedding":
        file = folder / weight_map["model.embed_tokens.weight"]
        save_file(load_file(file) | {"model.embed_tokens.weight": torch.zeros(7, 16)}, file)
    elif what == "llama":
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=1).save_pretrained(folder)
    elif what == "quantised":
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8"}
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", "expected a safetensors file, got: "),
        ("no file", "which model.safetensors.index.json names, got no such file"),
        ("no config", "expected a config.json, got none"),
        (
            "no key",
            "model.layers.1.mlp.experts.gate_up_proj: expected 4 experts in the files, got 3, without "
            "model.layers.1.block_sparse_moe.experts.2.w3.weight",
        ),
        ("no norm", "expected model.norm.weight (16,) for MixtralForCausalLM, got no such tensor"),
        (
            "shape",
            "experts.2.w3.weight: expected shape (24, 16) as model.layers.1.block_sparse_moe.experts.0.w3.weight",
        ),
        ("embedding", "model.embed_tokens.weight: expected shape (48, 16), got (7, 16)"),
        ("llama", "to_dmoe: expected a model with MoE blocks, got LlamaForCausalLM without any"),
        ("quantised", "expected weights that are not quantised, got a quantization_config"),
    ],
)
def test_files_that_are_damaged_are_named(tmp_path, what, message):
    write_checkpoint(tmp_path, "mixtral")
    damage(tmp_path, what)
    told = jobs.refused(None, {"model_or_path": tmp_path})
    assert message in told


def test_a_model_is_spread_once():
    model = parallelize(model_of("mixtral"))
    with pytest.raises(
        ValueError, match="expected a MixtralForCausalLM with Transformers' own MoE blocks, got one with"
    ):
        parallelize(model)


def test_tensors_that_are_nobodys_are_told_about(tmp_path):
    write_checkpoint(tmp_path, "mixtral", shard="1GB")
    save_file(
        load_file(tmp_path / "model.safetensors") | {"model.extra": torch.zeros(2)}, tmp_path / "model.safetensors"
    )
    with pytest.warns(UserWarning, match=r"1 tensors are none of MixtralForCausalLM's, and left out: model\.extra"):
        parallelize(tmp_path, progress=False)


def test_an_optimizer_of_another_model_or_kind_is_refused(folders, tmp_path):
    path, _ = folders("mixtral")
    model = parallelize(path, progress=False).train()
    optimizer = jobs.optimizer_of(model)
    jobs.steps(model, optimizer, batches_of(1, 2), dmoe.parallel.clip_grad_norm)
    save_pretrained(model, tmp_path / "new", optimizer=optimizer, progress=False)
    stranger = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    for other, message in [
        (stranger, "expected the state of AdamW with 1 groups of parameters, got AdamW with 2"),
        (torch.optim.SGD(model.parameters(), lr=1.0), "expected the state of SGD with 1 groups of parameters"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_optimizer(other, model, tmp_path / "new")
    with pytest.raises(ValueError, match="optimizer: expected parameters of the model, got one of shape"):
        save_pretrained(model, tmp_path / "newer", optimizer=stranger, progress=False)
    with pytest.raises(ValueError, match="expected a model that parallelize returned, got MixtralForCausalLM"):
        save_pretrained(model_of("mixtral"), tmp_path / "newer")
    with pytest.raises(ValueError, match="max_shard_size: expected bytes"):
        save_pretrained(model, tmp_path / "newer", max_shard_size="5 potatoes")
    assert not (tmp_path / "newer").exists()
