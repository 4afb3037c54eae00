"""Where a row's bits may not depend on its batch: what cannot promise it says so, instead of computing otherwise.

The promise is made by :file:`csrc/` on the CPU (``multiply_by_row()``). On CUDA the kernels' tiles have as many rows as
the number of all rows suggests (:mod:`dmoe.ops.tile_table`, :mod:`dmoe.kernels.configs`), and products of other tiles
may be added up in another order: nothing is promised there, so nothing is computed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def refuse(*arguments: Any, **_: Any) -> Any:
    """Stands where no implementation keeps the promise.

    Raises:
        NotImplementedError: always.
    """
    devices = {str(value.device) for value in arguments if isinstance(value, Tensor)}
    raise NotImplementedError(
        "batch_invariant: expected CPU tensors and dmoe's compiled CPU kernels, which alone promise it, got tensors on "
        f"{', '.join(sorted(devices))} (`python -c 'import dmoe; dmoe.info()'` says what is built)"
    )
