"""What ranks are told to do about the rules by which Megatron's optimizers tell parameters apart."""

from __future__ import annotations

import contextlib
from unittest.mock import patch

import rank_jobs_megatron as jobs
import torch
from megatron.core import optimizer
from megatron_cases import Case


def rules_met(group, case, impls, store):
    """``{impl: {(part of an expert, kind): (weight decay, dimensions)}}`` for the parameters of experts."""
    jobs.connect(case.ranks, store)
    found = {}
    for impl in impls:
        training = jobs.Training(case, impl)
        name_of = {parameter: name for name, parameter in training.model.named_parameters()}
        options = optimizer.OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.1)
        rules = optimizer.get_standard_config_overrides(options)  # as Megatron's scripts pass
        groups = optimizer._get_param_groups([training.model], options, rules)
        met = {}
        for each in groups:
            for parameter in each["params"]:
                name = name_of[parameter]
                if ".experts." in name:
                    part = "up" if "fc1" in name or "up_" in name else "down"
                    kind = "bias" if "bias" in name else "weight"
                    met.setdefault((part, kind), set()).add((each["wd_mult"], parameter.dim() == 1))
        found[impl] = met
    return found


def told_under_an_optimizer_of_matrices(group, ranks, impl, store):
    """Megatron's own function sets up Muon, as far as it comes without the package; then the layers are used."""
    jobs.connect(ranks, store)
    case = Case(ranks, steps=1)
    training = jobs.Training(case, impl)
    training.step()
    _set_up_muon(training.model)
    training.model.eval()
    with torch.no_grad():
        tokens = next(jobs.batches(training.config))[:, :-1].contiguous()
        position = torch.arange(jobs.LENGTH).expand(jobs.MICRO_BATCH, -1)
        mask = torch.ones(1, 1, jobs.LENGTH, jobs.LENGTH).triu(1).bool()
        training.model(tokens, position, mask)  # looking on is no training
    training.model.train()
    try:
        training.step()
    except ValueError as error:
        return str(error)
    return None


class _AbsentError(Exception):
    """Where Megatron reaches for the package."""


def _set_up_muon(model):
    from megatron.core.optimizer import muon

    def absent(*arguments, **options):
        raise _AbsentError

    config = optimizer.OptimizerConfig(optimizer="muon", lr=1e-3, weight_decay=0.1)
    with contextlib.ExitStack() as stack:
        for module in (muon, optimizer):
            for name, value in (
                ("HAVE_EMERGING_OPTIMIZERS", True),
                ("TensorParallelMuon", absent),
                ("_create_emerging_optimizer", absent),
            ):
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, value))
        stack.enter_context(contextlib.suppress(_AbsentError))
        muon.get_megatron_muon_optimizer(config, [model])
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # as that function does in the end
