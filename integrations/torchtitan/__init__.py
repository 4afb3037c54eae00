"""torchtitan's mixtures of experts on dmoe, by one line of its configuration.

::

    torchrun --nproc-per-node 8 -m torchtitan.train --module deepseek_v3 --config deepseek_v3_16b \\
        --override.imports dmoe.integrations.torchtitan.overrides.experts

The line is torchtitan's own way to exchange a component: router, expert bias, shared experts, names, meshes, optimizer
and checkpoints stay torchtitan's, and what lies between a token's choices and its sum is dmoe's. In Python it is
``use(config)``. Names are found when they are asked for; importing this needs torchtitan, and one that is supported.
"""

from __future__ import annotations

from dmoe.integrations.on_demand import on_demand
from dmoe.integrations.torchtitan.versions import check_version

check_version()

_HOME = {
    "DmoeRoutedExperts": "routed_experts",
    "DmoeSelectiveAC": "selective_ac",
    "fit_torch": "machine",
    "from_dmoe": "state_dicts",
    "moe_config": "layer_config",
    "run_on_cpu": "machine",
    "to_dmoe": "state_dicts",
    "use": "use",
}

__all__ = sorted(_HOME)

__getattr__, __dir__ = on_demand(__name__, _HOME)
