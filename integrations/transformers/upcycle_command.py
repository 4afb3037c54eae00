"""``upcycle`` on the command line."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from dmoe.checkpoint import progress_over
from dmoe.checkpoint.hub_writer import MAX_SHARD_BYTES
from dmoe.integrations.transformers.upcycle_families import MOE_FAMILIES
from dmoe.integrations.transformers.upcycle_files import Upcycled, upcycle
from dmoe.integrations.transformers.upcycle_verify import compare, table

_DTYPES = ("float32", "bfloat16", "float16")
_TOLD = """A dense language model becomes a mixture of experts: its FFNs are copied into experts behind a new router.

SRC is a folder in Hugging Face's format (safetensors, in one or several files), or the id of a model that is in the
hub's cache. DST is one that Transformers loads, without dmoe; it is there whole, or not at all. Qwen2 becomes
Qwen2-MoE, Qwen3 becomes Qwen3-MoE, Llama and Mistral become Mixtral (or, with --every, Qwen2-MoE without biases), OLMo2
becomes FlexOlmo: each the family that computes what the dense model does. What cannot be preserved is refused.

Copies alone compute the dense model's logits exactly, but for rounding: train them, and they part. --perturb, --reinit
and --experts let them begin apart. Routers begin at random; none is made from prompts.
"""
_EXAMPLES = """examples:
  python -m dmoe.integrations.transformers upcycle Qwen/Qwen3-0.6B qwen3-8x0.6b --num-experts 8 --top-k 2 --verify
  python -m dmoe.integrations.transformers upcycle llama fine-grained --granularity 4 --reinit 0.5 --dtype bfloat16
  python -m dmoe.integrations.transformers upcycle base merged --experts base code maths prose --to mixtral
"""


def add_upcycle(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "upcycle",
        help="a dense model becomes a mixture of experts, as files that Transformers loads",
        description=_TOLD,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run_upcycle)
    add = parser.add_argument
    add("src", metavar="SRC", help="dense model: a folder, or an id that the hub's cache has")
    add("dst", metavar="DST", help="folder to write")
    add("--num-experts", type=int, metavar="E", help="copies of each FFN [as many as --experts, or 8]")
    add("--top-k", type=int, default=2, metavar="K", help="of which each token takes so many [2]")
    add(
        "--granularity",
        type=int,
        default=1,
        metavar="G",
        help="cut each copy into G experts of a G-th of the width: E G experts, of which K G are chosen [1]",
    )
    add("--every", type=int, default=1, metavar="N", help="only each N-th layer becomes a mixture [1]")
    apart = parser.add_mutually_exclusive_group()
    apart.add_argument(
        "--perturb", type=float, default=0.0, metavar="S", help="add noise of S standard deviations of each weight [0]"
    )
    apart.add_argument(
        "--reinit", type=float, default=0.0, metavar="R", help="draw a share R of each expert's columns anew [0]"
    )
    add(
        "--experts",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="dense models with FFNs of the same shape: theirs are the experts, everything else is SRC's",
    )
    add("--router-std", type=float, default=0.02, metavar="X", help="of the routers' normal weights [0.02]")
    add("--dtype", choices=_DTYPES, help="of what is written [as SRC has it]")
    add("--to", choices=tuple(MOE_FAMILIES), help="[the family that preserves SRC]")
    add("--seed", type=int, default=0, help="of everything random [0]")
    add(
        "--shard-gib",
        type=float,
        default=MAX_SHARD_BYTES / 2**30,
        metavar="GIB",
        help="size of a file, of which one is in memory at a time [%(default)g]",
    )
    add("--overwrite", action="store_true", help="replace a model in DST")
    add(
        "--verify",
        action="store_true",
        help="load both models in float32, one after the other, and print how far their logits are apart",
    )


def run_upcycle(options: argparse.Namespace) -> None:
    """What the command does.

    Raises:
        ValueError: what :func:`upcycle` cannot preserve; or ``--verify`` finds logits further apart than rounding.
        OSError: files are missing, and the like.
    """
    made = upcycle(
        options.src,
        options.dst,
        num_experts=options.num_experts,
        top_k=options.top_k,
        granularity=options.granularity,
        every=options.every,
        perturb=options.perturb,
        reinit=options.reinit,
        router_std=options.router_std,
        experts=options.experts,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        to=options.to,
        seed=options.seed,
        max_shard_bytes=int(options.shard_gib * 2**30),
        overwrite=options.overwrite,
        progress=progress_over("upcycling", "layer"),
    )
    print(f"{made.folder}: {made.model_type} with {made.num_experts} experts, {made.top_k} for each token")
    if options.verify:
        verify(made)


def verify(made: Upcycled) -> None:
    """Print how far the mixture is from the dense model.

    Raises:
        ValueError: further than its options allow. Experts that begin apart may be anywhere, but finite.
    """
    differences = compare(made.source, made.folder, dtype=made.dtype)
    print(table(differences))
    limit = made.rounding if made.exact else math.inf
    for row in differences:
        if not (row.relative <= limit and math.isfinite(row.relative)):
            told = f"logits within {limit:.1e} of the dense model's" if made.exact else "finite logits"
            raise ValueError(f"{made.folder}: expected {told}, got {row.relative:.1e} on {row.name}; it is left there")
