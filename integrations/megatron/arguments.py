"""Command-line flags: ``add_moe_args`` is an ``extra_args_provider`` for Megatron's own parser.

Megatron's MoE flags keep their names, defaults and meaning. Beside them there are the names that MegaBlocks' fork of
Megatron uses, which write to Megatron's own destinations, the choice of an implementation, and options that only dmoe
has. What contradicts itself ends the program with one sentence, as argparse does for any other wrong flag.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from dmoe.integrations.megatron.loading import guard_megatrons_own_layer
from dmoe.integrations.megatron.options import PREFIX, options_from_args
from dmoe.integrations.megatron.training_loop import MODULE, refuse_uncarried_args

SPEC = [MODULE, "dmoe_gpt_spec"]  # what --spec takes: a module, and a name in it

Parser = argparse.ArgumentParser


def add_moe_args(parser: Parser, then: Callable[[Parser], Parser | None] | None = None) -> Parser:
    """Megatron's parser with dmoe's flags: pass this as ``extra_args_provider=add_moe_args``.

    With experts on the command line (``--moe-num-experts``, or Megatron's ``--num-experts``) ``--moe-impl`` decides who
    computes them. ``dmoe``, the default, fills in ``--spec``, so a training script needs no other change;
    ``megatron`` leaves it alone, but for plain files of dmoe's, which its layers then refuse.

    Args:
        parser: one that has Megatron's arguments already.
        then: a provider that the script had before; it is called after this one.

    Returns:
        The same parser (or ``then``'s), whose parsing also resolves what several flags decide together.
    """
    group = parser.add_argument_group("dmoe")

    def add(flag: str, **options: Any) -> None:
        try:
            group.add_argument(flag, **options)
        except argparse.ArgumentError:  # this Megatron has a flag of that name: its own it is
            return

    _add_fork_flags(add)
    _add_dmoe_flags(add)
    parser = (then(parser) or parser) if then is not None else parser
    plain = parser.parse_known_args

    def parse_known_args(args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        parsed, rest = plain(args, namespace)
        resolve(parser, parsed)
        return parsed, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]  # parse_args calls it, too
    return parser


def _add_fork_flags(add: Callable[..., None]) -> None:
    """MegaBlocks' names. SUPPRESS: where one is absent, the default stays that of Megatron's own flag."""

    def alias(flag: str, dest: str, own: str, kind: Callable[[str], Any], note: str = "", **options: Any) -> None:
        told = f"Megatron's {own}{note}"
        add(flag, dest=dest, type=kind, default=argparse.SUPPRESS, help=told, metavar="N", **options)

    alias("--moe-num-experts", "num_experts", "--num-experts", int)
    alone = "; 1 takes --moe-router-pre-softmax with it, without which a softmax over one expert is always 1"
    alias("--moe-top-k", "moe_router_topk", "--moe-router-topk", int, alone, action=_TopK)
    alias("--moe-loss-weight", "moe_aux_loss_coeff", "--moe-aux-loss-coeff", float)
    alias("--moe-zloss-weight", "moe_z_loss_coeff", "--moe-z-loss-coeff", float)
    alias("--moe-jitter-eps", "moe_input_jitter_eps", "--moe-input-jitter-eps", float)
    dropless = "; 0 is dropless, as is leaving it out"
    alias("--moe-capacity-factor", "moe_expert_capacity_factor", "--moe-expert-capacity-factor", _capacity, dropless)
    add(
        "--moe-lbl-in-fp32",
        action="store_true",
        help="the load-balancing loss in float32: always so, with and without this",
    )
    add(
        "--moe-expert-model-parallelism",
        action="store_true",
        help="spread experts over the data-parallel ranks: the largest --expert-model-parallel-size that they allow",
    )
    add("--moe-use-megatron-switch", action="store_true", help="the same as --moe-impl megatron")


def _add_dmoe_flags(add: Callable[..., None]) -> None:
    add(
        "--moe-impl",
        choices=["dmoe", "megatron"],
        default=None,
        help="who computes MoE layers; dmoe (the default) sets --spec to its own",
    )

    def option(name: str, told: str, **options: Any) -> None:
        dest = PREFIX + name
        add("--" + dest.replace("_", "-"), dest=dest, default=None, help=told, **options)

    option("activation", "of the experts, instead of Megatron's", choices=["gelu", "gelu_tanh", "relu", "silu"])
    option("bias", "output: one bias of the whole layer, as MegaBlocks' fork has it", choices=["output"])
    option("backend", "how experts are computed", choices=["grouped", "block_sparse", "reference"])
    option("recompute_pre_activation", "keep only the experts' input for backward", action="store_const", const=True)
    option("overlap_degree", "chunks of experts: one computes while another's tokens travel", type=int, metavar="N")
    option("wire_dtype", "tokens travel to other ranks as one byte per number", choices=["fp8", "int8"])
    option("wire_backward", "and so do their gradients", action="store_const", const=True)
    option("max_rows_received", "rows a rank takes at most: no wait of the host, the rest dropped", type=int)
    orders = ["token_major", "choice_major", "batch_prioritized", "gate_weight", "normalized_gate_weight"]
    option("drop_order", "with a capacity: who is dropped, instead of --moe-token-drop-policy", choices=orders)
    option("min_capacity", "with a capacity: never less", type=int, metavar="ROWS")


class _TopK(argparse.Action):
    """One expert per token has one possible meaning under a softmax, which Megatron wants spelled out."""

    def __call__(self, parser: Parser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values)
        if values == 1:
            namespace.moe_router_pre_softmax = True


def _capacity(text: str) -> float | None:
    factor = float(text)
    if not 0 <= factor < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0 (0: dropless), got {text}")
    return factor or None


_capacity.__name__ = "number"  # argparse names the type of what it cannot read


def resolve(parser: Parser, args: Any) -> None:
    """Settle what several flags decide together, in place: implementation, ``--spec``, expert-parallel size.

    Args:
        parser: whose ``error`` ends the program where flags contradict each other.
        args: as parsed; ``moe_impl`` is ``dmoe`` or ``megatron`` afterwards.
    """
    chosen = args.moe_impl
    if getattr(args, "moe_use_megatron_switch", False):
        if chosen == "dmoe":
            parser.error("--moe-use-megatron-switch asks for Megatron's own layer, --moe-impl dmoe for dmoe's")
        chosen = "megatron"
    experts, spec = getattr(args, "num_experts", None), getattr(args, "spec", None)
    # The number of experts may also come from a checkpoint, after parsing; dmoe's spec leaves a dense model as it is.
    has_experts = bool(experts) or bool(getattr(args, "use_checkpoint_args", False))
    ours = spec is not None and spec[:1] == SPEC[:1]
    if spec is not None and ours and chosen == "megatron":
        parser.error(f"--spec {' '.join(spec)} names dmoe's layer, --moe-impl megatron Megatron's own")
    if chosen != "megatron" and has_experts:
        if spec and not ours:
            parser.error(
                f"--spec {' '.join(spec)} and --moe-impl dmoe (its default) both choose the model's layers: leave out "
                "--spec, or say --moe-impl megatron"
            )
        args.spec = spec or list(SPEC)
        if getattr(args, "moe_token_dispatcher_type", None) == "allgather":
            # Megatron's default, which refuses capacities and more. dmoe moves tokens by its own all-to-all anyway.
            args.moe_token_dispatcher_type = "alltoall"
    if chosen != "megatron":
        try:
            refuse_uncarried_args(args)
        except ValueError as error:
            parser.error(str(error))
    given = options_from_args(args)
    if given and (chosen == "megatron" or not has_experts):
        flag = "--" + (PREFIX + next(iter(given))).replace("_", "-")
        lacking = "--moe-impl dmoe, got megatron" if chosen == "megatron" else "--moe-num-experts beside it, got none"
        parser.error(f"{flag}: expected {lacking}")
    args.moe_impl = chosen or "dmoe"
    if args.moe_impl == "megatron":
        guard_megatrons_own_layer()
    if getattr(args, "moe_expert_model_parallelism", False):
        _spread_experts(parser, args, experts)


def _spread_experts(parser: Parser, args: Any, experts: int | None) -> None:
    """``--expert-model-parallel-size`` from the ranks there are, as MegaBlocks' fork takes all data-parallel ones."""
    if not experts:
        parser.error("--moe-expert-model-parallelism: expected --moe-num-experts beside it, got none")
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    others = 1
    for name in sizes:
        others *= getattr(args, name, None) or 1
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    data_parallel = ranks // others
    size = math.gcd(data_parallel, experts) or 1
    wanted = getattr(args, "expert_model_parallel_size", 1)
    if wanted not in (1, size):
        parser.error(
            f"--moe-expert-model-parallelism makes --expert-model-parallel-size {size} of {data_parallel} "
            f"data-parallel ranks and {experts} experts, and {wanted} was given: leave one of the two out"
        )
    args.expert_model_parallel_size = size
