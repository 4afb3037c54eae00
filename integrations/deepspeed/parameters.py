"""Groups of parameters for an optimizer that DeepSpeed is to cut into parts: experts apart from everything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from torch import nn


def param_groups(parameters: nn.Module | Iterable[Any]) -> list[dict[str, Any]]:
    """The parameters of a prepared model as an optimizer under DeepSpeed has to get them.

    Args:
        parameters: the model, of which this takes what is trained; or, as an optimizer takes them, parameters or
            groups (dicts with ``params``), whose options each part of a group keeps.

    Returns:
        The groups without their experts, then experts by the ranks that share them (``moe``, ``name``).

    Raises:
        ValueError: experts of which :func:`prepare` has not been told.
    """
    if isinstance(parameters, nn.Module):
        parameters = [parameter for parameter in parameters.parameters() if parameter.requires_grad]
    given = list(parameters)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    if any("moe" in group for group in groups):
        return groups
    named = [{"name": f"group {n}", **group, "params": list(group["params"])} for n, group in enumerate(groups)]
    for group in named:
        if any(is_moe_param(each) and not hasattr(each, "group_name") for each in group["params"]):
            raise ValueError(
                "param_groups: parameters: expected those of a model that prepare() was called with, got experts that "
                "DeepSpeed has no group for"
            )
    return [group for group in split_params_into_different_moe_groups_for_optimizer(named) if group["params"]]
