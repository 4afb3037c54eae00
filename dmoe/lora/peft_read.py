"""Adapters as PEFT writes them, and as servers read them: from names and shapes to updates.

All of these are known, beside linear layers' ``NAME.lora_A.weight (r, in)`` and ``NAME.lora_B.weight (out, r)``:

===============================================  ======================================================================
names                                            what they are
===============================================  ======================================================================
``...experts.3.gate_proj.lora_A.weight``         an expert's own linear layer, as models had them before Transformers 5;
                                                 also ``w1``, ``w3``, ``w2`` (Mixtral), ``wi``, ``wo``, ``fc1``, ``fc2``
``...experts.base_layer.lora_A.weight``,         PEFT's wrappers of parameters (``target_parameters``), the first
``...experts.lora_A.weight``                     parameter's innermost: ``A (E r, in)``, expert by expert, and
                                                 ``B (out, r E)``, rank by rank
``...experts.gate_up_proj.lora_A.weight``        of all experts: ``A (E, r, in)``, ``B (E, out, r)``; 1 for E where they
                                                 share it (Megatron-Bridge's for SGLang)
===============================================  ======================================================================

Wrappers of 0.18 took a parameter ``(E, x, y)`` for ``(E, in, out)``, whatever it was; from 0.19 on ``is_transposed``
of the module says. So 0.18's have ``A`` and ``B`` of ``(E, out, in)`` parameters the other way round; sizes tell, or
else ``peft_version``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from dmoe.checkpoint.formats.hf_files import open_files
from dmoe.checkpoint.hub_folder import read_json
from dmoe.checkpoint.stored import Stored, mapped, reshaped, stacked
from dmoe.lora.adapter_file import PROJECTIONS, AdapterFile, Update, joined
from dmoe.lora.model_types import HALF_OF_LEAF, UNMARKED, factors_turned, model_type_of
from dmoe.lora.peft_config import CONFIG, PARAMETERS_AS_STORED_SINCE, PICKLED, PREFIX, TENSORS, PeftConfig

_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])\.weight")
_STACKED = re.compile(r"(?P<module>(?:.*\.)?experts)(?P<nest>(?:\.base_layer)*)")
_WHOLE = re.compile(r"(?P<module>(?:.*\.)?experts)\.(?P<name>gate_up_proj|up_proj|down_proj)")
_ONE = re.compile(r"(?P<module>(?:.*\.)?experts)\.(?:expert_)?(?P<e>\d+)\.(?P<name>\w+)")
_MOST_EXPERTS = 1 << 16


def read_adapter(folder: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> AdapterFile:
    """The adapter in a folder of PEFT's; tensors stay in the file until they are read. Nothing in it is executed.

    Args:
        folder: with ``adapter_config.json``.
        base: the model, of which ``config.json`` is looked at; None is the one that the adapter names, if it is here.

    Raises:
        OSError: a file is missing, or cannot be read.
        ValueError: a damaged file, a name that is not known, factors that lack the other one, or shapes and ranks that
            do not fit; the message names file and key.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: expected an adapter's {CONFIG}, got no such file")
    config = PeftConfig(folder / CONFIG, read_json(folder / CONFIG))
    file = next((folder / name for name in (TENSORS, PICKLED) if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{folder}: expected {TENSORS} (or {PICKLED}), got neither")
    return updates_of(open_files(file).tensors, config, str(file), model_type_of(config.said, base))


def updates_of(tensors: Mapping[str, Stored], config: PeftConfig, where: str, model_type: str | None) -> AdapterFile:
    """The updates that an adapter's tensors are; see :func:`read_adapter`."""
    pairs = _pairs(tensors, where)
    linear: dict[str, Update] = {}
    wrapped: dict[str, dict[int, tuple[Stored, Stored]]] = {}
    single: dict[str, dict[str, dict[int, Update]]] = {}
    experts: dict[str, dict[str, Update]] = {}
    for path, (a, b) in pairs.items():
        if match := _STACKED.fullmatch(path):
            wrapped.setdefault(match["module"], {})[match["nest"].count(".")] = (a, b)
        elif (match := _ONE.fullmatch(path)) and match["name"] in HALF_OF_LEAF:
            update = _checked(path, a, b, 2, config, where)
            single.setdefault(match["module"], {}).setdefault(HALF_OF_LEAF[match["name"]], {})[int(match["e"])] = update
        elif match := _WHOLE.fullmatch(path):
            experts.setdefault(match["module"], {})[match["name"]] = _checked(path, a, b, 3, config, where)
        else:
            linear[path] = _checked(path, a, b, 2, config, where)
    for module, of_depth in wrapped.items():
        _add(experts, module, _of_wrappers(module, of_depth, config, where, model_type), where)
    for module, of_kind in single.items():
        _add(experts, module, _of_single(module, of_kind, where), where)
    return AdapterFile(linear, experts, config.said, where, model_type, config.dropout)


def _pairs(tensors: Mapping[str, Stored], where: str) -> dict[str, tuple[Stored, Stored]]:
    sides: dict[str, dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise ValueError(f"{where}: {name}: expected a name that ends with lora_A.weight or lora_B.weight")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{where}: {name}: expected a factor of floating-point numbers, got {tensor.dtype}")
        sides.setdefault(match["path"].removeprefix(PREFIX), {})[match["side"]] = tensor
    for path, found in sides.items():
        if missing := [side for side in "AB" if side not in found]:
            raise ValueError(f"{where}: {path}: expected both factors, got no lora_{missing[0]}.weight")
    if not sides:
        raise ValueError(f"{where}: expected factors of an adapter, got no tensors")
    return {path: (found["A"], found["B"]) for path, found in sides.items()}


def _checked(path: str, a: Stored, b: Stored, dims: int, config: PeftConfig, where: str) -> Update:
    """An update whose factors are already as they are kept."""
    fits = len(a.shape) == len(b.shape) == dims and a.shape[-2] == b.shape[-1]
    if fits and dims == 3:
        fits = a.shape[0] == b.shape[0] or 1 in (a.shape[0], b.shape[0])
    if not fits:
        expected = "(r, in) and (out, r)" if dims == 2 else "(E, r, in) and (E, out, r)"
        raise ValueError(f"{where}: {path}: expected lora_A and lora_B {expected}, got {a.shape} and {b.shape}")
    target = f"{path}.weight" if config.names_parameter(f"{path}.weight") else path
    _check_rank(target, a.shape[-2], config, where)
    return Update(a, b, config.scale(target))


def _check_rank(target: str, rank: int, config: PeftConfig, where: str) -> None:
    if rank != config.rank(target):
        raise ValueError(
            f"{where}: {target}: expected rank {config.rank(target)}, as {config.path.name} says, got factors of rank "
            f"{rank}"
        )


def _of_wrappers(
    module: str,
    of_depth: dict[int, tuple[Stored, Stored]],
    config: PeftConfig,
    where: str,
    model_type: str | None,
) -> dict[str, Update]:
    """The updates of a module's parameters; the outermost wrapper, of depth 0, is the last parameter's."""
    names = _parameters(module, of_depth, config, where)
    factors = {}
    for depth, name in enumerate(reversed(names)):
        if depth not in of_depth:
            raise ValueError(
                f"{where}: {module}{'.base_layer' * depth}: expected the factors of {name}, one of "
                f"{len(names)} target_parameters of {module}, got none"
            )
        a, b = of_depth[depth]
        rank = config.rank(f"{module}.{name}")
        if not (len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] and a.shape[0] % rank == 0):
            raise ValueError(
                f"{where}: {module}{'.base_layer' * depth}: expected lora_A (E r, in) and lora_B (out, r E) of r = "
                f"{rank}, as {config.path.name} says of {name}, got {a.shape} and {b.shape}"
            )
        factors[name] = (a, b, rank)
    counts = {name: a.shape[0] // rank for name, (a, _, rank) in factors.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{where}: {module}: expected adapters of as many experts, got {counts}")
    shapes = {name: (b.shape[0], a.shape[1]) for name, (a, b, _) in factors.items()}
    turned = _turned(module, shapes, config, where, model_type)
    return {
        name: Update(*unwrapped(*factors[name], turned), config.scale(f"{module}.{name}"))
        for name in PROJECTIONS
        if name in factors
    }


def unwrapped(a: Stored, b: Stored, rank: int, turned: bool) -> tuple[Stored, Stored]:
    """A wrapper's ``A (E r, x)`` and ``B (y, r E)`` as factors ``(E, r, in)`` and ``(E, out, r)``."""
    experts = a.shape[0] // rank
    first = reshaped(a, (experts, rank, a.shape[1]))
    second = mapped([reshaped(b, (b.shape[0], rank, experts))], lambda t: t[0].permute(2, 0, 1))  # (E, y, r)
    if not turned:
        return first, second
    return mapped([second], lambda t: t[0].mT, by_rows=True), mapped([first], lambda t: t[0].mT, by_rows=True)


def _parameters(
    module: str, of_depth: Mapping[int, tuple[Stored, Stored]], config: PeftConfig, where: str
) -> list[str]:
    """Which of a module's parameters are wrapped, in the module's order."""
    given = config.target_parameters
    targets = [
        name
        for name in (*PROJECTIONS, "gate_up_proj_bias", "down_proj_bias")
        if config.names_parameter(f"{module}.{name}")
    ]
    if bias := [name for name in targets if name.endswith("bias")]:
        raise ValueError(f"{config.path}: target_parameters: expected projections of experts, got {bias[0]}")
    if not given and len(of_depth) == 2:
        down_a, up_b = of_depth[0][0], of_depth[1][1]
        targets = ["up_proj" if up_b.shape[0] == down_a.shape[1] else "gate_up_proj", "down_proj"]
    if len(targets) != len(of_depth):
        raise ValueError(
            f"{where}: {module}: expected a wrapper for each of its target_parameters in {config.path.name}, "
            f"{targets or 'none'}, got {len(of_depth)}"
        )
    return targets


def _turned(
    module: str, shapes: Mapping[str, tuple[int, int]], config: PeftConfig, where: str, model_type: str | None
) -> bool:
    """Whether A and B are those of the transposed matrices; ``shapes`` are (out, in) if they are not."""
    down = shapes.get("down_proj")
    up, halves = (shapes["gate_up_proj"], 2) if "gate_up_proj" in shapes else (shapes.get("up_proj"), 1)
    if up is not None and down is not None:
        plain = up[1] == down[0] and up[0] == halves * down[1]
        turned = up[0] == down[1] and up[1] == halves * down[0]
        if plain != turned:
            return turned
        if not plain:
            raise ValueError(
                f"{where}: {module}: expected factors of projections {'(E, 2 F, H)' if halves == 2 else '(E, F, H)'} "
                f"and (E, H, F), got {up} and {down}"
            )
    if config.version is not None and config.version >= PARAMETERS_AS_STORED_SINCE and model_type not in UNMARKED:
        return False
    if config.version is None or model_type is None:
        missing = "peft_version" if config.version is None else "base_model_name_or_path"
        raise ValueError(
            f"{config.path}: {missing}: expected it to tell which factor of {module} is for inputs, as sizes do not, "
            f"got {config.said.get(missing)!r}{'' if config.version is None else ', which is not here: give the base'}"
        )
    return factors_turned(model_type, config.version)


def _of_single(module: str, of_kind: Mapping[str, Mapping[int, Update]], where: str) -> dict[str, Update]:
    """Experts' own updates, stacked."""
    count = 1 + max(e for updates in of_kind.values() for e in updates)
    if count > _MOST_EXPERTS:
        raise ValueError(f"{where}: {module}: expected at most {_MOST_EXPERTS} experts, got one of number {count - 1}")
    whole: dict[str, Update] = {}
    for kind, updates in of_kind.items():
        if missing := [e for e in range(count) if e not in updates]:
            raise ValueError(
                f"{where}: {module}: expected {kind} projections of experts 0 to {count - 1}, got none of expert "
                f"{missing[0]}"
            )
        ordered = [updates[e] for e in range(count)]
        rank, scale = max(each.rank for each in ordered), ordered[0].scale
        ordered = [each.padded(rank).with_scale(scale) for each in ordered]
        try:
            whole[kind] = Update(stacked([each.a for each in ordered]), stacked([each.b for each in ordered]), scale)
        except ValueError as error:
            raise ValueError(f"{where}: {module}: {kind}: expected experts of one shape: {error}") from None
    found: dict[str, Update] = {}
    if "gate" in whole:
        found["gate_up_proj"] = joined(whole["gate"], whole.get("up"), f"{where}: {module}")
    elif "up" in whole:  # of experts without a gate, or of one half: the model's to know
        found["up_proj"] = whole["up"]
    if "down" in whole:
        found["down_proj"] = whole["down"]
    return found


def _add(experts: dict[str, dict[str, Update]], module: str, updates: Mapping[str, Update], where: str) -> None:
    """Put a module's updates beside those that are there.

    Raises:
        ValueError: a projection twice, or of another number of experts.
    """
    there = experts.setdefault(module, {})
    for name, update in updates.items():
        if name in there:
            raise ValueError(f"{where}: {module}.{name}: expected one adapter, got it in two layouts")
        there[name] = update
    counts = {name: each.num_experts for name, each in there.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{where}: {module}: expected adapters of as many experts, got {counts}")
