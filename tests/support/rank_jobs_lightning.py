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
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from training_cases import Net, data_of, environment, optimizer_of, whole

import dmoe
from dmoe.integrations.lightning import MoECallback, MoEDDPStrategy, MoEModelParallelStrategy


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
            for text in (
                ".*does not have many workers.*",
                ".*srun.*",
                ".*isinstance.treespec.*",
                ".*validation_step.*",
            ):
                warnings.filterwarnings("ignore", text)
            return job(*arguments)

    return run


def mean_over_ranks(values):
    values = torch.stack(values)
    dist.all_reduce(values)
    return values / dist.get_world_size()


def fit(group, case, how, ep, folder=None, resume=None, options=None, watched=False):
    """Train, from a checkpoint or the start; what all ranks end with, and their losses' mean.

    A folder gets one after each half. ``watched``: with the callback.
    """

    def run():
        module = Module(case, how)
        more = {"callbacks": [MoECallback()] if watched else [], **(options or {})}
        if folder is not None:
            checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=case.steps // 2, save_top_k=-1)
            more |= {"callbacks": [*more["callbacks"], checkpoint], "enable_checkpointing": True}
        trainer_of(case, how, ep, **more).fit(module, ckpt_path=resume)
        return whole(module.net), mean_over_ranks(module.losses)

    return quiet(run)()


def fit_float16(group, case):
    """Under a grad scaler that begins too high; the values, and how many steps were skipped."""

    def run():
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**17))
        case32 = replace(case, dtype=torch.float32, accumulate=1)
        module = Module(case32, "plain")
        trainer_of(case32, "plain", 2, plugins=[plugin]).fit(module)
        assert isinstance(plugin.scaler, dmoe.parallel.GradScaler)
        return whole(module.net), round(17 - math.log2(plugin.scaler.get_scale()))

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
        weights = folder + "/weights"
        trainer.save_checkpoint(weights, weights_only=True)
        return {
            "weights alone": told(lambda: trainer.fit(Module(case, "plain"), ckpt_path=weights)),
            "divisor": told(trainer_of(case, "plain", 3).fit, Module(case, "plain")),
            "plain experts": told(plain_experts),
            "no folder": told(trainer.strategy.load_checkpoint, folder),
            "storage options": told(trainer.strategy.save_checkpoint, {}, folder, {}),
        }

    return quiet(run)()


class Watched(MoECallback):
    """The callback, beside what ``reduce_metrics`` says, and with its all-reduces counted."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen, self.reduced = [], []

    def on_train_batch_end(self, trainer, pl_module, *rest):
        before, expected = self.last, dmoe.reduce_metrics(pl_module)
        with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            super().on_train_batch_end(trainer, pl_module, *rest)
        self.reduced.append(all_reduce.call_count)
        if self.last is not before:
            self.seen.append((self.last, expected))


class Shown(Logger):
    """Stands for Weights & Biases' logger."""

    def __init__(self):
        super().__init__()
        self.numbers, self.images = [], []

    name = version = "stand-in"

    @rank_zero_only
    def log_metrics(self, metrics, step=None):
        self.numbers.append(dict(metrics))

    @rank_zero_only
    def log_image(self, key, images, step=None):
        self.images.append((key, step, images[0].shape))

    def log_hyperparams(self, *_):
        pass


def watch(group, case, how, folder, every):
    """Train with the callback, and every logger; what was seen, reduced, logged, and shown."""

    def run():
        module, callback, shown = Module(case, how), Watched(), Shown()
        board = TensorBoardLogger(folder, name="", version="")
        options = {"logger": [board, shown], "log_every_n_steps": every, "callbacks": [callback]}
        trainer = trainer_of(case, how, dist.get_world_size(), **options)
        trainer.fit(module)
        board.experiment.flush()
        logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
        return callback.seen, callback.reduced, logged, shown.numbers, shown.images

    return quiet(run)()


class Unread(Module):
    """Nobody adds the auxiliary loss, and no token goes to the last experts."""

    def training_step(self, _, position):
        with torch.no_grad():
            self.net.moe.router.weight.zero_()
        return self.loss_of(position)


def warned(group, case):
    """The sentences that the callback warns with."""

    def run():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            callback = MoECallback(1, limits=dmoe.monitoring.Limits(dead_steps=3))
            trainer_of(case, "plain", dist.get_world_size(), callbacks=[callback]).fit(Unread(case, "plain"))
        return sorted({str(each.message) for each in caught if str(each.message).startswith("dmoe:")})

    return quiet(run)()
