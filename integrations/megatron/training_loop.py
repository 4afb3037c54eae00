"""What the command line of Megatron's own training loop asks of more than the layers, and dmoe's specs cannot give."""

from __future__ import annotations

import sys
from typing import Any

from dmoe.integrations.megatron.parameters import OF_MATRICES
from dmoe.integrations.megatron.refusals import refuse

MODULE = "dmoe.integrations.megatron"


def running_args() -> Any:
    """The arguments of the running training loop; None outside of Megatron's.

    Megatron copies to a TransformerConfig only what the TransformerConfig has, but keeps all arguments at hand for
    whoever builds a model. A program that never loaded ``megatron.training`` has none.
    """
    training = sys.modules.get("megatron.training")
    if training is None:
        return None
    try:
        return training.get_args()
    except AssertionError:  # Megatron's word for: none have been parsed
        return None


def refuse_uncarried_args(args: Any) -> None:
    """Refuse what does not go together with a ``--spec`` of dmoe's; any other spec, or none, is not looked at.

    Args:
        args: as Megatron has parsed them.

    Raises:
        ValueError: the first such option.
    """
    if (getattr(args, "spec", None) or [None])[0] != MODULE:
        return
    further = getattr(args, "mtp_num_layers", None)
    if further:
        refuse(
            "mtp_num_layers",
            further,
            "with --spec Megatron builds the layers that predict further tokens with experts of its own, or not at all",
            "build the model from dmoe_block_spec(config), and get_gpt_mtp_block_spec of that, or choose "
            "--moe-impl megatron",
        )
    if getattr(args, "heterogeneous_layers_config_path", None):
        refuse(
            "heterogeneous_layers_config_path",
            args.heterogeneous_layers_config_path,
            "a layer does not see what the others are like",
            "leave out --spec, or choose --moe-impl megatron",
        )
    if not getattr(args, "num_experts", None):
        return
    if getattr(args, "moe_use_upcycling", False):
        refuse(
            "moe_use_upcycling",
            True,
            "Megatron copies a dense model into experts of its own alone",
            "do that with --moe-impl megatron and --ckpt-format torch_dist, and go on from what it saves without both",
        )
    optimizer = getattr(args, "optimizer", "adam")
    if optimizer not in ("adam", "sgd"):
        refuse("optimizer", optimizer, *OF_MATRICES)
