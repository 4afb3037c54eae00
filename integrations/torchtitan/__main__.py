"""``python -m torchtitan.train`` on a released PyTorch, where torchtitan wants a nightly one, and on the CPU.

::

    torchrun --nproc-per-node 2 -m dmoe.integrations.torchtitan --module qwen3 --config qwen3_moe_debug ...

Its options are those of torchtitan.
"""

from __future__ import annotations

import torch

from dmoe.integrations.torchtitan.machine import fit_torch, run_on_cpu


def main() -> None:
    """Trains."""
    fit_torch()
    if not torch.accelerator.is_available():
        run_on_cpu()
    from torchtitan.train import main as train

    train()


if __name__ == "__main__":
    main()
