"""The same as the line on the command line, for configurations that are written in Python."""

from __future__ import annotations

from typing import Any

_OVERRIDES = "dmoe.integrations.torchtitan.overrides"


def use(config: Any, **options: Any) -> Any:
    """Let a ``Trainer.Config`` of torchtitan train its mixtures of experts with dmoe.

    Adds to ``config.override.imports``, which torchtitan applies when it builds the trainer: the experts of all layers,
    and the operations that selective activation checkpointing keeps, where the config has that.

    Args:
        config: any ``Trainer.Config``, whose model has ``MoE`` layers; it is changed.
        **options: fields of ``DmoeRoutedExperts.Config`` that torchtitan does not have, such as ``wire_dtype``.

    Returns:
        The config.

    Raises:
        TypeError: something that has no overrides.
        ValueError: an option that there is not, or a model without ``MoE`` layers.
    """
    from torchtitan.config.override import OverrideConfig
    from torchtitan.distributed.activation_checkpoint import SelectiveAC
    from torchtitan.models.common.moe import RoutedExperts

    from dmoe.integrations.torchtitan.overrides import experts

    overrides = getattr(config, "override", None)
    if not isinstance(overrides, OverrideConfig):
        raise TypeError(f"use: config: expected torchtitan's Trainer.Config, got {type(config).__name__}")
    found = [layer for _, layer, _, _ in config.traverse(RoutedExperts.Config)]
    if not found:
        raise ValueError("use: config: expected a model_spec with RoutedExperts, got one without: it has no experts")
    experts(found[0], **options)  # says what is wrong here, and not when the trainer is built
    overrides.imports.append((f"{_OVERRIDES}.experts", options))
    if type(config.activation_checkpoint) is SelectiveAC.Config:
        overrides.imports.append(f"{_OVERRIDES}.selective_ac")
    return config
