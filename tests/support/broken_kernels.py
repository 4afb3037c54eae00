"""The process that certifies, with a kernel broken on purpose: ``python broken_kernels.py HOW``, its own arguments."""

from __future__ import annotations

import os
import signal
import sys
import threading


def _launch(change):
    """Replace the launches of the expert MLP's kernels."""
    import dmoe.kernels.moe_mlp
    import dmoe.kernels.moe_mlp_rows  # noqa: F401
    from dmoe.kernels import _launch, offline

    original = _launch.launch
    offline.swap(original, lambda kernel, grid, *rest, **options: change(original, kernel, grid, rest, options))


def sign():
    """The down projection's result is negated."""

    def change(launch, kernel, grid, arguments, options):
        launch(kernel, grid, *arguments, **options)
        if kernel.__name__ == "rows_kernel":
            arguments[kernel.arg_names.index("out")].neg_()

    _launch(change)


def tail():
    """The up projection does not mask an expert's last tile: it stores over the next expert's rows."""

    def change(launch, kernel, grid, arguments, options):
        if kernel.__name__ == "up_kernel":
            place = kernel.arg_names.index("expert_offsets")
            offsets = arguments[place].clone()
            offsets[1:-1] += 16
            arguments = (*arguments[:place], offsets, *arguments[place + 1 :])
        launch(kernel, grid, *arguments, **options)

    _launch(change)


def shape():
    """One program too few for the weight gradients."""

    def change(launch, kernel, grid, arguments, options):
        grid = (grid[0] - 1,) if kernel.__name__ == "weight_grad_kernel" else grid
        launch(kernel, grid, *arguments, **options)

    _launch(change)


def exception():
    """The compiler gives up."""

    def change(launch, kernel, grid, arguments, options):
        raise RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448")

    _launch(change)


def hang():
    """A kernel never ends."""

    def change(launch, kernel, grid, arguments, options):
        threading.Event().wait()

    _launch(change)


def crash():
    """A kernel takes the process down."""

    def change(launch, kernel, grid, arguments, options):
        os.kill(os.getpid(), signal.SIGSEGV)

    _launch(change)


def luck():
    """Right, but other bits in every run."""
    count = [0]

    def change(launch, kernel, grid, arguments, options):
        launch(kernel, grid, *arguments, **options)
        if kernel.__name__ == "combine_kernel":
            count[0] += 1
            arguments[kernel.arg_names.index("out")].view(-1)[-1] *= 1 + 2e-7 * count[0]

    _launch(change)


def sound():
    """Nothing is broken."""


if __name__ == "__main__":
    how = sys.argv.pop(1)
    globals()[how]()
    from dmoe.certify.__main__ import main
    from dmoe.ops import _verdicts

    _verdicts.SERVER = [sys.executable, __file__, how, "--serve"]
    sys.exit(main(sys.argv[1:]))
