"""The contestants of ``lora_experts.py``: one module of Transformers, adapted and computed in several ways."""

from __future__ import annotations

import copy
import ctypes
import gc
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dmoe
from dmoe.integrations.transformers import register
from parts.hf_experts import Case, Contestant, WithExperts, make_module

RANK = 16
TARGETS = ("gate_up_proj", "down_proj")
FULL, MINE, QUANTIZED = "all weights, dmoe", "dmoe.lora", "dmoe.lora, nf4"


def contestants_of(case: Case) -> list[Contestant]:
    """All of them; adapters hold the same numbers."""
    register()
    found = [_of_peft(f"PEFT, {word}", case, word) for word in ("eager", "grouped_mm", "dmoe")]
    factors = _factors(found[0])
    found += [_of_dmoe(MINE, case, factors, None), _of_dmoe(QUANTIZED, case, factors, "nf4")]
    for word in ("grouped_mm", "dmoe"):
        module = WithExperts(make_module(case))
        _name(module, word)
        found.append(Contestant(f"all weights, {word}", case, module))
    return found


def _of_peft(name: str, case: Case, word: str) -> Contestant:
    from peft import LoraConfig, get_peft_model

    module = WithExperts(make_module(case))
    _name(module, word)
    targets = [f"experts.{target}" for target in TARGETS]
    model = get_peft_model(module, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_parameters=targets))
    torch.manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            nn.init.normal_(parameter, std=0.05)
    return Contestant(name, case, model)


def _factors(contestant: Contestant) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each projection, ``a (E, r, in)`` and ``b (E, out, r)``, as PEFT's wrappers hand them over."""
    found = {}
    for wrapper in contestant.module.modules():
        name = getattr(wrapper, "parameter_name", None)
        if name in TARGETS:
            lhs, rhs, _ = wrapper.get_delta_factors("default")  # type: ignore[operator]
            found[name] = (rhs.detach().clone(), lhs.detach().clone())
    return found


def _of_dmoe(name: str, case: Case, factors: dict[str, tuple[Tensor, Tensor]], form: str | None) -> Contestant:
    module = WithExperts(make_module(case))
    _name(module, "dmoe")
    if form is not None:
        dmoe.quant.quantize(module, form)
    dmoe.lora.add(module, rank=RANK, alpha=2 * RANK)
    with torch.no_grad():
        for parameter_name, parameter in module.named_parameters():
            if ".lora." in parameter_name:
                _, target, factor = parameter_name.rsplit(".", 2)
                parameter.copy_(factors[target][factor == "b"].view_as(parameter))
    return Contestant(name, case, module)


def exact_results(contestants: list[Contestant]) -> dict[str, dict[str, Tensor]]:
    """In float64, by Transformers' own loop over experts; of dmoe's adapters their names. Not of quantised ones."""
    by_loop = {}
    for kind in ("PEFT, eager", "all weights, grouped_mm"):
        given = next(each for each in contestants if each.name == kind)
        module = copy.deepcopy(given.module)
        for each in module.modules():
            config: Any = getattr(each, "config", None)
            if config is not None:
                config._experts_implementation = "eager"
        by_loop[kind] = _Wide(kind, given.case, module.double()).results(0)
    lora, full = by_loop.values()
    found = {each.name: lora for each in contestants if each.name.startswith("PEFT")}
    found |= {each.name: full for each in contestants if each.name.startswith("all")}
    mine = next(each for each in contestants if each.name == MINE)
    wide = copy.deepcopy(mine.module).double()
    found[MINE] = {**_Wide(MINE, mine.case, wide).results(0), "y": lora["y"], "input 0": lora["input 0"]}
    return found


class _Wide(Contestant):
    """On the same numbers as the others, in float64."""

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        """See :meth:`Contestant.inputs`."""
        rounded = (t.detach() for t in super().inputs(seed))
        return tuple(t.double().requires_grad_() if t.is_floating_point() else t for t in rounded)


def peak_bytes(contestant: Contestant) -> int:
    """Bytes by which this process's resident memory grows in a step, gradients included."""
    contestant.clear()
    inputs = contestant.inputs(0)
    contestant.run(inputs)
    contestant.clear()
    inputs = contestant.inputs(1)
    _give_back()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    contestant.run(inputs)
    grown = _resident("VmHWM") - before
    contestant.clear()
    return grown


def _give_back() -> None:
    """Pages of freed memory go back to the system, so that what a step takes is seen to grow."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _name(module: Any, word: str) -> None:
    module.experts.config._experts_implementation = word
