"""Two gloo ranks under Transformers' own plans equal one process: FSDP2, tensor parallel, experts in all modes."""

from __future__ import annotations

import hf_families
import pytest
import rank_jobs_hf
import torch
from rank_pool import RankPool

import dmoe.integrations.transformers as on_transformers

pytestmark = pytest.mark.xdist_group("two ranks of Transformers")


@pytest.fixture(scope="module")
def two_ranks():
    """A world of two: Transformers' meshes are of the whole world."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder, logits and gradients of a tiny model that one process computes with eager, by family."""
    found = {}

    def of(family):
        if family not in found:
            folder = str(tmp_path_factory.mktemp(family))
            model = hf_families.tiny_model(family)
            model.save_pretrained(folder)
            y = hf_families.run(model)
            y.square().mean().backward()
            found[family] = folder, y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return found[family]

    on_transformers.register()
    return of


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    "fields",
    [
        {"fsdp_size": 2},
        {"tp_size": 2},
        {"tp_size": 2, "ep_size": 2},
        {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
        {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
        {"fsdp_size": 2, "ep_size": 2},
    ],
    ids=lambda fields: " ".join(f"{name}={value}" for name, value in fields.items() if value),
)
def test_two_ranks_equal_one_process(family, fields, saved, two_ranks):
    if torch.__version__ < (2, 13) and family == "mixtral" and fields == {"tp_size": 2}:
        pytest.skip("PyTorch 2.11 cannot gather the gradients that this plan shards in strides")
    folder, wanted, wanted_grads = saved(family)
    results = two_ranks.run(rank_jobs_hf.loaded, folder, fields, True)
    for rank, (y, grads) in enumerate(results):
        expected = wanted[rank : rank + 1] if fields.get("fsdp_size") else wanted
        assert (y - expected).abs().max() <= 1e-5 * wanted.abs().max()
        assert grads.keys() == wanted_grads.keys()
        for name, grad in wanted_grads.items():
            assert (grads[name] - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-8, name
    for y, _ in two_ranks.run(rank_jobs_hf.loaded, folder, fields, False):  # "auto" is all_reduce without gradients
        assert torch.isfinite(y).all()
