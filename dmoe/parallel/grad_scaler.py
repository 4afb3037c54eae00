"""A gradient scaler whose ranks decide together: all skip a step and halve the scale, or none does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.expert_slice import local_part
from dmoe.parallel.collectives import all_reduce

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` for models whose gradients differ between ranks, as those of experts do.

    An expert that overflows does so on the ranks that hold it. Alone they would skip their step and halve their scale,
    and what every rank has (router, attention) would be another from then on. Parameters may be ``DTensor`` and plain
    tensors side by side, which PyTorch's scaler refuses ("got mixed torch.Tensor and DTensor").

    Args:
        device: as for ``torch.amp.GradScaler``.
        process_group: all ranks that train the model; None is all ranks. Each of them makes the same calls.
        **options: as for ``torch.amp.GradScaler``.

    The host waits where it waits on one rank, in ``step``; the ranks exchange one number for each optimizer.
    """

    def __init__(self, device: str = "cuda", *, process_group: ProcessGroup | None = None, **options: Any) -> None:
        super().__init__(device, **options)
        self.process_group = process_group

    @classmethod
    def like(cls, scaler: torch.amp.GradScaler, *, process_group: ProcessGroup | None = None) -> GradScaler:
        """One with the settings and the present scale of another, for frameworks that have made theirs already.

        Args:
            scaler: of any kind; it is left alone.
            process_group: see the class.
        """
        made = cls(scaler._device, process_group=process_group, enabled=scaler.is_enabled())
        made.load_state_dict(scaler.state_dict())
        return made

    def _unscale_grads_(self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> Any:
        """What PyTorch's does, on the parts that lie here; then what was found anywhere was found everywhere."""
        here = super()._unscale_grads_(_LocalParts(optimizer), inv_scale, found_inf, allow_fp16)  # type: ignore[arg-type]
        here.setdefault(found_inf.device, found_inf)  # also with no gradient at all: others wait for this rank
        if dist.is_initialized() and dist.get_world_size(self.process_group) > 1:
            anywhere = torch.stack([found.to(found_inf.device) for found in here.values()]).max()
            all_reduce(anywhere, "overflows", self.process_group, op=dist.ReduceOp.MAX)
            for found in here.values():
                found.copy_(anywhere)
        return here


class _LocalParts:
    """An optimizer's parameters as the parts that lie on this rank, with their gradients."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.param_groups = [
            {"params": [_local_leaf(parameter) for parameter in group["params"]]} for group in optimizer.param_groups
        ]


@torch.no_grad()
def _local_leaf(parameter: Tensor) -> Tensor:
    if parameter.grad is None or not hasattr(parameter.grad, "to_local"):
        return parameter
    grad = local_part(parameter.grad)
    leaf = grad.detach()  # only its ``grad`` is looked at
    leaf.grad = grad
    return leaf
