"""fairseq's ``Trainer`` for models with experts, and for ``--ddp-backend fully_sharded``."""

from __future__ import annotations

import functools
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from fairseq import utils
from fairseq.trainer import Trainer
from omegaconf import open_dict
from torch import nn

from dmoe.integrations.fairseq_moe import checkpoints, finding, fsdp, parallel, parts, profiling, saving
from dmoe.integrations.fairseq_moe.flags import FlagError
from dmoe.integrations.fairseq_moe.layer import moe_layers

logger = logging.getLogger(__name__)


class MoETrainer(Trainer):
    """See the module. A dense model without ``fully_sharded`` goes through the stock methods alone.

    Attributes:
        num_experts: of each MoE layer, over all ranks; 0 for a dense model.
        shards: whether FSDP2 is asked for.
    """

    _wrapped_model: Any

    def __init__(self, cfg: Any, task: Any, model: nn.Module, *rest: Any, **kwargs: Any) -> None:
        self.num_experts = next((layer.flags.moe_expert_count for layer in moe_layers(model)), 0)
        self.shards = cfg.distributed_training.ddp_backend == "fully_sharded" and parallel.world()[1] > 1
        self._suffix: str | None = None
        self._files: finding.Files | None = None
        if self.num_experts and cfg.common.fp16 and not cfg.common.memory_efficient_fp16:
            # One flat copy of all parameters would mix those of experts, which other ranks lack, with the rest.
            with open_dict(cfg):
                cfg.common.fp16_no_flatten_grads = True
        if cfg.common.profile or profiling.running():
            profiling.label(model)
        with fsdp.without_half(cfg) if self.shards and fsdp.casts(cfg) else nullcontext():
            super().__init__(cfg, task, model, *rest, **kwargs)

    @property
    def is_fsdp(self) -> bool:
        """Never fairscale's."""
        return False

    @property
    def spread(self) -> bool:
        """Whether ranks hold experts that others do not."""
        return self.num_experts > 0 and self.data_parallel_world_size > 1

    @property
    def model(self) -> Any:
        """The model in its wrapper."""
        if self._wrapped_model is None and self.use_distributed_wrapper and (self.shards or self.num_experts):
            groups = parallel.expert_groups(self.num_experts) if self.num_experts else parallel.ExpertGroups()
            wrap = fsdp.shard if self.shards else parallel.data_parallel
            self._wrapped_model = wrap(self.cfg, self._model, groups, self.device)
        return super().model

    def _build_optimizer(self) -> None:
        keeps_float32 = self.shards and fsdp.casts(self.cfg) and not self.cfg.common.amp
        with fsdp.scaling_only(self.cfg) if keeps_float32 else nullcontext():
            super()._build_optimizer()
        if self.num_experts or self.shards:
            parallel.count_experts_in_norm(self._optimizer, self._model)
        if self.shards:
            fsdp.load_whole_states(self._optimizer)

    def train_step(self, samples: Any, raise_oom: bool = False) -> Any:
        """As the stock one, which after an overflow would move a number to a GPU even with ``--cpu``."""
        with nullcontext() if self.cuda else _staying_on_cpu():
            return super().train_step(samples, raise_oom)

    # Checkpoints: see parts.py.

    @property
    def should_save_checkpoint_on_current_rank(self) -> bool:
        """Every rank has experts to save."""
        return self.spread or super().should_save_checkpoint_on_current_rank

    @property
    def always_call_state_dict_during_save_checkpoint(self) -> bool:
        """Sharded parameters are gathered with the help of every rank."""
        return self.shards or super().always_call_state_dict_during_save_checkpoint

    @property
    def checkpoint_suffix(self) -> str:
        """What stands before ``.pt`` in the names of this rank's files."""
        if self._suffix is not None:
            return self._suffix
        return f"-rank-{self.data_parallel_rank}" if self.spread else super().checkpoint_suffix

    @contextmanager
    def with_suffix(self, suffix: str) -> Iterator[None]:
        """Another one, for as long as fairseq's functions save or load something else than a rank's own file."""
        self._suffix = suffix
        try:
            yield
        finally:
            self._suffix = None

    @contextmanager
    def having_found(self, files: finding.Files | None) -> Iterator[None]:
        """What ``load_checkpoint`` is going to load, looked up already."""
        self._files = files
        try:
            yield
        finally:
            self._files = None

    def state_dict(self) -> dict[str, Any]:
        """Everything of this rank, tensors whole."""
        state = super().state_dict()
        if self.num_experts:
            state[parts.SAVED] = {"time": time.time()}
        if self.num_experts and state.get(parts.OPTIMIZER) is not None:
            state[parts.PARAMETERS] = checkpoints.parameter_names(self.optimizer, self._model, self._criterion)
        return fsdp.gathered(state, everything=self.data_parallel_rank == 0) if self.shards else state

    def save_checkpoint(self, filename: str, extra_state: dict[str, Any]) -> None:
        """Write the files of a checkpoint, on all ranks, which all have to ask: it is valid when this returns.

        Args:
            filename: any of its files'.
            extra_state: what fairseq adds.

        Raises:
            FlagError: on all ranks, if any could not write: then the checkpoint of before is still there.
        """
        if not self.spread:
            super().save_checkpoint(filename, extra_state)
            return
        if os.path.basename(filename) == "crash.pt":
            # From wherever this rank is, which the others need not be: nothing may be asked of them.
            logger.error(f"{filename} is not written: ranks that fail alone cannot save what all of them hold")
            return
        saved = parallel.from_first({"time": time.time(), "set": secrets.token_hex(8)})
        mine = parts.divided(self.state_dict())[: 2 if self.data_parallel_rank == 0 else 1]
        added = {"extra_state": {**mine[0]["extra_state"], **extra_state}, parts.SAVED: saved}
        saving.write(filename, self.data_parallel_rank, *(utils.move_to_cpu({**state, **added}) for state in mine))

    def load_checkpoint(self, filename: str, reset_optimizer: bool = False, *rest: Any, **options: Any) -> Any:
        """As the stock one, on every rank, from any number of files."""
        if not self.num_experts:
            return super().load_checkpoint(filename, reset_optimizer, *rest, **options)
        files = self._files
        if files is None or files.main != filename:
            files = checkpoints.find_together(filename, self.num_experts)
        if files is not None and not files.num_experts:
            raise FlagError(f"{files.main}: expected a checkpoint of {self.num_experts} experts, got a dense model's")
        if files is not None and not files.resumable and not reset_optimizer:
            raise FlagError(
                f"{files.main}: expected --reset-optimizer, or an optimizer's state that this package wrote, got one "
                "of the branch, which counts parameters otherwise"
            )
        checkpoint = self.cfg.checkpoint
        everywhere, checkpoint.load_checkpoint_on_all_dp_ranks = checkpoint.load_checkpoint_on_all_dp_ranks, True
        try:
            return super().load_checkpoint(filename if files is None else files.main, reset_optimizer, *rest, **options)
        finally:
            checkpoint.load_checkpoint_on_all_dp_ranks = everywhere


