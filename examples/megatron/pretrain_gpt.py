#!/usr/bin/env python3
"""Trains a small GPT with MoE layers of dmoe in Megatron-Core's own training parts, on real text.

    python examples/megatron/pretrain_gpt.py --moe-num-experts 8                     # a GPU, or the CPU
    torchrun --nproc-per-node 4 examples/megatron/pretrain_gpt.py --moe-num-experts 8 --expert-model-parallel-size 2
    python examples/megatron/pretrain_gpt.py --moe-num-experts 8 --save runs/gpt     # again: goes on from there
    python examples/megatron/pretrain_gpt.py --moe-num-experts 8 --moe-impl megatron # Megatron's own layer: on a GPU

Model, data parallelism, optimizer, schedule and checkpoints are megatron-core's, from PyPI; Megatron-LM's scripts are
not needed. Every number, choice and switch of Megatron's TransformerConfig is a flag here under Megatron's name, and
``add_moe_args`` adds dmoe's. The text is the Python standard library's sources, or ``--data``, byte by byte.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

warnings.filterwarnings("ignore", module=r"megatron\..*")  # what is not installed, and its own deprecations
sys.path.append(str(Path(__file__).resolve().parents[1]))  # last: examples/megatron must not hide megatron itself

# ruff: noqa: E402
from lm.data import Corpus, held_out_batches, load_corpus, training_batch
from lm.settings import UsageError
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_utils import track_moe_metrics
from megatron.core.transformer.transformer_config import TransformerConfig

from dmoe.integrations.megatron import add_moe_args, dmoe_block_spec, options_from_args

BYTES = 256
SMALL = {  # the model, where the command line does not say otherwise
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "ffn_hidden_size": 256,
    "moe_ffn_hidden_size": 128,
    "moe_aux_loss_coeff": 0.01,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "normalization": "RMSNorm",
}


def main() -> None:
    """Sets up the ranks and the model, trains, evaluates, saves."""
    args = parse_args()
    device = join_ranks(args)
    corpus = load_corpus(args.data, args.data_bytes, args.seq_length)
    config = transformer_config(args)
    model, optimizer, scheduler = build(args, config, device)
    step = load(args, model, optimizer, scheduler) if args.save and latest(args.save) else 0
    trained = sum(parameter.numel() for parameter in model.parameters())
    kind = f"{args.num_experts} experts by {args.moe_impl}" if args.num_experts else "dense"
    say(f"{corpus.name}: {len(corpus.train):,} bytes; {trained:,} parameters on rank 0, {kind}")
    with tqdm(total=args.train_iters, initial=step, unit="step", disable=None if dist.get_rank() == 0 else True) as bar:
        while step < args.train_iters:
            loss, norm = train_step(args, config, model, optimizer, corpus, step)
            scheduler.step(increment=1)
            step += 1
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, gradient {norm:.2f}{balance(args, config)}")
            if step % args.eval_interval == 0 or step == args.train_iters:
                held_out = evaluate(args, model, corpus, device)
                bits = held_out / math.log(2)
                say(f"step {step:5d}  train {loss:.4f}  held-out {held_out:.4f} ({bits:.4f} bits per byte)")
                if args.save:
                    save(args, model, optimizer, scheduler, step)
    dist.destroy_process_group()


def parse_args() -> argparse.Namespace:
    """This program's own flags, the TransformerConfig's, and dmoe's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", default=[], metavar="PATH", help="a file or folder; may be repeated")
    parser.add_argument("--data-bytes", type=int, default=8 << 20, metavar="N", help="the most text to use")
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=8, help="sequences of one forward on one rank")
    parser.add_argument("--global-batch-size", type=int, default=16, help="sequences of a step, on all ranks together")
    parser.add_argument("--train-iters", type=int, default=200)
    parser.add_argument("--eval-interval", type=int, default=50)
    parser.add_argument("--eval-bytes", type=int, default=65_536, metavar="N", help="held-out bytes to look at")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--save", type=Path, metavar="DIR", help="checkpoints; where there is one, training goes on")
    parser.add_argument(
        "--no-load-optim",
        action="store_true",
        help="go on with the weights alone, as with another expert-parallel size",
    )
    parser.add_argument("--num-experts", type=int, default=None, help="in every MoE layer; none: a dense model")
    parser.add_argument("--spec", nargs="*", default=None, help=argparse.SUPPRESS)
    group = parser.add_argument_group("Megatron's TransformerConfig")
    for field in dataclasses.fields(TransformerConfig):
        kinds = [kind for kind in (*typing.get_args(field.type), field.type) if kind in (int, float, str, bool)]
        default = SMALL.get(field.name, field.default)
        wanted = field.name.startswith("moe_") or field.name in (*SMALL, "expert_model_parallel_size")
        if wanted and kinds == [bool] and default is False:
            group.add_argument(flag(field.name), action="store_true")
        elif wanted and (kinds or typing.get_origin(field.type) is typing.Literal):
            group.add_argument(flag(field.name), type=(kinds or [str])[0], default=default, metavar="X")
    add_moe_args(parser)  # in a script of Megatron-LM: extra_args_provider=add_moe_args
    args = parser.parse_args()
    if args.train_iters < 1 or args.eval_interval < 1:
        parser.error(
            f"--train-iters, --eval-interval: expected 1 or more, got {args.train_iters}, {args.eval_interval}"
        )
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if args.global_batch_size % (ranks * args.micro_batch_size):
        parser.error(
            f"--global-batch-size: expected a multiple of --micro-batch-size {args.micro_batch_size} on {ranks} ranks, "
            f"got {args.global_batch_size}"
        )
    return args


