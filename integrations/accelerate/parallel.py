"""Experts over an Accelerator's ranks by one call: :func:`parallelize`."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

import dmoe
from dmoe.integrations.accelerate.accelerator import teach
from dmoe.parallel import fully_shard_experts

MESH_DIMS = ("replicas", "ep")


def parallelize(accelerator: Any, model: nn.Module, *, ep: int = 1) -> nn.Module:
    """Spread the experts of a model over an Accelerator's ranks; the rest is left to ``accelerator.prepare``.

    ::

        accelerator = Accelerator(gradient_accumulation_steps=2)
        model = parallelize(accelerator, model, ep=4)
        optimizer = AdamW([{"params": group} for group in dmoe.parallel.split_parameters(model)], lr=1e-3)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for x in loader:
            with accelerator.accumulate(model):
                loss = model(x).square().mean() + dmoe.aux_loss(model)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    A step equals that of one process on the batches of all ranks. The Accelerator wraps what is no expert as ever, in
    DDP, or by FSDP2 with ``FullyShardedDataParallelPlugin(fsdp_version=2)``; ``clip_grad_norm_`` and
    ``clip_grad_value_`` count experts right, a grad scaler decides alike on all ranks, ``get_state_dict`` gathers
    experts, and ``save_state`` writes a folder that ``load_state`` reads on any number of ranks. See :func:`teach`.

    Args:
        accelerator: of one process or several; it has prepared nothing yet.
        model: built as for one process, with values that are alike on all ranks; it is changed.
        ep: ranks that share the experts of each layer, a divisor of all ranks.

    Returns:
        The model, on the Accelerator's device. Optimizers are made after this.

    Raises:
        TypeError: no Accelerator.
        ValueError: ``ep`` that does not divide the ranks; an Accelerator that :func:`teach` refuses, or whose plugin
            loads weights on the first rank alone (``cpu_ram_efficient_loading``).
    """
    ranks = accelerator.num_processes if hasattr(accelerator, "num_processes") else 1
    if isinstance(ep, bool) or not isinstance(ep, int) or ep < 1 or ranks % ep:
        raise ValueError(f"parallelize: ep: expected a divisor of the {ranks} ranks of the Accelerator, got {ep!r}")
    teach(accelerator)
    model.to(accelerator.device)
    if not dist.is_initialized():
        return model
    from torch.distributed.device_mesh import init_device_mesh

    plugin = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    if plugin is not None and plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "parallelize: accelerator: expected an FSDP plugin with cpu_ram_efficient_loading=False, as every rank has "
            "experts of its own, got True"
        )
    mesh = init_device_mesh(accelerator.device.type, (ranks // ep, ep), mesh_dim_names=MESH_DIMS)
    accelerator.expert_mesh = mesh
    dmoe.parallel.parallelize(model, mesh, data=None)
    if plugin is not None:
        fully_shard_experts(model, mesh["replicas"], **_options_of(plugin))
    return model


def _options_of(plugin: Any) -> dict[str, Any]:
    """Of ``fully_shard``, as Accelerate gives them."""
    options = {
        "reshard_after_forward": plugin.reshard_after_forward,
        "mp_policy": plugin.mixed_precision_policy,
        "offload_policy": plugin.cpu_offload,
    }
    return {name: value for name, value in options.items() if value is not None}
