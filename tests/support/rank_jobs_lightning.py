"""Lightning's Trainer on ranks that are a group already."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import replace
from unittest.mock import patch

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from training_cases import Net, data_of, environment, optimizer_of, whole

import dmoe
from dmoe.integrations.lightning import MoEDDPStrategy, MoEModelParallelStrategy


class Module(pl.LightningModule):
    """The net of the cases; plain, or spread in ``configure_model``."""

    def __init__(self, case, how):
        super().__init__()
        self.how, self.case, self.losses = how, case, []
        self.net = Net(case) if how != "built there" else None

    def configure_model(self):
        if self.how == "fsdp2" and not hasattr(self.net, "unshard"):
            dmoe.parallel.parallelize(self.net, self.device_mesh)
        if self.net is None:
            everyone = dist.group.WORLD
            self.net = Net(self.case, ep_group=self.device_mesh["ep"], loss_group=everyone)

    def loss_of(self, position):
        """Of this rank's samples of a micro batch, by its number, with which Lightning goes on after a checkpoint."""
        ranks = self.trainer.strategy.distributed_sampler_kwargs
        x = data_of(self.case).split(self.case.batch)[position][ranks["rank"] :: ranks["num_replicas"]]
        return self.net(x).square().mean()

    def training_step(self, _, position):
        loss = self.loss_of(position) + dmoe.aux_loss(self)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, _, position):
        self.losses.append(self.loss_of(position))

    def train_dataloader(self):
        return DataLoader(range(self.case.steps * self.case.accumulate))

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        return optimizer_of(self.net)


def strategy_of(how, ep):
    kind = MoEModelParallelStrategy if how == "fsdp2" else MoEDDPStrategy
    strategy = kind(ep)
    strategy.cluster_environment = TorchElasticEnvironment()
    return strategy


def trainer_of(case, how, ep, **options):
    defaults = {
        "accelerator": "cpu",
        "devices": dist.get_world_size(),
        "strategy": strategy_of(how, ep),
        "max_steps": case.steps,
        "max_epochs": None,
        "accumulate_grad_batches": case.accumulate,
        "gradient_clip_val": case.clip,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "limit_val_batches": 0,
    }
    return pl.Trainer(**{**defaults, **options})


def quiet(job):
    """Without Lightning's advice on workers and the like."""

    def run(*arguments):
        world = dist.get_world_size()
        told = environment(dist.get_rank(), world)
        with patch.dict(os.environ, told), warnings.catch_warnings():
            for text in (".*does not have many workers.*", ".*srun.*", ".*log_every_n_steps.*", ".*lr_scheduler.step.*"):
                warnings.filterwarnings("ignore", text)
            return job(*arguments)

    return run


def mean_over_ranks(values):
    values = torch.stack(values)
    dist.all_reduce(values)
    return values / dist.get_world_size()


def fit(group, case, how, ep, folder=None, resume=None, options=None):
    """Train, from one or the start, with a checkpoint after each half; what all ranks end with, and their losses' mean.
    """

    def run():
        module = Module(case, how)
        more = dict(options or {})
        if folder is not None:
            checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=case.steps // 2, save_top_k=-1)
            more |= {"callbacks": [checkpoint], "enable_checkpointing": True}
        trainer_of(case, how, ep, **more).fit(module, ckpt_path=resume)
        return whole(module.net), mean_over_ranks(module.losses)

    return quiet(run)()


def fit_float16(group, case):
    """Under a grad scaler that begins too high; the values, and how many steps were skipped."""

    def run():
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**22))
        case32 = replace(case, dtype=torch.float32, accumulate=1)
        module = Module(case32, "plain")
        trainer_of(case32, "plain", 2, plugins=[plugin]).fit(module)
        assert isinstance(plugin.scaler, dmoe.parallel.GradScaler)
        return whole(module.net), round(22 - math.log2(plugin.scaler.get_scale()))

    return quiet(run)()


def validate(group, case, how, ep):
    """What the net has, and the losses, after a validation without training."""

    def run():
        module = Module(case, how)
        trainer_of(case, how, ep, limit_val_batches=1.0).validate(module, verbose=False)
        return whole(module.net), module.losses

    return quiet(run)()


def refusals(group, case, folder):
    """What the strategies say to what they do not do."""

    def told(kind, *arguments):
        try:
            kind(*arguments)
        except (ValueError, TypeError) as error:
            return str(error)

    def plain_experts():
        module = Module(case, "plain")
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "ep"))
        module.net = Net(case, ep_group=mesh["ep"], dtensor=False, loss_group=dist.group.WORLD)
        trainer = trainer_of(replace(case, steps=1), "plain", 2)
        trainer.fit(module)
        trainer.save_checkpoint(folder)

    def run():
        trainer = trainer_of(replace(case, steps=1), "plain", 2)
        trainer.fit(Module(case, "plain"))
        return {
            "divisor": told(trainer_of(case, "plain", 3).fit, Module(case, "plain")),
            "plain experts": told(plain_experts),
            "no folder": told(trainer.strategy.load_checkpoint, folder),
            "storage options": told(trainer.strategy.save_checkpoint, {}, folder, {}),
        }

    return quiet(run)()
