"""What strategies for experts on several ranks share: the mesh, the ranks' data, clipping, and loss scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dmoe.parallel import GradScaler, clip_grad_norm, clip_grad_value

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

MESH_DIMS = ("replicas", "ep")


class ExpertParallel:
    """Comes before a strategy of Lightning among the bases of a class.

    Args:
        ep: ranks that share the experts of each layer, a divisor of all ranks.
        **options: of Lightning's strategy.

    Raises:
        ValueError: ``ep`` is no integer above 0.
    """

    device_mesh: DeviceMesh

    def __init__(self, ep: int, **options: Any) -> None:
        if isinstance(ep, bool) or not isinstance(ep, int) or ep < 1:
            raise ValueError(f"{type(self).__name__}: ep: expected an integer of at least 1, got {ep!r}")
        super().__init__(**options)
        self.ep = ep

    def make_mesh(self) -> DeviceMesh:
        """All ranks as a mesh of ("replicas", "ep"), once there is a process group.

        Raises:
            ValueError: ``ep`` does not divide the ranks.
        """
        from torch.distributed.device_mesh import init_device_mesh

        me: Any = self
        ranks = dist.get_world_size()
        if ranks % self.ep:
            raise ValueError(
                f"{type(self).__name__}: ep: expected a divisor of the {ranks} ranks (devices * num_nodes), got "
                f"{self.ep}"
            )
        return init_device_mesh(me.root_device.type, (ranks // self.ep, self.ep), mesh_dim_names=MESH_DIMS)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Every rank has samples of its own, those that share experts too."""
        return {"num_replicas": dist.get_world_size(), "rank": dist.get_rank()}

    def setup_precision_plugin(self) -> None:
        """Lightning's, whose clipping and scaler then know that gradients differ between ranks."""
        me: Any = self
        me.precision_plugin.clip_grad_by_norm = self._clip_by_norm
        me.precision_plugin.clip_grad_by_value = self._clip_by_value
        scaler = getattr(me.precision_plugin, "scaler", None)
        if isinstance(scaler, torch.amp.GradScaler) and not isinstance(scaler, GradScaler):
            me.precision_plugin.scaler = GradScaler.like(scaler)
        super().setup_precision_plugin()  # type: ignore[misc]

    def _clip_by_norm(self, optimizer: Any, clip_val: float) -> None:
        me: Any = self
        clip_grad_norm(me.lightning_module, clip_val, parameters=me.precision_plugin.main_params(optimizer))

    def _clip_by_value(self, optimizer: Any, clip_val: float) -> None:
        me: Any = self
        clip_grad_value(me.precision_plugin.main_params(optimizer), clip_val)
