#!/usr/bin/env python3
"""Fine-tunes a mixture of experts with Transformers' Trainer and PEFT's LoRA on the experts; dmoe computes them.

    pip install '.[transformers,examples]' peft accelerate
    python examples/transformers/finetune_peft.py                                  # a minute on two cores
    python examples/transformers/finetune_peft.py --data notes/ --steps 500        # on text of your own
    python examples/transformers/finetune_peft.py --model Qwen/Qwen3-30B-A3B --data notes/ --dtype bfloat16 --batch 1

Three lines of it are about dmoe: ``register()``, and ``experts_implementation="dmoe"`` when a model is loaded. Without
``--model`` it first trains a small Qwen3-MoE of bytes on the Python standard library's sources (once; it stays in
``--out``), and then fine-tunes it on another text. It ends with the adapter in ``OUT/adapter``, and a picture of the
loss and of the experts' load in ``OUT/finetune_peft.png``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from recipe import UsageError, Windows, arguments, base_model, draw, held_out, text_of, trainer_of
from transformers import AutoModelForCausalLM

from dmoe.integrations.transformers import register


def main(given: Sequence[str] | None = None) -> int:
    """Runs the recipe; returns its exit status: 0, or 2 for what the user can put right."""
    options = build_parser().parse_args(given)
    try:
        return run(options)
    except (UsageError, OSError, ValueError) as error:
        print(f"finetune_peft: error: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder or id of a model with experts and a tokenizer [a small one, trained first]")
    add("--data", nargs="*", default=[], metavar="PATH", help="text to fine-tune on [Python's help topics]")
    add("--out", type=Path, default=Path("runs/finetune_peft"), help="[runs/finetune_peft]")
    add("--steps", type=int, default=150, help="of fine-tuning [150]")
    add("--base-steps", type=int, default=300, help="of training the small model [300]")
    add("--batch", type=int, default=8, help="sequences in a step [8]")
    add("--seq-len", type=int, default=128, help="tokens in a sequence [128]")
    add("--rank", type=int, default=8, help="of LoRA's factors [8]")
    add("--lr", type=float, default=2e-3, help="learning rate [0.002]")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model [float32]")
    return parser


def run(options: argparse.Namespace) -> int:
    """The recipe itself."""
    register()
    options.out.mkdir(parents=True, exist_ok=True)
    text = text_of(options.data, options.seq_len, options.model)
    start = options.model or base_model(options.out / "base", options.base_steps, options.seq_len, options.batch)
    model = AutoModelForCausalLM.from_pretrained(
        start, experts_implementation="dmoe", dtype=getattr(torch, options.dtype)
    )
    lora = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, lora)
    adapted.print_trainable_parameters()
    windows = Windows(text.train, options.seq_len, options.steps * options.batch)
    trainer = trainer_of(adapted, arguments(options.out, options.steps, options.batch, options.lr), windows)
    before = held_out(model, text, options.seq_len)
    trainer.train()
    after = held_out(model, text, options.seq_len)
    adapted.save_pretrained(options.out / "adapter")
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    picture = options.out / "finetune_peft.png"
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in adapted.parameters())
    note = f"Rank {options.rank}: {trained:,} of {whole:,} numbers are trained, on {text.name}"
    draw(picture, "LoRA on the experts of a mixture", note, losses, (before[0], after[0]), (before[1], after[1]))
    print(f"held-out loss {before[0]:.3f} -> {after[0]:.3f} nats a token; {options.out / 'adapter'}, {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
