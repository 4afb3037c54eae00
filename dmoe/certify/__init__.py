"""Kernels earn trust on the user's own GPU: ``python -m dmoe.certify``, and before an operation's first use.

What happens at a first use. An operation meets a kind of call that nobody has certified on such a machine (dtypes,
sizes of features, layout, options, launch shape). A process of its own draws a small problem of that kind: an empty
expert whose weights are NaN, one with more than two tiles, rows of no token, a tail that fills no tile, outputs that
begin as NaN, a token that is NaN and goes nowhere. It compiles the kernels on all cores, runs them twice (equal bits),
and holds them to four times the error of PyTorch's own operations against float64, row by row, plus 8 ulp. Where memory
allows, the experts' kernels run once more on rows and tokens that lie beyond 2**31 numbers, which must give the same
bits. A kernel that is wrong, raises, does not compile, hangs for three minutes or takes its process down is not used:
PyTorch's own operations serve instead, and one warning says so and what to report.

When. At the first call outside of a CUDA graph's capture; never inside one (the graph would then hold PyTorch's own
operations, and a warning says so). A compiled layer's operations are called by the compiled code as by eager one, so
there it is the first call too. What it costs: a process that starts (about 4 s) and runs (about 1 s); what it compiles,
at most 17 kernels for a layer that trains, would be compiled now anyway, one after the other, and is found in Triton's
cache afterwards. The verdict is kept for this GPU, driver, torch, Triton and these sources in ``~/.cache/dmoe``
(``DMOE_CACHE_DIR``): the next process pays nothing. Nothing of this happens on the CPU.

``DMOE_CERTIFY=0`` trusts all kernels unseen; ``DMOE_CERTIFY=full`` certifies with three draws instead of one.
"""

from dmoe.certify.checks import PARTS, certify

__all__ = ["PARTS", "certify"]
