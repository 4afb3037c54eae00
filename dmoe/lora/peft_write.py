"""Adapters in the layouts that PEFT reads, and vLLM and SGLang load.

================  ======================================================================================================
layout            experts are
================  ======================================================================================================
``peft``          parameters of the experts' module, as PEFT adapts them in models of Transformers 5
                  (``target_parameters``). vLLM reads the same for models that it keeps stacked (GPT-OSS, Qwen3-VL-MoE,
                  Qwen3.5-MoE ...: ``is_3d_moe_weight``; vllm/lora/model_manager.py, ``_stack_moe_lora_weights``)
``peft-experts``  linear layers, ``experts.3.gate_proj``: models before Transformers 5. PEFT from 0.19 on joins them
                  when it loads one into a model of Transformers 5
``vllm``          the same names (vllm/lora/model_manager.py, ``packed_modules_mapping``), of one rank and one scale,
                  as vLLM's PEFTHelper knows no ``rank_pattern``; of models that it keeps stacked, those of ``peft``
``sglang``        as ``vllm``; SGLang knows experts by these names alone (sglang 21466; 25528, which would read those
                  of ``peft``, was closed)
================  ======================================================================================================

PEFT refuses dropout beside ``target_parameters`` (0.21, ``ParamWrapper``): layouts that have such say ``lora_dropout``
0, the others what the adapter has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dmoe.checkpoint.stored import Stored, mapped, reshaped, taken
from dmoe.lora.adapter_file import PROJECTIONS, AdapterFile, Update, apart, joined, uniform
from dmoe.lora.model_types import LEAVES, ROUTERS, SPELLED, STACKED, UNGATED, factors_turned
from dmoe.lora.peft_config import CONFIG, PARAMETERS_AS_STORED_SINCE, PREFIX, TENSORS, config_for

LAYOUTS = ("peft", "peft-experts", "vllm", "sglang")


def write_adapter(
    adapter: AdapterFile,
    folder: Path,
    layout: str = "peft",
    *,
    base: str | None = None,
    version: tuple[int, int] = PARAMETERS_AS_STORED_SINCE,
) -> None:
    """Write an adapter's two files into a folder that is there.

    Args:
        adapter: the updates.
        folder: an empty one.
        layout: see above.
        base: name or path of the model, for ``base_model_name_or_path``; None is what the adapter's own config says.
        version: of the PEFT that is to read the ``peft`` layout: those from 0.19 on do alike, and ``(0, 18)`` had
            other factors, see :mod:`dmoe.lora.peft_read`.

    Raises:
        ValueError: an unknown layout, or experts that it cannot name.
        OSError: it cannot be written.
    """
    from safetensors.torch import save_file

    tensors, config = laid_out(adapter, layout, base=base, version=version)
    save_file({name: _own(stored) for name, stored in tensors.items()}, folder / TENSORS, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def laid_out(
    adapter: AdapterFile,
    layout: str,
    *,
    base: str | None = None,
    version: tuple[int, int] = PARAMETERS_AS_STORED_SINCE,
) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The tensors by name, and the config, of :func:`write_adapter`."""
    model_type = adapter.model_type
    if layout not in LAYOUTS:
        raise ValueError(f"write_adapter: layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    stacked = layout == "peft" or (layout == "vllm" and model_type in STACKED)
    if not stacked and model_type in STACKED and adapter.experts:
        raise ValueError(
            f"{adapter.where}: expected a model whose experts have names of their own, for the layout {layout}, got "
            f"{model_type}, which keeps them stacked"
        )
    linear = {path: update.expanded() for path, update in adapter.linear.items()}
    experts = {}
    for module, projections in adapter.experts.items():
        found = {name: each.expanded() for name, each in in_order(projections, model_type).items()}
        experts[module] = found if stacked else _one_by_one(found, SPELLED.get(model_type or "", LEAVES))
    first = None
    if layout in ("vllm", "sglang"):
        linear, experts = uniform(linear, experts)
    elif not stacked and experts:  # PEFT doubles r, and not a pattern's rank, of gate and up projections that it joins
        _, experts = uniform({}, experts)
        first = next((each.rank, each.scale) for updates in experts.values() for each in updates.values())
    named = {f"{PREFIX}{path}": (update.a, update.b) for path, update in linear.items()}
    # Routers of Transformers 5 are modules of their own, and not nn.Linear.
    routers = [path for path in linear if stacked and path.rpartition(".")[2] in ROUTERS]
    ranks = {f"{path}.weight" if path in routers else path: (each.rank, each.scale) for path, each in linear.items()}
    modules, parameters = sorted(set(linear) - set(routers)), [f"{path}.weight" for path in routers]
    for module, updates in experts.items():
        if stacked:
            named |= _wrapped(module, updates, factors_turned(model_type, version))
            parameters += [f"{module}.{name}" for name in updates]
            ranks |= {f"{module}.{name}": (each.rank, each.scale) for name, each in updates.items()}
            continue
        modules += updates
        for name, each in updates.items():
            ranks[f"{module}.#.{name}"] = (each.rank, each.scale)
            for e in range(each.num_experts):
                named[f"{PREFIX}{module}.{e}.{name}"] = (taken(each.a, e), taken(each.b, e))
    tensors = {f"{path}.lora_{s}.weight": f for path, pair in named.items() for s, f in zip("AB", pair, strict=True)}
    config = config_for(
        ranks,
        modules=sorted(set(modules)),
        parameters=parameters,
        base=base,
        kept=adapter.config,
        version=version,
        first=first,
        dropout=adapter.dropout,
    )
    return tensors, config


def in_order(projections: Mapping[str, Update], model_type: str | None) -> dict[str, Update]:
    """As the module lists them; an update of up projections alone, of gated experts, as one of both halves."""
    found = {name: projections[name] for name in PROJECTIONS if name in projections}
    if "up_proj" not in found or model_type is None or model_type in UNGATED:
        return found
    up = found.pop("up_proj")
    return {"gate_up_proj": joined(None, up, ""), **found}


def _wrapped(module: str, projections: Mapping[str, Update], turned: bool) -> dict[str, tuple[Stored, Stored]]:
    """Factors as wrappers hold them: the last parameter's outermost."""
    found = {}
    for depth, update in enumerate(reversed(list(projections.values()))):
        found[f"{PREFIX}{module}{'.base_layer' * depth}"] = wrapped(update, turned)
    return found


def wrapped(update: Update, turned: bool) -> tuple[Stored, Stored]:
    """``A (E r, in)`` and ``B (out, r E)``; ``turned``, those of the transposed matrices."""
    a, b = update.a, update.b
    if turned:
        a, b = (mapped([each], lambda t: t[0].mT, by_rows=True) for each in (b, a))
    experts, rank, inputs = a.shape
    flat = reshaped(a, (experts * rank, inputs))
    return flat, mapped([b], lambda t: t[0].permute(1, 2, 0).reshape(b.shape[1], rank * experts))


def _one_by_one(projections: Mapping[str, Update], names: tuple[str, str, str]) -> dict[str, Update]:
    """Of gate, up and down projections, as far as they are there, by their names."""
    found: dict[str, Update] = {}
    for name, update in projections.items():
        if name == "gate_up_proj":
            found |= dict(zip(names[:2], apart(update), strict=True))
        else:
            found[names[1] if name == "up_proj" else names[2]] = update
    return found


def _own(stored: Stored) -> Tensor:
    return stored.read().contiguous().clone()
