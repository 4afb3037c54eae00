#!/usr/bin/env python
"""A small model with a mixture of experts in Lightning's Trainer: experts over ranks, checkpoints, monitoring.

python examples/train_lightning.py --devices 2 --ep 2                 # one node, CPUs or GPUs
python examples/train_lightning.py --devices 4 --ep 2 --fsdp          # the rest by FSDP2
python examples/train_lightning.py --devices 1 --resume runs/lightning/last.ckpt
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dmoe
from dmoe.integrations.lightning import MoECallback, MoEDDPStrategy, MoEModelParallelStrategy


class Regression(pl.LightningModule):
    """Learns a function of 16 numbers by eight experts, built as for one process."""

    def __init__(self, fsdp: bool) -> None:
        super().__init__()
        self.fsdp = fsdp
        layer = dmoe.MoE(
            hidden_size=32, ffn_hidden_size=64, num_experts=8, top_k=2, load_balancing_coefficient=0.01,
            load_balancing_over="global", selection_bias=True,
        )  # fmt: skip
        self.net = nn.Sequential(nn.Linear(16, 32), layer, nn.Linear(32, 1))

    def configure_model(self) -> None:
        """FSDP2 is asked for here; the DDP strategy spreads the experts by itself."""
        if self.fsdp and self.device_mesh is not None and not hasattr(self.net, "unshard"):
            dmoe.parallel.parallelize(self.net, self.device_mesh)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The task's loss, and the one that keeps experts balanced."""
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x).squeeze(-1), y)
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss + dmoe.aux_loss(self)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Experts, which are ``DTensor``, in a group of their own: foreach and fused steps take no others with them."""
        return torch.optim.AdamW([{"params": group} for group in dmoe.parallel.split_parameters(self.net)], lr=3e-3)


def main() -> Any:
    """Train; the Trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--ep", type=int, default=1, help="ranks that share the experts")
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 instead of DDP")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--resume", help="a checkpoint, of any number of ranks")
    parser.add_argument("--out", default="runs/lightning")
    args = parser.parse_args()
    pl.seed_everything(0)  # alike on all ranks: so are the values that the experts are taken from
    x = torch.randn(4096, 16)
    loader = DataLoader(TensorDataset(x, torch.sin(x @ torch.randn(16)) + x[:, 0].abs()), batch_size=64, shuffle=True)
    trainer = pl.Trainer(
        devices=args.devices, accelerator="auto", max_steps=args.steps, max_epochs=-1,
        strategy=MoEModelParallelStrategy(args.ep) if args.fsdp else MoEDDPStrategy(args.ep),
        accumulate_grad_batches=2, gradient_clip_val=1.0, log_every_n_steps=5,
        callbacks=[MoECallback(), ModelCheckpoint(args.out, every_n_train_steps=args.steps // 2, save_last=True)],
        logger=TensorBoardLogger(args.out, name="", version=""), enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Regression(args.fsdp), loader, ckpt_path=args.resume)
    return trainer


if __name__ == "__main__":
    main()
