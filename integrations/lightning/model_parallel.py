"""FSDP2 of Lightning's Trainer, on a mesh of replicas by ranks that share experts."""

from __future__ import annotations

from dmoe.integrations.lightning.expert_parallel import ExpertParallel
from dmoe.integrations.lightning.package import pl


class MoEModelParallelStrategy(ExpertParallel, pl.strategies.ModelParallelStrategy):
    """``ModelParallelStrategy`` (FSDP2) for models with :class:`dmoe.MoE` layers, whose experts share ``ep`` ranks.

    As with Lightning's own, the module says in ``configure_model`` how it is spread::

        def configure_model(self):
            dmoe.parallel.parallelize(self.net, self.device_mesh)  # experts over "ep", the rest by fully_shard

        trainer = Trainer(devices=8, strategy=MoEModelParallelStrategy(ep=4), gradient_clip_val=1.0)

    (``self.net``, and not ``self``: FSDP2 gathers parameters where a module's ``forward`` is called, and ``Trainer``
    calls ``training_step``.) Clipping and grad scalers are those of :class:`MoEDDPStrategy`, checkpoints Lightning's.

    Args:
        ep: ranks that share the experts of each layer, a divisor of all ranks.
        **options: of ``ModelParallelStrategy`` but for its sizes, as ``save_distributed_checkpoint``.

    Attributes:
        device_mesh: of all ranks, ("replicas", "ep"); the module has it as ``self.device_mesh``.

    Raises:
        ValueError: ``ep`` is no integer above 0, or, when the Trainer starts, does not divide the ranks.
    """

    def setup_environment(self) -> None:
        """Lightning's, and then this mesh instead of that of tensor parallelism."""
        super().setup_environment()
        self._device_mesh = self.lightning_module._device_mesh = self.make_mesh()
