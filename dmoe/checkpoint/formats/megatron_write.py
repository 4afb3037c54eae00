"""A GPT as files of Megatron-DeepSpeed's training ranks: those that it came from, or others."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmoe.checkpoint.formats.base import Options, copy_files
from dmoe.checkpoint.formats.gpt_model import sizes_of
from dmoe.checkpoint.formats.gpt_names import (
    EXPERTS,
    RESIDUAL,
    Kind,
    Part,
    Sizes,
    embedding_parts,
    last_parts,
    layer_parts,
    megatron_rows,
)
from dmoe.checkpoint.formats.megatron_args import default_args, from_text
from dmoe.checkpoint.formats.megatron_files import EXPERT, LATEST, PATTERNS
from dmoe.checkpoint.formats.megatron_state import ATTENTIONS, EMBEDDINGS, HEAD, KEYS, MOES, VERSION
from dmoe.checkpoint.formats.rank_contents import OPTIMIZERS
from dmoe.checkpoint.model import Model
from dmoe.checkpoint.new_folder import is_name, new_folder
from dmoe.checkpoint.stored import Stored, cast, cut, mapped, taken
from dmoe.checkpoint.torch_writer import write_lazily


@dataclass(frozen=True)
class _Plan:
    """What the files are called and how the model is cut: fields of ``origin``, see ``megatron_read``."""

    sizes: Sizes
    tp: int
    stages: tuple[int, ...]
    pattern: str
    tag: str | None
    key: str
    attention: str
    moe: str
    expert_prefix: str
    expert_ranks: list[list[list[int]]]
    residual_cut: bool


def write_checkpoint(model: Model, target: Path, options: Options, layout: str) -> list[Path]:
    """Write a folder, whole or not at all.

    Args:
        model: a GPT. Where it came from this layout, its files are as they were, unless ``options`` says otherwise.
        target: the folder.
        options: ``ranks`` (tensor-parallel), ``dtype`` (not of the gates), ``vocab``, ``merges``, ``overwrite``.
        layout: what ``origin`` calls this one.

    Returns:
        The folder.

    Raises:
        OSError: it cannot be written, or is there already.
        ValueError: a model that this layout cannot hold, or ranks that cannot share it.
    """
    sizes = sizes_of(model, layout)
    own = model.origin if model.origin.get("layout") == layout else {}
    plan = _plan(sizes, own, options.ranks, layout)
    tensors = {name: _dtype(name, tensor, options, bool(own)) for name, tensor in model.tensors.items()}
    marker = LATEST if plan.tag else plan.pattern.format(tp=0, pp=0)
    with new_folder(target, overwrite=options.overwrite, marker=marker) as folder:
        copy_files(model, options, folder)
        inner = folder
        if plan.tag:
            (folder / LATEST).write_text(plan.tag)
            inner = folder / plan.tag
        begin = 0
        for stage, count in enumerate(plan.stages):
            layers = range(begin, begin + count)
            begin += count
            for rank in range(plan.tp):
                path = inner / plan.pattern.format(tp=rank, pp=stage)
                path.parent.mkdir(parents=True, exist_ok=True)
                content = _state(model, plan, options, tensors, rank, stage, layers)
                with open(path, "xb") as file:
                    write_lazily(file, content, options.progress)
        for ordinal, layer in enumerate(sizes.experts):
            for expert, ranks in enumerate(plan.expert_ranks[ordinal]):
                content = _expert(plan, tensors, layer, expert)
                for rank in ranks:
                    path = inner / EXPERT.format(ordinal=ordinal, expert=expert, tp=rank)
                    with open(path, "xb") as file:
                        write_lazily(file, content, options.progress)
    return [target]


def _plan(sizes: Sizes, own: Mapping[str, Any], ranks: int | None, layout: str) -> _Plan:
    tp = own.get("tp", 1) if ranks is None else ranks
    for name, count in (("heads", sizes.heads), ("F", sizes.ffn), ("V", sizes.vocabulary)):
        if tp < 1 or count % tp:
            raise ValueError(f"{layout}: ranks: expected a divisor of {name} = {count}, got {tp}")
    stages = tuple(own.get("stages", (sizes.layers,)))
    pattern = own.get("pattern", next(iter(PATTERNS)))
    if sum(stages) != sizes.layers or pattern not in PATTERNS:
        raise ValueError(f"{layout}: origin: expected stages of {sizes.layers} layers together, got {stages}")
    if own.get("tag") is not None and not is_name(own["tag"]):
        raise ValueError(f"{layout}: origin: expected the name of a folder as its tag, got {own['tag']!r:.80}")
    megatron = PATTERNS[pattern]
    held = own.get("expert_ranks") or [[[0]] * count for count in sizes.experts.values()]
    if [len(experts) for experts in held] != list(sizes.experts.values()):
        held = [[[0]] * count for count in sizes.experts.values()]
    if tp < own.get("tp", tp):
        held = [[sorted({rank % tp for rank in each}) for each in experts] for experts in held]
    moe = own.get("moe") or MOES[megatron]
    default_prefix = ("model.module." if megatron else "") + "language_model.encoder."
    return _Plan(
        sizes,
        tp,
        stages,
        pattern,
        own.get("tag"),
        own.get("key", KEYS[0]),
        own.get("attention") or ATTENTIONS[0],
        moe,
        own.get("expert_prefix", default_prefix) if sizes.experts else "",
        held,
        own.get("residual_cut", False),
    )


def _dtype(name: str, tensor: Stored, options: Options, own: bool) -> Stored:
    """The gates are float32 whatever the rest is, as DeepSpeed has them."""
    if name.endswith("router.weight"):
        return tensor if own else cast(tensor, torch.float32)
    return tensor if options.dtype is None else cast(tensor, options.dtype)


def _state(
    model: Model,
    plan: _Plan,
    options: Options,
    tensors: Mapping[str, Stored],
    rank: int,
    stage: int,
    layers: range,
) -> dict[str, Any]:
    """What is in the file of a rank."""

    def own(name: str, part: Part) -> Stored:
        return _cut(tensors[name], part, rank, plan)

    first, last = stage == 0, stage == len(plan.stages) - 1
    encoder: OrderedDict[str, Stored] = OrderedDict()
    for local, layer in enumerate(layers):
        for part in layer_parts(plan.sizes, layer):
            if not part.expert:
                encoder[f"layers.{local}.{_theirs(part.theirs, plan)}"] = own(f"blocks.{layer}.{part.ours}", part)
    if last:
        encoder.update((part.theirs, own(part.ours, part)) for part in last_parts(plan.sizes))
    embedding = {part.theirs: own(part.ours, part) for part in embedding_parts(plan.sizes)}
    language_model: dict[str, Any] = {"encoder": encoder}
    if first:
        named = {EMBEDDINGS[name]: OrderedDict(weight=tensor) for name, tensor in embedding.items()}
        language_model = {"embedding": named, "encoder": encoder}
    written: dict[str, Any] = {"language_model": language_model}
    if last and not first:
        written[HEAD] = OrderedDict(weight=embedding["wte"])
    return _around(model, plan, options, rank, stage) | {plan.key: written}


def _around(model: Model, plan: _Plan, options: Options, rank: int, stage: int) -> dict[str, Any]:
    """What is beside the model, in order."""
    before = model.beside.get("states") if model.origin.get("pattern") == plan.pattern else None
    if before:
        rest = before.get(f"{rank}/{stage}") or before[f"0/{stage}"]
        args = rest["args"]
        if plan.tp != model.origin.get("tp"):  # cut otherwise, the optimizer's states would fit no rank
            rest = {name: None if name in OPTIMIZERS else value for name, value in rest.items()}
    else:
        gpt = model.gpt or {}
        top_k = next((config.top_k for config in model.layers.values() if config is not None), 1)
        texts = model.origin.get("args") or default_args(plan.sizes, gpt["norm_eps"], top_k)
        args = from_text(texts)
        rest = {plan.key: None, "args": args, "checkpoint_version": VERSION}
    said = dict(vars(args))
    said |= {"tensor_model_parallel_size": plan.tp, "pipeline_model_parallel_size": len(plan.stages)}
    if options.dtype is not None:
        said |= {"params_dtype": options.dtype, "fp16": options.dtype == torch.float16}
        said["bf16"] = options.dtype == torch.bfloat16
    changed = {"args": Namespace(**said)}
    if "mp_world_size" in rest:
        changed["mp_world_size"] = plan.tp  # type: ignore[assignment]
    return {**rest, **changed}


def _theirs(name: str, plan: _Plan) -> str:
    if name.startswith(ATTENTIONS[1]):
        return plan.attention + name.removeprefix(ATTENTIONS[1])
    return name.replace("mlp.moe.", f"mlp.{plan.moe}.", 1)


def _cut(tensor: Stored, part: Part, rank: int, plan: _Plan) -> Stored:
    """A rank's part."""
    whole = part.theirs.startswith(RESIDUAL) and not plan.residual_cut
    if plan.tp == 1 and part.kind is not Kind.HEADS:
        return tensor
    if part.kind in (Kind.WHOLE, Kind.GATE) or whole:
        return tensor
    if part.kind is Kind.HEADS:
        heads = plan.sizes.heads
        tensor = mapped([tensor], lambda tensors: megatron_rows(tensors[0], heads))
    dim = 1 if part.kind is Kind.COLUMNS else 0
    each = tensor.shape[dim] // plan.tp
    return cut(tensor, dim, rank * each, (rank + 1) * each)


def _expert(plan: _Plan, tensors: Mapping[str, Stored], layer: int, expert: int) -> OrderedDict[str, Stored]:
    """What is in the file of an expert."""
    inside = f"layers.{layer}.mlp.{plan.moe}.experts.{plan.moe.replace('moe', 'experts')}.{expert}."
    return OrderedDict(
        (
            plan.expert_prefix + inside + part.theirs.removeprefix(EXPERTS),
            taken(tensors[f"blocks.{layer}.{part.ours}"], expert),
        )
        for part in layer_parts(plan.sizes, layer)
        if part.expert
    )
