"""Products of many rows against float64 (`few_rows_cases` says how far they may be from it).

Run as a program it prints, as JSON, what is off: which kernels run is chosen once a process.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

from few_rows_cases import DTYPES, added, product, weight_gradient

# (rows, inner, columns): a tile and a panel of each level, one more and one less; sums of a piece of 256 numbers or
# pairs, of several, and of more than are packed at once; more rows than are.
SHAPES = (
    (34, 33, 50),
    (48, 256, 64),
    (49, 257, 65),
    (61, 511, 31 + 32),
    (133, 513, 70),
    (130, 65, 97),
    (40, 2049, 33),
    (700, 300, 40),
    (37, 5000, 41),
)


def faults() -> Iterator[str]:
    """Whatever is off, over all dtypes, shapes and both orders of the weight."""
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        found = {
            "columns": product(*shape, dtype, True),
            "rows": product(*shape, dtype, False),
            "columns added": added(*shape, dtype, True),
            "rows added": added(*shape, dtype, False),
            "gradient": weight_gradient(shape[1], shape[0], shape[2], dtype),
        }
        yield from (f"{k} {dtype} {shape}: {v:.2f}" for k, v in found.items() if not v <= 1)


if __name__ == "__main__":
    print(json.dumps(list(faults())))
