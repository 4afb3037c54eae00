"""How tests start DeepSpeed: compiling nothing."""

from __future__ import annotations

import sys


def without_compiling() -> None:
    """Import DeepSpeed, and leave out what it would compile, or look for."""
    sys.modules["fairseq"] = None  # type: ignore[assignment]  # it looks for that, and not every Python can import it
    import deepspeed  # noqa: F401
    from deepspeed.comm.torch import TorchBackend

    # Shared memory between ranks, which it would compile first. By its globals: `deepspeed.comm.torch` is PyTorch.
    TorchBackend.__init__.__globals__["build_shm_op"] = lambda: None
