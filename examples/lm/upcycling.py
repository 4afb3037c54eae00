"""A mixture that begins as copies of a short dense run (Komatsuzaki et al. 2023, "Sparse Upcycling")."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from tqdm import tqdm

import dmoe

from .layers import moe_configs
from .model import count_parameters
from .settings import Settings
from .training import Run

DENSE_SHARE = 0.25  # of the steps: how long the dense run is


def upcycled_run(
    settings: Settings,
    dense: Literal["counted", "free"],
    make: Callable[[str, Settings], Run],
    bar: tqdm,
) -> tuple[Run, Run]:
    """A dense run to its end, and a mixture that begins where it ended.

    The dense FFN is as wide as one expert, so what is copied is a model of fewer FLOPs for a byte than the mixture.

    Args:
        settings: of the mixture from scratch that it stands beside.
        dense: whether the mixture makes as many fewer steps as the dense run's FLOPs are worth, or all of them.
        make: a run of this name with these settings.
        bar: for progress.

    Returns:
        The dense run, and the mixture, at its first step.
    """
    steps = max(1, int(DENSE_SHARE * settings.steps))
    shrink = steps / settings.steps
    short = dataclasses.replace(settings, top_k=1, steps=steps, warmup=int(settings.warmup * shrink), eval_every=steps)
    parent = make("dense", short)
    parent.advance(steps, bar, lambda: False, tell=False)
    left = settings.steps
    if dense == "counted":
        left -= round(steps * flops_of_a_byte(parent) / flops_of_a_byte(make("moe", settings)))
    shrink = left / settings.steps
    rest = dataclasses.replace(settings, steps=left, warmup=int(settings.warmup * shrink))
    run = make("moe", rest)
    begin_as_copies(run, parent)
    return parent, run


@torch.no_grad()
def begin_as_copies(run: Run, parent: Run) -> None:
    """Every weight of a mixture but its routers' becomes the dense run's, each expert's those of the dense FFN."""
    model = copy.deepcopy(parent.model)
    config = moe_configs(run.settings)[0]
    dmoe.replace_ffn(model, "blocks.*.ffn", num_experts=run.settings.layer_experts, top_k=config.top_k, upcycle=True)
    weights = {name: value for name, value in model.state_dict().items() if ".router." not in name}
    unknown = run.model.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise RuntimeError(f"begin_as_copies: expected the mixture's weights, got {unknown}")


def flops_of_a_byte(run: Run) -> float:
    """FLOPs of training on one byte: 6 for each active parameter (Kaplan et al. 2020), and those of attention.

    Attention, causal: a byte sees half of its sequence on average, in two products forward, and four backward.
    """
    s = run.settings
    return 6 * count_parameters(run.model)["active"] + 6 * s.layers * s.seq_len * s.hidden