@contextmanager
def _staying_on_cpu() -> Iterator[None]:
    stock = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = stock  # type: ignore[method-assign]


def _as_the_branch_counts(record: logging.LogRecord) -> bool:
    """The two lines about a model's parameters in the branch's words, which scripts look for."""
    told = str(record.msg)
    if told.startswith(("num. shared model params:", "num. expert model params:")):
        told = re.sub(r"\d{4,}", lambda number: f"{int(number[0]):,}", told)
        record.msg = told.replace("num. shared", "num. non-expert")
    return True


def register() -> None:
    """Put the trainer where fairseq's programs look for theirs, and fairscale's wrapping nowhere; once."""
    ours = {"Trainer": MoETrainer, "fsdp_enable_wrap": lambda cfg: nullcontext(), "fsdp_wrap": lambda module: module}
    places = {"fairseq.trainer": ("Trainer",), "fairseq_cli.train": tuple(ours), "__main__": tuple(ours)}
    import fairseq_cli.train as program

    program.logger.addFilter(_as_the_branch_counts)  # added once, however often it is
    stock = program.main
    if not hasattr(stock, "of_dmoe"):

        @functools.wraps(stock)
        def main(cfg: Any) -> Any:
            with profiling.profiled(cfg.checkpoint.save_dir) if profiling.on_cpu else nullcontext():
                return stock(cfg)

        main.of_dmoe = True  # type: ignore[attr-defined]
        program.main = main
    for place, names in places.items():
        module = sys.modules[place]
        for name in names:
            held = getattr(module, name, None)
            if held is not None and getattr(held, "__module__", "").startswith("fairseq."):
                setattr(module, name, ours[name])