def flag(name: str) -> str:
    """The command line's spelling of a field."""
    return "--" + name.replace("_", "-")


def say(text: str) -> None:
    """Print, once for all ranks."""
    if dist.get_rank() == 0:
        tqdm.write(text)


def join_ranks(args: argparse.Namespace) -> torch.device:
    """The process groups of torch and of Megatron, and this rank's device."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        from cpu import let_cuda_mean_cpu

        device = torch.device("cpu")
        let_cuda_mean_cpu()
    if os.environ["WORLD_SIZE"] == "1":  # alone, without torchrun: no address is needed
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    else:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=args.expert_model_parallel_size)
    torch.manual_seed(args.seed)
    # The CPU has no generators of CUDA to keep apart, and Megatron's tracker for inference leaves them alone.
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed, inference_rng_tracker=device.type == "cpu")
    return device


def transformer_config(args: argparse.Namespace) -> TransformerConfig:
    """What Megatron-LM's core_transformer_config_from_args does: fields that have a flag, and a few that follow."""
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    values = {name: value for name, value in vars(args).items() if name in known}
    if not args.num_experts:
        values["moe_ffn_hidden_size"] = None
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    return TransformerConfig(
        **values,
        num_moe_experts=args.num_experts or None,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=not torch.cuda.is_available(),
        # These need Apex or Transformer Engine, which pip does not bring.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        bias_dropout_fusion=False,
    )


def build(args: argparse.Namespace, config: TransformerConfig, device: torch.device) -> tuple[Any, Any, Any]:
    """The model under Megatron's data parallelism, its optimizer and the schedule of learning rates."""
    if args.num_experts and args.moe_impl == "dmoe":
        spec = dmoe_block_spec(config, use_transformer_engine=False, options=options_from_args(args))
    else:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    model: Any = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=BYTES,
        max_sequence_length=args.seq_length,
        position_embedding_type="rope",
    ).to(device)
    if args.bf16:
        model = Float16Module(config, model)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    options = OptimizerConfig(
        lr=args.lr,
        min_lr=args.lr / 10,
        weight_decay=0.1,
        clip_grad=args.clip_grad,
        bf16=args.bf16,
    )
    optimizer = get_megatron_optimizer(options, [model])
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.lr / 10,
        lr_warmup_steps=min(20, args.train_iters // 10),
        lr_decay_steps=args.train_iters,
        lr_decay_style="cosine",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=args.train_iters,
        wd_incr_style="constant",
    )
    return model, optimizer, scheduler


def train_step(
    args: argparse.Namespace, config: TransformerConfig, model: Any, optimizer: Any, corpus: Corpus, step: int
) -> tuple[float, float]:
    """One step of all ranks; the mean loss of its batch in nats per byte, and the gradient's norm."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    batches = micro_batches(args, corpus, step)
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=[model],
        num_microbatches=micro_batches_per_step(args),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=False,
    )
    _, norm, _ = optimizer.step()
    mean = torch.stack([loss["lm loss"] for loss in losses]).mean()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size(), float(norm)


def micro_batches_per_step(args: argparse.Namespace) -> int:
    """On each rank."""
    return args.global_batch_size // dist.get_world_size() // args.micro_batch_size


def micro_batches(args: argparse.Namespace, corpus: Corpus, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's sequences of a step's batch, which is a function of seed and step alone."""
    size = args.global_batch_size
    inputs, targets = training_batch(corpus, seed=args.seed, step=step, batch=size, seq_len=args.seq_length)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mine = (part[rank::ranks].split(args.micro_batch_size) for part in (inputs, targets))
    yield from zip(*mine, strict=True)


