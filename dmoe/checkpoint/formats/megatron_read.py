"""A Megatron-DeepSpeed checkpoint of a GPT, whatever ranks wrote it, as one model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmoe.checkpoint.formats.gpt_model import gpt_model
from dmoe.checkpoint.formats.gpt_names import (
    COEFFICIENT,
    DENSE,
    EXPERTS,
    GATE,
    RESIDUAL,
    Kind,
    Part,
    Sizes,
    all_parts,
    dmoe_rows,
)
from dmoe.checkpoint.formats.megatron_args import activation_of, as_text, check_sizes, whole_number
from dmoe.checkpoint.formats.megatron_files import EXPERT, Files, find_experts, find_files, require
from dmoe.checkpoint.formats.megatron_state import EMBEDDINGS, State, read_expert, read_state
from dmoe.checkpoint.model import Model
from dmoe.checkpoint.stored import Stored, concatenated, mapped, same, stacked

_UP = re.compile(rf"layers\.\d+\.{re.escape(DENSE)}dense_h_to_4h\.weight")
_Experts = dict[int, list[dict[str, Stored]]]  # by layer, then expert


def read_checkpoint(source: Path, layout: str) -> Model:
    """The model in a folder; ``layout`` is what ``origin`` calls it.

    Raises:
        OSError: a file is missing, or cannot be read.
        ValueError: files that are damaged, or do not belong together.
    """
    files = find_files(source)
    require(files, files.tp, files.pp)
    states = [[read_state(files.dense(tp, pp)) for tp in range(files.tp)] for pp in range(files.pp)]
    first = states[0][0]
    said = vars(first.args)
    _check_ranks(files, said, str(first.path))
    gates, residual = _moe_layers(states)
    ranks = find_experts(files.folder, list(gates.values()), files.tp)
    experts, prefix = _read_experts(files, list(gates), ranks)
    sizes = _sizes(states, gates, residual, experts)
    check_sizes(said, sizes, str(first.path))
    tensors, residual_cut = _tensors(states, sizes, experts)
    origin: dict[str, Any] = {
        "layout": layout,
        "tag": files.tag,
        "pattern": files.pattern,
        "tp": files.tp,
        "stages": [stage[0].layers for stage in states],
        "key": first.key,
        "attention": first.attention,
        "moe": next((state.moe for stage in states for state in stage if state.moe), None),
        "expert_prefix": prefix,
        "expert_ranks": ranks,
        "residual_cut": residual_cut,
        "args": as_text(first.args),
    }
    beside = {"states": {f"{tp}/{pp}": state.rest for pp, stage in enumerate(states) for tp, state in enumerate(stage)}}
    eps = said.get("layernorm_epsilon", 1e-5)
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise ValueError(f"{first.path}: args.layernorm_epsilon: expected a number, got {eps!r:.80}")
    return gpt_model(
        sizes,
        tensors,
        norm_eps=float(eps),
        activation=activation_of(said),
        top_k=whole_number(said, "topk", str(first.path)) or 1,
        origin=origin,
        beside=beside,
    )


def _check_ranks(files: Files, said: dict[str, Any], where: str) -> None:
    """As many files as ranks were training."""
    told = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size"}
    expected = {short: whole_number(said, name, where) or getattr(files, short) for short, name in told.items()}
    require(files, expected["tp"], 1)
    require(files, expected["tp"], expected["pp"] if "{pp" in files.pattern else 1)
    for short, name in told.items():
        if (got := getattr(files, short)) != expected[short]:
            raise ValueError(f"{where}: args.{name}: expected {got}, as many as there are files, got {expected[short]}")


def _moe_layers(states: list[list[State]]) -> tuple[dict[int, int], frozenset[int]]:
    """E of every layer with a gate, and which have a dense block, too; numbers are those of the whole model."""
    gates, residual, before = {}, set(), 0
    for stage in states:
        first = stage[0]
        for layer in range(first.layers):
            gate = first.tensors.get(f"layers.{layer}.{GATE}")
            if gate is None:
                if f"layers.{layer}.{DENSE}dense_h_to_4h.weight" not in first.tensors:
                    raise ValueError(
                        f"{first.path}: layers.{layer}: expected {first.shown(GATE)} or mlp.dense_h_to_4h.weight, "
                        "got neither"
                    )
                continue
            if len(gate.shape) != 2:
                raise ValueError(f"{first.path}: layers.{layer}: expected a gate of (E, H), got {gate.shape}")
            gates[before + layer] = gate.shape[0]
            if f"layers.{layer}.{COEFFICIENT}weight" in first.tensors:
                residual.add(before + layer)
        before += first.layers
    return gates, frozenset(residual)


def _read_experts(files: Files, layers: Sequence[int], ranks: list[list[list[int]]]) -> tuple[_Experts, str]:
    found: _Experts = {}
    prefix = ""
    for ordinal, (layer, experts) in enumerate(zip(layers, ranks, strict=True)):
        found[layer] = []
        for expert, holders in enumerate(experts):
            paths = [files.folder / EXPERT.format(ordinal=ordinal, expert=expert, tp=tp) for tp in holders]
            prefix, tensors = read_expert(paths[0], layer, expert)
            for path in paths[1:]:
                for name, tensor in read_expert(path, layer, expert)[1].items():
                    _check_same(tensors[name], tensor, name.removeprefix(EXPERTS))
            found[layer].append(tensors)
    return found, prefix


def _sizes(states: list[list[State]], gates: dict[int, int], residual: frozenset[int], experts: _Experts) -> Sizes:
    first, tp = states[0][0], len(states[0])
    words, positions = first.take("wte"), first.take("wpe")
    for name, tensor in (("wte", words), ("wpe", positions)):
        if len(tensor.shape) != 2 or tensor.shape[1] != words.shape[-1] or 0 in tensor.shape:
            raise ValueError(
                f"{first.path}: {EMBEDDINGS[name]}: expected two dimensions, rows of H, got {tensor.shape}"
            )
    heads = whole_number(vars(first.args), "num_attention_heads", str(first.path))
    hidden = words.shape[1]
    if heads is None or heads < 1 or hidden % heads:
        raise ValueError(f"{first.path}: args.num_attention_heads: expected a divisor of H = {hidden}, got {heads}")
    stages = [stage[0].tensors for stage in states]
    dense = next((t for tensors in stages for key, t in tensors.items() if _UP.fullmatch(key)), None)
    if dense is None:
        if not experts:
            raise ValueError(f"{first.path}: expected layers, got none")
        dense, tp = next(iter(experts.values()))[0][EXPERTS + "dense_h_to_4h.weight"], 1
    if not dense.shape:
        raise ValueError(f"{dense.where}: dense_h_to_4h.weight: expected (F, H), got a single number")
    layers = sum(stage[0].layers for stage in states)
    vocabulary = words.shape[0] * len(states[0])
    return Sizes(vocabulary, hidden, layers, heads, dense.shape[0] * tp, positions.shape[0], gates, residual)


def _tensors(states: list[list[State]], sizes: Sizes, experts: _Experts) -> tuple[dict[str, Stored], bool]:
    """All tensors under dmoe's names, and whether the dense blocks of PR-MoE's layers are cut."""
    begins = [0]
    for stage in states:
        begins.append(begins[-1] + stage[0].layers)
    found: dict[str, Stored] = {}
    used: list[set[str]] = [set() for _ in states]
    residual_cut = False
    for ours, theirs, part in all_parts(sizes):
        if part.expert:
            layer = int(ours.split(".")[1])
            found[ours] = _stacked(experts[layer], theirs.split(".", 2)[2], part)
            continue
        at, name = _place(theirs, begins)
        used[at].add(name)
        parts = [state.take(name) for state in states[at]]
        if part.theirs.startswith(RESIDUAL) and part.kind is not Kind.WHOLE:
            if parts[0].shape == part.shape:  # DeepSpeed cuts it no more than the experts, Megatron does
                part = Part(part.ours, part.theirs, part.shape)
            else:
                residual_cut |= len(parts) > 1
        found[ours] = _merged(parts, part, states[at][0].shown(name), sizes.heads)
    for stage, names in zip(states, used, strict=True):
        for state in stage:
            if other := sorted(state.tensors.keys() - names):
                raise ValueError(
                    f"{state.path}: expected a GPT's tensors, got {state.shown(other[0])}, which such a model has not"
                )
            if state.head is not None:
                words = states[0][stage.index(state)].take("wte")
                _check_same(words, state.head, "word_embeddings_for_head")
    return found, residual_cut


def _place(theirs: str, begins: list[int]) -> tuple[int, str]:
    """The stage that has a tensor, and its name there."""
    if theirs in EMBEDDINGS:
        return 0, theirs
    if not theirs.startswith("layers."):
        return len(begins) - 2, theirs
    _, number, rest = theirs.split(".", 2)
    stage = max(n for n, begin in enumerate(begins[:-1]) if begin <= int(number))
    return stage, f"layers.{int(number) - begins[stage]}.{rest}"


def _merged(parts: list[Stored], part: Part, name: str, heads: int) -> Stored:
    """The ranks' parts of a tensor together."""
    shape = list(part.shape)
    dim = 1 if part.kind is Kind.COLUMNS else 0
    if part.kind not in (Kind.WHOLE, Kind.GATE):
        units = heads if part.kind is Kind.HEADS else shape[dim]
        if units % len(parts):
            raise ValueError(f"{parts[0].where}: {name}: expected {units} to be cut by {len(parts)} ranks evenly")
        shape[dim] //= len(parts)
    for tensor in parts:
        _check_shape(tensor, tuple(shape), name)
    if part.kind in (Kind.WHOLE, Kind.GATE):
        for tensor in parts[1:]:
            _check_same(parts[0], tensor, name)
        return parts[0]
    whole = concatenated(parts, dim)
    return mapped([whole], lambda tensors: dmoe_rows(tensors[0], heads)) if part.kind is Kind.HEADS else whole


def _stacked(experts: list[dict[str, Stored]], name: str, part: Part) -> Stored:
    tensors = [expert[name] for expert in experts]
    for tensor in tensors:
        _check_shape(tensor, part.shape[1:], name.removeprefix(EXPERTS))
    return stacked(tensors)


def _check_shape(tensor: Stored, shape: tuple[int, ...], name: str) -> None:
    if tensor.shape != shape or not tensor.dtype.is_floating_point:
        raise ValueError(
            f"{tensor.where}: {name}: expected floating-point numbers of {shape}, as args and the other tensors have "
            f"it, got {tensor.dtype} of {tensor.shape}"
        )


def _check_same(first: Stored, other: Stored, name: str) -> None:
    if not same(first, other):
        raise ValueError(f"{other.where}: {name}: expected the same numbers as in {first.where}, got others")
