"""Every ``--moe-*`` flag with its default and meaning, as fairseq's ``moe`` branch has them, and two of dmoe's own."""

# No postponed annotations in this file, and Optional: fairseq reads the types of its configs' fields, as of 2022.
# ruff: noqa: UP045
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.utils import safe_getattr

POLICIES = ("all", "sampling", "random")
EXPERT_GRADS = ("world_size", "sqrt_world_size")


class FlagError(ValueError):
    """Options that do not fit together, told in one sentence; the launcher shows it without a traceback."""


def flag(default: Any, meaning: str) -> Any:
    """A field of a config with its help text."""
    return field(default=default, metadata={"help": meaning})


@dataclass
class MoEFlags(FairseqDataclass):
    """Flags of every model."""

    moe_freq: int = flag(0, "layer i (from 0) is a MoE layer when (i + 1) is a multiple of this; 0: no MoE")
    moe_expert_count: int = flag(0, "experts of each MoE layer, over all ranks")
    moe_dropless: bool = flag(
        False, "no capacity, in training or evaluation: every token is computed by the experts it chose (recommended)"
    )
    moe_gating_use_fp32: bool = flag(False, "the gate's softmax in float32; its matmul stays in the model's dtype")
    moe_second_expert_policy: str = flag(
        "sampling",
        "the second expert: 'all': the second best; 'sampling': drawn, by Gumbel noise on the logits; 'random': the "
        "second best, kept with probability min(1, 2 * its gate)",
    )
    moe_random_second_expert_in_eval: bool = flag(
        False, "apply 'sampling' and 'random' in evaluation too, as the branch does; otherwise evaluation takes 'all'"
    )
    moe_normalize_gate_prob_before_dropping: bool = flag(
        False, "let the two gate weights share 1 before anything is dropped; otherwise those that are left share 1"
    )
    moe_expert_ffn_dim: Optional[int] = flag(None, "inner width of the experts; by default that of the other layers")
    moe_top1_expert: Optional[bool] = flag(False, "one expert per token, weighted by its probability")
    moe_eval_capacity_token_fraction: Optional[float] = flag(
        0.25, "rows of an expert in evaluation, as a share of the batch's tokens; 0 or less: as in training"
    )
    moe_normalize_expert_grad: Optional[str] = flag(
        "world_size", "divide the experts' gradients by the number of ranks ('world_size') or its root"
    )
    use_moe_pad_mask: Optional[bool] = flag(False, "padding takes no expert")
    record_a2a_perf_stats: Optional[bool] = flag(False, "log the time spent in all-to-all exchanges")
    dummy_a2a: Optional[bool] = flag(False, "exchange nothing between ranks (refused on more than one)")
    moe_batch_prioritized_routing: Optional[bool] = flag(
        False, "where a capacity binds, the tokens with the largest gates come first instead of the first ones"
    )
    alternate_decoder_ffn_embed_dim: int = flag(
        0, "make the decoder's MoE layers dense ones of this inner width instead (a baseline of equal cost)"
    )


@dataclass
class EncoderDecoderFlags(MoEFlags):
    """Flags of encoder-decoder models."""

    encoder_moe_freq: int = flag(0, "--moe-freq of the encoder; the larger of the two counts")
    decoder_moe_freq: int = flag(0, "--moe-freq of the decoder; the larger of the two counts")
    alternate_ffn_embed_dim: int = flag(0, "--alternate-decoder-ffn-embed-dim of the encoder")


def read_flags(args: Any) -> EncoderDecoderFlags:
    """The flags in any of the shapes in which fairseq hands arguments around, checked.

    Args:
        args: a namespace, an omegaconf config or a ``TransformerConfig``; what it lacks has the default.

    Raises:
        FlagError: a value that no flag takes, or values that do not go together.
    """
    flags = EncoderDecoderFlags()
    for name in flag_names():
        value = safe_getattr(args, name, None)  # a TransformerConfig says None for what it does not know
        if value is not None:
            setattr(flags, name, value)
    _check(flags)
    return flags