def forward_step(batches: Iterator[tuple[Tensor, Tensor]], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """What Megatron's schedule asks for: the model's output, and what makes a loss of it."""
    inputs, targets = next(batches)

    def loss_of(per_byte: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = per_byte.float().mean()
        return loss, {"lm loss": loss.detach().clone()}  # the schedule divides the first one in place

    return losses_per_byte(model, inputs, targets), loss_of


def losses_per_byte(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """``(batch, seq)`` cross-entropies."""
    device = next(model.parameters()).device
    batch, length = inputs.shape
    positions = torch.arange(length, device=device).expand(batch, length)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)  # True: not to be looked at
    return model(inputs.to(device), positions, mask, labels=targets.to(device))


@torch.no_grad()
def evaluate(args: argparse.Namespace, model: Any, corpus: Corpus, device: torch.device) -> float:
    """Nats per byte of the held-out text; each rank takes its part of every batch, as layers talk in forward."""
    model.eval()
    ranks, rank = dist.get_world_size(), dist.get_rank()
    total = torch.zeros(2, dtype=torch.float32, device=device)
    size = ranks * args.micro_batch_size
    for inputs, targets in held_out_batches(corpus, max_bytes=args.eval_bytes, batch=size, seq_len=args.seq_length):
        if len(inputs) == size or ranks == 1:
            losses = losses_per_byte(model, inputs[rank::ranks], targets[rank::ranks])
            total += torch.stack([losses.float().sum(), torch.tensor(float(losses.numel()), device=device)])
    dist.all_reduce(total)
    model.train()
    return float(total[0] / total[1])


def balance(args: argparse.Namespace, config: TransformerConfig) -> str:
    """How evenly experts were used in this step: Megatron's log of the balance loss, 1 where all have equal work."""
    if not args.num_experts or not config.moe_aux_loss_coeff:
        return ""
    logged: dict[str, Tensor] = {}
    track_moe_metrics(
        loss_scale=1 / micro_batches_per_step(args),
        iteration=0,
        writer=None,
        total_loss_dict=logged,
        force_initialize=True,
        track_names=["load_balancing_loss"],
        num_layers=config.num_layers,
        moe_layer_freq=config.moe_layer_freq,
    )
    return f", balance {float(logged['load_balancing_loss']):.3f}"


# --------------------------------------------------------------------------------------------------------- checkpoints


def latest(folder: Path) -> Path | None:
    """The last whole checkpoint in a folder."""
    pointer = folder / "latest.txt"
    return folder / pointer.read_text().strip() if pointer.exists() else None


def sharded_state(model: Any, optimizer: Any | None, scheduler: Any, step: int, *, loading: bool) -> dict[str, Any]:
    """All that goes on after a resume, as shards that any number of ranks can put together again."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    weights = model.module.sharded_state_dict(metadata=metadata)
    experts_over = parallel_state.get_expert_model_parallel_world_size()
    state = {"model": weights, "scheduler": scheduler.state_dict(), "step": step, "experts_over": experts_over}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)
    return state


def save(args: argparse.Namespace, model: Any, optimizer: Any, scheduler: Any, step: int) -> None:
    """A distributed checkpoint; the pointer to it moves when it is whole."""
    folder = args.save / f"step_{step:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(sharded_state(model, optimizer, scheduler, step, loading=False), str(folder))
    dist.barrier()
    if dist.get_rank() == 0:
        (args.save / "latest.txt").write_text(folder.name)


def load(args: argparse.Namespace, model: Any, optimizer: Any, scheduler: Any) -> int:
    """Takes up the last checkpoint; returns its step."""
    saved = dist_checkpointing.load_common_state_dict(str(latest(args.save)))["experts_over"]
    if saved != args.expert_model_parallel_size and not args.no_load_optim:
        raise UsageError(
            f"--save {args.save}: saved with --expert-model-parallel-size {saved}, and Megatron takes up its optimizer "
            f"with no other, got {args.expert_model_parallel_size}; add --no-load-optim to go on with the weights alone"
        )
    wanted = sharded_state(model, None if args.no_load_optim else optimizer, scheduler, 0, loading=True)
    state = dist_checkpointing.load(wanted, str(latest(args.save)))
    model.module.load_state_dict(state["model"])
    if args.no_load_optim:
        optimizer.reload_model_params()  # with --bf16 it has float32 copies of its own
    else:
        optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    say(f"on from step {state['step']} in {args.save}")
    return int(state["step"])


if __name__ == "__main__":  # needed: saving starts processes of its own
    try:
        main()
    except UsageError as error:
        sys.stderr.write(f"pretrain_gpt.py: error: {error}\n")  # in one piece, as ranks share the terminal
        sys.exit(2)
