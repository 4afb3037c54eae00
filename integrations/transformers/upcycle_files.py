"""Dense language models become mixtures of experts, from files to files that plain Transformers loads.

A layer is read, copied into experts and written before the next one is read: beside one layer no more than one file's
tensors are in memory (:class:`dmoe.checkpoint.hub_writer.ShardWriter`). :mod:`.upcycle_families` says which family a
model becomes, :mod:`dmoe.dense_copies` what experts are made of.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmoe.checkpoint.hub_beside import copy_beside
from dmoe.checkpoint.hub_folder import local_folder
from dmoe.checkpoint.hub_writer import MAX_SHARD_BYTES, ShardWriter
from dmoe.checkpoint.new_folder import new_folder
from dmoe.dense_copies import generator_of, redraw, router_rows, segments
from dmoe.dense_copies import perturb as perturbed
from dmoe.integrations.transformers.dense_model import DenseModel
from dmoe.integrations.transformers.upcycle_families import MoeFamily, Recipe, choose_family, moe_fields


@dataclass(frozen=True)
class Upcycled:
    """What :func:`upcycle` made.

    Attributes:
        folder: where it is.
        source: the dense model's folder.
        model_type: the family that it became.
        num_experts, top_k: of each mixture layer, segments counted.
        dtype: that was asked for; None left the dense model's.
        exact: whether it computes what the dense model does, but for rounding.
        rounding: how far its logits may be from the dense model's, relative to the largest of these, in float32.
    """

    folder: Path
    source: Path
    model_type: str
    num_experts: int
    top_k: int
    dtype: torch.dtype | None
    exact: bool
    rounding: float


def upcycle(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    num_experts: int | None = None,
    top_k: int = 2,
    granularity: int = 1,
    every: int = 1,
    perturb: float = 0.0,
    reinit: float = 0.0,
    router_std: float = 0.02,
    experts: Sequence[str | os.PathLike[str]] = (),
    dtype: torch.dtype | None = None,
    to: str | None = None,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[Iterable[int], int], Iterable[int]] = lambda layers, total: layers,
) -> Upcycled:
    """Write a mixture of experts whose experts are a dense model's FFNs (Komatsuzaki et al. 2023, "Sparse Upcycling").

    With neither ``perturb``, ``reinit`` nor ``experts`` the new model computes what the dense one does: gate weights
    sum to 1, so copies under any router are the FFN. ``dst`` is there whole, or not at all.

    Args:
        src: a model's folder in Hugging Face's format, of one or several safetensors files, or the id of one that is
            in the hub's cache: Qwen2, Qwen3, Llama, Mistral, OLMo2.
        dst: the folder to write.
        num_experts: E, copies of each FFN; None is as many as ``experts``, or 8.
        top_k: K of them that each token takes.
        granularity: G, into how many experts each copy is cut along its width: E G experts of width F / G, of which
            K G are chosen, in groups that begin together (He et al. 2024, arXiv 2410.07524). A divisor of F.
        every: only each N-th layer becomes a mixture; Mixtral and FlexOlmo have experts in every layer.
        perturb: Gaussian noise is added to every expert, of so many standard deviations of the weight.
        reinit: share of each expert's F columns that is drawn anew (Nakamura et al. 2025, "Drop-Upcycling").
        router_std: standard deviation of the router's normal weights, which begin at random in any case.
        experts: dense models with FFNs of the same shape, whose FFNs the experts are, in turn; all else is ``src``'s.
        dtype: of what is written; None leaves it as it is.
        to: ``mixtral``, ``qwen2_moe``, ``qwen3_moe`` or ``flex_olmo``; None is the one that preserves the model.
        seed: of everything random; layers and experts have random numbers of their own.
        max_shard_bytes: size of a file.
        overwrite: whether a model in ``dst`` is replaced.
        progress: wraps the layers and their number, as tqdm does.

    Raises:
        ValueError: options that contradict each other, or a model that cannot be preserved; the field is named.
        FileExistsError: ``dst`` exists.
        OSError: ``src`` is missing, the disk is full, and the like.
    """
    num_experts = (len(experts) or 8) if num_experts is None else num_experts
    _check_options(num_experts, top_k, granularity, every, perturb, reinit, router_std, len(experts))
    recipe = Recipe(num_experts, top_k, granularity, every)
    with ExitStack() as stack:
        dense = stack.enter_context(DenseModel(local_folder(src)))
        others = [stack.enter_context(DenseModel(local_folder(model))) for model in experts]
        for other in others:
            dense.check_ffns_of(other)
        if not any(map(recipe.is_moe, range(dense.num_layers))):
            raise ValueError(f"upcycle: every: expected at most the {dense.num_layers} layers of {src}, got {every}")
        if dense.config.intermediate_size % granularity:
            raise ValueError(
                f"upcycle: granularity: expected a divisor of intermediate_size {dense.config.intermediate_size}, "
                f"got {granularity}"
            )
        family = choose_family(dense.traits, every, to)
        config = _moe_config(dense, family, recipe, dtype)
        dense.check_target(config, recipe)
        builder = _Experts(others or [dense], family, recipe, perturb, reinit, router_std, seed)
        with new_folder(dst, overwrite=overwrite) as folder:
            with ShardWriter(folder, max_shard_bytes) as writer:
                for name, tensor in _tensors(dense, builder, progress):
                    writer.add(name, tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor)
            config.save_pretrained(folder)
            copy_beside(dense.folder, folder)
    power_of_2 = granularity & (granularity - 1) == 0  # else G times a number is rounded
    return Upcycled(
        folder=Path(dst),
        source=dense.folder,
        model_type=family.model_type,
        num_experts=num_experts * granularity,
        top_k=top_k * granularity,
        dtype=dtype,
        exact=not (perturb or reinit or experts),
        rounding=1e-5 if power_of_2 else 1e-5 + 8 * torch.finfo(config.dtype or torch.float32).eps,
    )


@dataclass(frozen=True)
class _Experts:
    """The tensors of a mixture layer, an expert at a time."""

    sources: Sequence[DenseModel]
    family: MoeFamily
    recipe: Recipe
    perturb: float
    reinit: float
    router_std: float
    seed: int

    def of_layer(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """Names inside the layer, and tensors."""
        recipe, family = self.recipe, self.family
        for copy_number in range(recipe.num_experts):
            ups, down = self._ffn(layer, copy_number)
            for segment, (up_parts, down_part) in enumerate(segments(ups, down, recipe.granularity)):
                names = family.expert(copy_number * recipe.granularity + segment)
                yield from zip(names, (*up_parts, down_part), strict=True)
        hidden = down.shape[0]
        generator = generator_of(self.seed, "layer", layer, "router")
        rows = router_rows(recipe.num_experts, recipe.granularity, hidden, self.router_std, generator)
        yield family.router, rows.to(down.dtype)
        for name, shape in family.idle(hidden).items():
            yield name, torch.zeros(shape, dtype=down.dtype)

    def _ffn(self, layer: int, copy_number: int) -> tuple[list[Tensor], Tensor]:
        ups, down = self.sources[copy_number % len(self.sources)].ffn(layer)
        generator = generator_of(self.seed, "layer", layer, "expert", copy_number)
        if self.reinit:
            return redraw(ups, down, self.reinit, generator)
        if self.perturb:
            noisy = [perturbed(weight, self.perturb, generator) for weight in (*ups, down)]
            return noisy[:-1], noisy[-1]
        return ups, down


def _tensors(
    dense: DenseModel, builder: _Experts, progress: Callable[[Iterable[int], int], Iterable[int]]
) -> Iterator[tuple[str, Tensor]]:
    """All that is written, in the order of the layers."""
    for name in dense.outside_layers():
        yield name, dense.tensors.read(name)
    for layer in progress(range(dense.num_layers), dense.num_layers):
        is_moe = builder.recipe.is_moe(layer)
        for name in dense.of_layer(layer, with_ffn=not is_moe):
            yield name, dense.tensors.read(name)
        if is_moe:
            for name, tensor in builder.of_layer(layer):
                yield f"model.layers.{layer}.{name}", tensor


def _moe_config(dense: DenseModel, family: MoeFamily, recipe: Recipe, dtype: torch.dtype | None) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    fields = copy.deepcopy(moe_fields(family, dense.config, dense.traits, recipe))
    config = AutoConfig.for_model(family.model_type, **fields)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]]
    config.dtype = dtype or dense.dtype
    return config


def _check_options(
    num_experts: int,
    top_k: int,
    granularity: int,
    every: int,
    perturb: float,
    reinit: float,
    router_std: float,
    models: int,
) -> None:
    required: list[tuple[str, bool, str, object]] = [
        ("num_experts", num_experts >= 1, "at least 1", num_experts),
        ("top_k", 1 <= top_k <= num_experts, f"1 to num_experts, {num_experts}", top_k),
        ("granularity", granularity >= 1, "at least 1", granularity),
        ("every", every >= 1, "at least 1", every),
        ("perturb", perturb >= 0, "at least 0", perturb),
        ("reinit", 0 <= reinit <= 1, "a share from 0 to 1", reinit),
        ("reinit", not (perturb and reinit), "0 beside perturb, as only one of them is possible", reinit),
        (
            "router_std",
            router_std > 0,
            "above 0, as a router of zeros sends all tokens to one place",
            router_std,
        ),
        (
            "num_experts",
            not models or num_experts % models == 0,
            f"a multiple of the {models} models of experts",
            num_experts,
        ),
    ]
    for option, holds, expected, got in required:
        if not holds:
            raise ValueError(f"upcycle: {option}: expected {expected}, got {got}")