def flag_names() -> set[str]:
    """Of all of them, as fairseq's arguments have them."""
    return {known.name for known in fields(EncoderDecoderFlags) if not known.name.startswith("_")}


def spelled(name: str) -> str:
    """The flag of an argument."""
    return "--" + name.replace("_", "-")


def has_moe_layers(flags: EncoderDecoderFlags) -> bool:
    """Whether a model with these flags has MoE layers at all."""
    return max(flags.moe_freq, flags.encoder_moe_freq, flags.decoder_moe_freq) > 0


def _check(flags: EncoderDecoderFlags) -> None:
    def expect(holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise FlagError(f"{spelled(name)}: expected {expected}, got {getattr(flags, name)!r}")

    expect(flags.moe_second_expert_policy in POLICIES, "moe_second_expert_policy", one_of(POLICIES))
    expect(flags.moe_normalize_expert_grad in EXPERT_GRADS, "moe_normalize_expert_grad", one_of(EXPERT_GRADS))
    for name in ("moe_freq", "encoder_moe_freq", "decoder_moe_freq", "moe_expert_count"):
        expect(getattr(flags, name) >= 0, name, "at least 0")
    for name in ("alternate_decoder_ffn_embed_dim", "alternate_ffn_embed_dim"):
        expect(getattr(flags, name) >= 0, name, "at least 0")
    width = flags.moe_expert_ffn_dim
    expect(width is None or width >= 0, "moe_expert_ffn_dim", "at least 1 (0 or nothing: as the other layers)")
    fraction = flags.moe_eval_capacity_token_fraction
    expect(
        fraction is not None and math.isfinite(fraction) and fraction <= 1,
        "moe_eval_capacity_token_fraction",
        "a share of at most 1 (0 or less: the capacity of training)",
    )
    if has_moe_layers(flags):
        fewest = 1 if flags.moe_top1_expert else 2
        expect(flags.moe_expert_count >= fewest, "moe_expert_count", f"at least {fewest} experts in a MoE model")


def check_together(flags: EncoderDecoderFlags) -> list[str]:
    """Look on a command line for what has no effect beside the rest of it; a checkpoint may hold anything.

    Returns:
        Sentences about flags that the branch accepts all the same.

    Raises:
        FlagError: the first other such flag.
    """
    stock = EncoderDecoderFlags()
    given = sorted(name for name in flag_names() if getattr(flags, name) not in (getattr(stock, name), None))

    def without_effect(names: Iterable[str], expected: str) -> list[str]:
        return [
            f"{spelled(name)}: expected {expected}, got {getattr(flags, name)!r}" for name in given if name in names
        ]

    refused, told = [], []
    if not has_moe_layers(flags):
        told += without_effect(flag_names(), "--moe-freq beside it, without which no layer has experts")
    if flags.moe_dropless:
        refused += without_effect(
            ["moe_batch_prioritized_routing"], "none with --moe-dropless, under which every token comes through"
        )
        if (flags.moe_eval_capacity_token_fraction or 0) > 0:
            refused += without_effect(["moe_eval_capacity_token_fraction"], "none with --moe-dropless, or 0")
    if flags.moe_top1_expert or flags.moe_second_expert_policy == "all":
        refused += without_effect(
            ["moe_random_second_expert_in_eval"], "two experts and --moe-second-expert-policy sampling or random"
        )
    if flags.moe_top1_expert:
        of_the_second = (
            "moe_second_expert_policy",
            "moe_normalize_gate_prob_before_dropping",
            "moe_batch_prioritized_routing",
        )
        told += without_effect(of_the_second, "nothing with --moe-top1-expert, under which there is no second expert")
    if refused:
        raise FlagError(refused[0])
    return told


def one_of(names: tuple[str, ...]) -> str:
    """``a, b or c``, for error messages."""
    return f"{', '.join(names[:-1])} or {names[-1]}"
