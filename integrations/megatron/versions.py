"""What differs between the supported releases of megatron-core, and nothing else: every other file is free of versions.

============================  =================================  ==================================================
what                          0.16, 0.17                         0.18, 0.19
============================  =================================  ==================================================
a MoE layer in a spec         ``ModuleSpec(module=MoELayer)``    ``functools.partial(MoELayer, ...)``
what builds ``mlp``           passes ``config`` alone            passes ``pg_collection``, ``is_mtp_layer``, ``name``
a shared expert in a spec     0.16: ``ModuleSpec``               a callable (0.17 as well)
where losses are logged       ``save_to_aux_losses_tracker``     ``get_moe_metrics_tracker().record``
============================  =================================  ==================================================

From 0.17 on a layer that predicts further tokens logs its losses after those of the decoder. From 0.19 on a loss
under ``calculate_per_token_loss`` is multiplied by the ranks of tensor and context parallelism as well, and the z-loss
is logged as a mean over ranks.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

from torch import Tensor

OLDEST, NEWEST = (0, 16), (0, 19)
TRY = "DMOE_UNTRIED_MEGATRON"  # =1 in the environment: a newer release is not refused
INSTALL = "pip install 'megatron-core>=0.16,<0.20'"


def check_version() -> tuple[int, int]:
    """The installed release of megatron-core, as ``(0, 16)``.

    Raises:
        ImportError: none is installed, or one outside the supported range, but for a newer one under ``TRY``.
    """
    supported = f"dmoe.integrations.megatron: expected megatron-core {_text(OLDEST)} to {_text(NEWEST)}"
    try:
        from megatron.core import __version__
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != "megatron":
            raise
        raise ImportError(f"{supported}, found none; install it with: {INSTALL}") from missing
    version = release_of(__version__)
    newer, trying = version > NEWEST, os.environ.get(TRY) == "1"
    if newer and trying:
        warnings.warn(f"dmoe: megatron-core {__version__} has not been tried with this dmoe ({TRY}=1)", stacklevel=2)
    elif newer or version < OLDEST:
        way_out = f", or try this one as it is, with {TRY}=1 in the environment" if newer else ""
        raise ImportError(f"{supported}, found {__version__}; install a supported one with: {INSTALL}{way_out}")
    return version


def release_of(version: str) -> tuple[int, int]:
    """The first two numbers of a version: ``(0, 19)`` of ``0.19.2`` and of ``0.19.0rc1``."""
    numbers = version.split(".")
    return int(numbers[0]), int(numbers[1])


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


@functools.cache
def release() -> tuple[int, int]:
    """:func:`check_version`, asked once."""
    return check_version()


def moe_submodules(mlp: Any) -> Any | None:
    """The ``MoESubmodules`` of a layer spec's ``mlp`` if that is Megatron's own MoE layer, else None."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    module = mlp.func if isinstance(mlp, functools.partial) else getattr(mlp, "module", mlp)
    if not (isinstance(module, type) and issubclass(module, MoELayer)):
        return None
    return mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else getattr(mlp, "submodules", None)


def with_submodules(mlp: Any, submodules: Any) -> Any:
    """A copy of Megatron's own MoE layer in a spec, with other submodules."""
    if isinstance(mlp, functools.partial):
        return functools.partial(mlp.func, *mlp.args, **{**mlp.keywords, "submodules": submodules})
    from megatron.core.transformer.spec_utils import ModuleSpec

    return ModuleSpec(module=mlp.module, params=mlp.params, submodules=submodules, metainfo=mlp.metainfo)


def build_shared_expert(spec: Any, config: Any, pg_collection: Any) -> Any:
    """Megatron's shared expert from the part of a MoE layer's spec that names it."""
    arguments = {"config": config, "pg_collection": pg_collection, "gate": config.moe_shared_expert_gate}
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module

    return build_module(spec, **arguments) if isinstance(spec, ModuleSpec) else spec(**arguments)


def layer_in_logs(layer_number: int | None, num_layers: int, is_mtp_layer: bool) -> int | None:
    """Under which number, from 1, the losses of a layer are logged."""
    after_decoder = is_mtp_layer and release() >= (0, 17)
    return layer_number + num_layers if after_decoder and layer_number is not None else layer_number


def mtp_share(config: Any, is_mtp_layer: bool) -> float:
    """The part of a loss that one call of a layer stands for: below 1 where one such layer is called repeatedly."""
    repeated = is_mtp_layer and getattr(config, "mtp_use_repeated_layer", False) and config.mtp_num_layers
    return 1 / config.mtp_num_layers if repeated else 1.0


def tokens_in_loss(num_tokens: Any, tp_cp_ranks: int) -> Any:
    """What a loss is multiplied by under ``calculate_per_token_loss``, given the tokens of this rank."""
    return num_tokens * tp_cp_ranks if release() >= (0, 19) else num_tokens


def tokens_of_sequences(num_tokens: Any, num_sequences: int) -> Any:
    """The tokens that the loss over sequences counts on this rank: up to 0.18 those of one sequence."""
    return num_tokens if release() >= (0, 19) else num_tokens / num_sequences


def log_loss(
    name: str,
    loss: Tensor,
    layer_number: int | None,
    num_layers: int,
    *,
    summed_over: Any = None,
    averaged_over: Any = None,
    holds_data_ranks: bool = False,
) -> None:
    """Add a layer's loss, without its coefficient, to those that Megatron logs.

    Args:
        name: as ``load_balancing_loss``.
        loss: scalar.
        layer_number: from 1; None logs nothing.
        num_layers: of all layers that log.
        summed_over: the group over whose ranks the logged values are added.
        averaged_over: the group over whose ranks they are averaged; not looked at before 0.19.
        holds_data_ranks: whether ``summed_over`` holds the data-parallel ranks, which are averaged over otherwise.
    """
    if layer_number is None:
        return
    if release() >= (0, 18):
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        groups = {"reduce_group": summed_over, "needs_dp_avg": not holds_data_ranks}
        if release() >= (0, 19):
            groups["avg_group"] = averaged_over
        get_moe_metrics_tracker().record(name, loss, layer_number, num_layers, **groups)
    else:
        from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

        save_to_aux_losses_tracker(
            name, loss, layer_number, num_layers, reduce_group=summed_over, reduce_group_has_dp=holds_data_ranks
        )
