"""Changes to a checkpoint's arguments in evaluation: ``--model-overrides``, and the flags that become part of it.

fairseq changes the arguments that a checkpoint has. One of the branch has never heard of ``--moe-dropless``, and a
dense one of no expert: here the former get what they lack, and the latter are refused.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from typing import Any

from fairseq import checkpoint_utils
from omegaconf import open_dict

from dmoe.integrations.fairseq_moe.flags import FlagError, flag_names, has_moe_layers, read_flags, spelled

_FRACTION, _DROPLESS = "moe_eval_capacity_token_fraction", "moe_dropless"


def register() -> None:
    """Put this module in front of fairseq's function; a second call does nothing."""
    stock = checkpoint_utils.overwrite_args_by_name
    if not hasattr(stock, "of_dmoe"):
        replaced: Any = functools.wraps(stock)(functools.partial(overwrite_args_by_name, stock))
        replaced.of_dmoe = True
        checkpoint_utils.overwrite_args_by_name = replaced


def overwrite_args_by_name(stock: Any, cfg: Any, overrides: dict[str, Any]) -> None:
    """As the stock one, for every ``--moe-*`` of a checkpoint with experts, whether it has it or not.

    Args:
        stock: fairseq's.
        cfg: of the checkpoint, changed in place.
        overrides: by the names of arguments.

    Raises:
        FlagError: what no model with experts has, or this one cannot have, or a checkpoint without experts.
    """
    known = flag_names()
    given = {name: value for name, value in overrides.items() if name in known or name.startswith("moe_")}
    unknown = next((name for name in given if name not in known and not name.startswith("moe_gate_loss_")), None)
    if unknown is not None:
        raise FlagError(f"--model-overrides: expected a flag of the model, such as {_FRACTION!r}, got {unknown!r}")
    given |= of_capacity(given)
    stock(cfg, {**overrides, **given})
    model = cfg.get("model")
    if not given and not overrides.get("is_moe"):
        return
    if model is None or not has_moe_layers(read_flags(model)):
        asked = spelled(next(iter(given), "is_moe"))
        raise FlagError(f"{asked}: expected a checkpoint with experts, got a dense model's")
    if not isinstance(model, Namespace):  # which takes everything
        with open_dict(cfg):
            model.update({name: value for name, value in given.items() if name in known})
    read_flags(model)


def of_capacity(overrides: dict[str, Any]) -> dict[str, bool]:
    """What a capacity that is asked for says about ``--moe-dropless``.

    Raises:
        FlagError: both are asked for.
    """
    fraction = overrides.get(_FRACTION)
    if not fraction or fraction <= 0:
        return {}
    if overrides.get(_DROPLESS):
        raise FlagError(f"{spelled(_DROPLESS)}: expected no {spelled(_FRACTION)} beside it, got {fraction}")
    return {_DROPLESS: False}
