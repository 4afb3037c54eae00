"""DDP of Lightning's Trainer, with the experts of MoE layers spread over ranks."""

from __future__ import annotations

from typing import Any

from torch import nn

from dmoe.integrations.lightning.checkpoints import ShardedCheckpoints
from dmoe.integrations.lightning.expert_parallel import ExpertParallel
from dmoe.integrations.lightning.package import pl
from dmoe.parallel import data_parallel, exclude_experts, parallelize


class MoEDDPStrategy(ShardedCheckpoints, ExpertParallel, pl.strategies.DDPStrategy):
    """``DDPStrategy`` for models with :class:`dmoe.MoE` layers, whose experts are spread over ``ep`` ranks.

    ::

        trainer = Trainer(devices=8, strategy=MoEDDPStrategy(ep=4), gradient_clip_val=1.0)
        trainer.fit(module)  # layers built as for one process

    Each rank has batches of its own. Everything but the experts is averaged over all ranks as ever; an expert's
    gradients cover the tokens of its ``ep`` ranks and are averaged over those that hold it, too. ``gradient_clip_val``
    clips by the norm of the whole model, every expert counted once; a grad scaler decides alike on all ranks; a
    checkpoint is a folder that any number of ranks resumes from.

    Layers of a :class:`LightningModule` are spread when the Trainer sets up, from values that have to be alike on all
    ranks (``seed_everything``); those that are built with ``ep_group=self.device_mesh["ep"]``, in ``configure_model``,
    are left as they are.

    Args:
        ep: ranks that share the experts of each layer, a divisor of all ranks.
        **options: of ``DDPStrategy``, those of ``DistributedDataParallel`` among them.

    Attributes:
        device_mesh: of all ranks, ("replicas", "ep"); the module has it as ``self.device_mesh``.

    Raises:
        ValueError: ``ep`` is no integer above 0, or, when the Trainer starts, does not divide the ranks.
    """

    def setup_environment(self) -> None:
        """Lightning's, and then the mesh."""
        super().setup_environment()
        self.device_mesh = self.lightning_module._device_mesh = self.make_mesh()

    def setup(self, trainer: Any) -> None:
        """Spread the experts; then Lightning's."""
        module = self.lightning_module
        parallelize(module, self.device_mesh, data=None)
        exclude_experts(module)  # where nothing is trained, Lightning copies the first rank's values without a wrapper
        super().setup(trainer)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return data_parallel(
            model,
            expert_replicas=self.device_mesh["replicas"].get_group(),
            device_ids=self.determine_ddp_device_ids(),
            **self._ddp_kwargs,
        )
