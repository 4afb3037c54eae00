"""Muon, Adafactor and others on stacked experts: a step is that on each matrix by itself, over any number of ranks."""

from __future__ import annotations

import copy
import pickle

import pytest
import rank_jobs_whole_model as jobs
import torch
from parallel_layer_cases import close
from torch import nn

import dmoe
from dmoe.optim import PerMatrix


class Codes(torch.optim.Optimizer):
    """State as 8-bit optimizers have it: bytes, and a table beside them; not written in place."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                before = state.get("codes", torch.zeros_like(p, dtype=torch.uint8))
                state["codes"] = (before + (p.grad * 100).to(torch.int32).to(torch.uint8)) // 2
                state["table"] = torch.arange(4, dtype=torch.float64)
                state["steps"] = state.get("steps", 0) + 1
                p.sub_(group["lr"] * (state["codes"].to(p.dtype) - 128) / 128)


OPTIMIZERS = {
    "Codes": (Codes, {"lr": 0.02}),
    "Muon": (torch.optim.Muon, {"lr": 0.02, "weight_decay": 0.1}),
    "KellersMuon": (jobs.KellersMuon, {"lr": 0.02}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.02}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.02}),
}


def matrices_of(parameter, value):
    """By hand: what one expert has of a parameter."""
    dims = 1 if parameter.endswith("bias") else 2
    return list(value.reshape(-1, *value.shape[value.dim() - dims :]))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("gated", [True, False])
def test_a_step_is_that_of_each_matrix_alone(name, gated):
    kind, options = OPTIMIZERS[name]
    torch.manual_seed(0)
    layer = dmoe.MoE(hidden_size=6, ffn_hidden_size=4, num_experts=3, top_k=2, gated=gated, bias="expert")
    given = {f"{n}": p for n, p in layer.experts.named_parameters() if p.ndim > 2 or "Muon" not in name}
    if "Muon" in name:
        given = {n: p for n, p in given.items() if n.endswith("proj")}
    given["router"] = layer.router.weight
    apart = {
        n: [nn.Parameter(m.clone()) for m in matrices_of(n, p.detach())] for n, p in given.items() if n != "router"
    }
    apart["router"] = [nn.Parameter(layer.router.weight.detach().clone())]
    optimizer = PerMatrix([{"params": list(given.values())}], kind, **options)
    reference = kind([m for each in apart.values() for m in each], **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(3):
        for group in reference.param_groups:
            group["lr"] = options["lr"] / (1 + step)
        for n, parameter in given.items():
            parameter.grad = torch.randn_like(parameter)
            for one, grad in zip(
                apart[n], [parameter.grad] if n == "router" else matrices_of(n, parameter.grad), strict=True
            ):
                one.grad = grad.clone()
        optimizer.step()
        reference.step()
        schedule.step()
        if step == 1:  # as a checkpoint, and moved to other memory
            state = copy.deepcopy(optimizer.state_dict())
            given["router"].data = given["router"].data.clone()
            layer.experts.down_proj.data = layer.experts.down_proj.data.clone()
            optimizer = PerMatrix([{"params": list(given.values())}], kind, **options)
            optimizer.load_state_dict(state)
            schedule.optimizer = optimizer
    for n, parameter in given.items():
        assert torch.equal(parameter.detach().reshape(-1), torch.cat([m.detach().reshape(-1) for m in apart[n]])), n
        for key, value in optimizer.state[parameter].items():
            theirs = [reference.state[m][key] for m in apart[n]]
            if torch.is_tensor(value) and value.dim():
                assert torch.equal(value.reshape(-1), torch.cat([each.reshape(-1) for each in theirs])), (n, key)
                assert value.dtype == theirs[0].dtype
            else:
                assert all(value == each for each in theirs)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "file"])
def test_a_copy_goes_on_like_the_original(copied):
    """With the optimizer first: a deep copy of a parameter is without its marks."""
    torch.manual_seed(0)
    layer = dmoe.MoE(hidden_size=6, ffn_hidden_size=4, num_experts=3, top_k=2, bias="expert")
    optimizer = PerMatrix(layer.experts.parameters(), torch.optim.Adafactor, lr=0.02)

    def steps(layer, optimizer):
        for step in range(2):
            for parameter in layer.experts.parameters():
                parameter.grad = torch.linspace(-1, step, parameter.numel()).view_as(parameter)
            optimizer.step()

    steps(layer, optimizer)
    other_optimizer, other = copied((optimizer, layer))
    for pair in ((layer, optimizer), (other, other_optimizer)):
        steps(*pair)
    for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
        assert mine is not theirs
        assert torch.equal(mine, theirs)


# PyTorch's own Adafactor takes no DTensor in two dimensions, as FSDP2 makes of dense weights.
@pytest.mark.parametrize(
    ("name", "sizes", "data", "fields"),
    [
        ("Muon", {"ep": 4}, "ddp", {}),
        ("Muon", {"replicas": 2, "ep": 2}, "fsdp2", {"shared_ffn_hidden_size": 4}),  # one expert, on the first rank
        ("Muon", {"replicas": 4}, "fsdp2", {"num_experts": 6}),  # 2, 2, 2 and none
        ("Adafactor", {"ep": 4}, "ddp", {}),
        ("Adafactor", {"replicas": 2, "ep": 2}, "ddp", {}),
    ],
)
def test_ranks_change_nothing(ranks, tmp_path, name, sizes, data, fields):
    """Three steps; then a checkpoint, which goes on with two more on another layout, as one process does."""
    fields = {**jobs.FIELDS, **fields}
    torch.manual_seed(7)
    batches = [[[torch.randint(12, (2, 5))] for _ in range(4)] for _ in range(5)]
    model = jobs.Model(fields)
    together = [[torch.cat([part for (part,) in step])] for step in batches]
    optimizers = jobs.matrix_optimizers(model, name)
    losses, _ = jobs.take_steps(model, optimizers, together, lambda m, n: torch.zeros(()))
    folder = str(tmp_path / "checkpoint")
    # PyTorch 2.10 adds Muon's 1e-7 to the norm of each rank's part of a dense weight that FSDP2 cut.
    tolerance = 1e-6 if data == "fsdp2" and torch.__version__ < (2, 13) else 1e-9
    for there, values in ranks.run(jobs.train_matrices, fields, sizes, data, name, batches, folder):
        close("losses", there, losses, tolerance)
        for n, value in model.state_dict().items():
            close(n, values[n], value, tolerance)


@pytest.mark.parametrize("fields", [{"ffn_hidden_size": [16, 32, 16, 32]}])
def test_what_cannot_be_cut_is_named(fields):
    layer = dmoe.MoE(hidden_size=16, num_experts=4, top_k=2, **fields)
    with pytest.raises(
        ValueError, match=r"PerMatrix: params: expected whole matrices of experts, got .* of different widths"
    ):
        PerMatrix(layer.parameters(), torch.optim.SGD, lr=0.1)


def test_an_optimizer_that_calls_the_model_is_named():
    parameters = dmoe.MoE(hidden_size=8, ffn_hidden_size=8, num_experts=2, top_k=1).parameters()
    with pytest.raises(ValueError, match=r"PerMatrix: optimizer: .* got LBFGS, whose step calls the model by itself"):
        PerMatrix(parameters, torch.optim.LBFGS)


def test_parts_of_matrices_are_named(ranks):
    for told in ranks.run(jobs.cut_matrices):
        assert "or of which ranks share each expert's F" in told[0]
        assert "with FSDP2 let no more ranks hold the same experts than there are experts on one" in told[1]


@pytest.mark.parametrize("name", ["bitsandbytes", "torchao"])
def test_eight_bit_adam_on_ranks_is_that_of_one_process(ranks, name):
    """The packages themselves, which `make test-frameworks` installs beside the others."""
    jobs.eight_bit(name)  # skips where it is not there
    torch.manual_seed(7)
    batches = [[[torch.randint(12, (2, 5))] for _ in range(4)] for _ in range(4)]
    fields = {**jobs.FIELDS, "hidden_size": 32, "ffn_hidden_size": 16}
    model = jobs.Model(fields, torch.float32)
    optimizer = jobs.eight_bit(name)(model.parameters())
    together = [[torch.cat([part for (part,) in step])] for step in batches]
    jobs.take_steps(model, optimizer, together, lambda m, n: torch.zeros(()))
    state = optimizer.state[model.blocks[0].moe.experts.down_proj]
    results = ranks.run(jobs.train_in_eight_bits, name, fields, batches)
    for values, dtypes in results:
        assert torch.uint8 in dtypes.values() or name == "torchao"
        assert dtypes == {key: value.dtype for key, value in state.items() if torch.is_tensor(value)}
        for n, value in model.state_dict().items():
            close(n, values[n], value, 1e-5)
