#!/usr/bin/env python
"""Transformers' Trainer on a mixture of experts whose experts are spread over ranks, with their load in its logs.

torchrun --nproc-per-node 2 examples/transformers/trainer_ep.py --ep 2
python examples/transformers/trainer_ep.py --resume runs/trainer_ep/checkpoint-20      # on another number of ranks
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainingArguments, set_seed

from dmoe.integrations.transformers import MoECallback, ParallelTrainer, parallelize

TEXT = "a mixture of experts sends every token to a few of many experts, and adds up what they say. "
SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.01,
}  # fmt: skip


def main() -> Any:
    """Train; the Trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ep", type=int, default=1, help="ranks that share the experts")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--resume", help="a checkpoint, of any number of ranks")
    parser.add_argument("--out", default="runs/trainer_ep")
    args = parser.parse_args()
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group()

    set_seed(0)  # alike on all ranks; a model that is too large for one: parallelize("path/or/name", ep=...)
    model = parallelize(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)), ep=args.ep, aux_loss="attached").train()
    ids = torch.tensor([ord(letter) for letter in TEXT * 80])
    rows = [{"input_ids": row, "labels": row} for row in ids.unfold(0, 32, 8)]
    arguments = TrainingArguments(
        args.out, max_steps=args.steps, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        learning_rate=3e-3, logging_steps=10, save_steps=20, report_to=[], use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = ParallelTrainer(model, arguments, train_dataset=rows)
    trainer.add_callback(MoECallback(trainer, to=args.out))  # then: python -m dmoe.report runs/trainer_ep
    trainer.train(resume_from_checkpoint=args.resume)
    return trainer


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
