"""Models of Transformers spread over gloo ranks, from files to files, against plain Transformers in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rank_jobs_parallelize as jobs
import torch
from hub_cases import VOCAB, batches_of, config_of, model_of, write_checkpoint
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import dmoe
from dmoe.integrations.transformers.hub_folder import HubFolder
from dmoe.integrations.transformers.parallel import parallelize
from dmoe.integrations.transformers.parallel_optimizer import load_optimizer
from dmoe.integrations.transformers.parallel_save import save_pretrained


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


@pytest.mark.parametrize(("at", "where"), [("pwrite", 1), ("pwrite", 0), ("fsync", 2), ("replace", 0)])
def test_a_disk_that_is_full_on_one_rank_leaves_nothing_and_all_ranks_know(ranks, folders, tmp_path, at, where):
    path, _ = folders("mixtral")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "other").write_text("")
    for rank, (told, left) in enumerate(ranks.run(jobs.save_fails, path, str(tmp_path / "mine" / "new"), where, at)):
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
