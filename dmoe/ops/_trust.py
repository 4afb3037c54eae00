"""Which kernels may run here: each proves itself once on this machine's GPU before it serves (:mod:`dmoe.certify`).

A :class:`Guard` stands before an operation's kernels. At the first call of a kind (dtypes, sizes of features, layout,
launch shape, options; not the number of tokens) it has the operation certified by another process, which a kernel may
crash or hang without harm; the verdict is kept in the user's cache folder, for every process on such a GPU. What is
refused runs as the composition that it replaces, and one warning says so.

``DMOE_CERTIFY=0`` trusts everything; ``full`` certifies anew, with more cases; 1 is the default.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

guards: dict[str, Guard] = {}  # by the operation's name
# Told by :mod:`dmoe.ops._verdicts`, which starts processes and reads files: certify(subjects, device) -> verdicts.
refused: dict[str, str] = {}  # what this process refuses, and why


class Subject(NamedTuple):
    """What is certified at once.

    Attributes:
        part: which checks, a name of :mod:`dmoe.certify.checks`.
        arguments: of the call that asks, in the form that the checks expect.
        extra: what else decides which binary runs, beside the arguments.
        kind: what decides instead of the arguments, where they hold lengths that do not.
    """

    part: str
    arguments: tuple[Any, ...]
    extra: tuple[Any, ...] = ()
    kind: tuple[Any, ...] | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for calls that run the same binaries."""
        return (self.part, *self.extra, *(map(kind_of, self.arguments) if self.kind is None else self.kind))


def kind_of(value: Any) -> Any:
    """What of an argument decides which binary runs. The first dimension is tokens, rows or experts."""
    if not isinstance(value, Tensor):
        return tuple(value) if isinstance(value, list) else value
    dense = value.is_contiguous()
    if not value.is_floating_point():
        return str(value.dtype), value.dim()
    aligned = value.data_ptr() % 16 == 0 if value.device.type != "meta" else True
    return str(value.dtype), tuple(value.shape[1:]), None if dense else value.stride(), aligned


def precision() -> str:
    """Whether float32 products may be tf32: another binary."""
    return str(torch.backends.cuda.matmul.fp32_precision)


def mode() -> str:
    """``DMOE_CERTIFY``: 0, 1 or full.

    Raises:
        ValueError: another value.
    """
    value = os.environ.get("DMOE_CERTIFY", "1")
    if value not in ("0", "1", "full"):
        raise ValueError(f"DMOE_CERTIFY: expected 0, 1 or full, got {value!r}")
    return value


def trusts(subjects: Sequence[Subject], name: str, arguments: Sequence[Any]) -> bool:
    """Whether the kernels may serve a call; has them certified if nobody has."""
    if mode() == "0" or not subjects:
        return True
    device = next(value.device for value in arguments if isinstance(value, Tensor))
    if device.type == "meta":  # nothing runs: see dmoe.ops.offline
        return True
    configs = sys.modules.get("dmoe.kernels.configs")
    known = _known.setdefault((device, 0 if configs is None else configs.generation), {})
    verdict = known.get(subjects[0].key)
    if verdict is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _warn_of_capture(name)
            return False
        verdict = _ask(subjects, device, known)
    return verdict == ""


def trusts_compiled(arguments: Sequence[Any]) -> bool:
    """The same for the operations of csrc/."""
    return trusts([Subject("compiled", ())], "an operation of csrc/", arguments)


def _ask(subjects: Sequence[Subject], device: torch.device, known: dict[tuple[Any, ...], str]) -> str:
    from dmoe.ops import _verdicts

    open_ones = [subject for subject in subjects if subject.key not in known]
    for subject, reason in zip(open_ones, _verdicts.certified(open_ones, device), strict=True):
        known[subject.key] = reason
        if reason:
            _warn_of_refusal(subject.part, reason, device)
    return known[subjects[0].key]


class Guard:
    """An operation's CUDA implementation: its kernels where they are trusted, else the composition."""

    def __init__(
        self,
        name: str,
        kernel: Callable[..., Any],
        composition: Callable[..., Any],
        subjects: Callable[..., Sequence[Subject]],
    ) -> None:
        """Put a guard before ``kernel``.

        Args:
            name: the operation's.
            kernel, composition: called with the operation's arguments.
            subjects: what a call with these arguments needs certified: its own subject first, then what is certified
                along with it because it will be needed soon; none where the call runs no kernel.
        """
        self.name, self.kernel, self.composition, self.subjects = name, kernel, composition, subjects
        guards[name] = self

    def __call__(self, *arguments: Any) -> Any:
        """Run the operation."""
        trusted = trusts(self.subjects(*arguments), self.name, arguments)
        return (self.kernel if trusted else self.composition)(*arguments)


def on_its_own_arguments(name: str, *, lengths: bool = False) -> Callable[..., Sequence[Subject]]:
    """Subjects of an operation that is certified on the very integers of the call that asks.

    Args:
        name: the operation's.
        lengths: its integers are lengths, which do not decide what runs; then only tensors do.
    """

    def subjects(*arguments: Any) -> Sequence[Subject]:
        kind = tuple(kind_of(value) for value in arguments if isinstance(value, Tensor)) if lengths else None
        return [Subject("again", (name, *arguments), (name,) if lengths else (), kind)]

    return subjects


# By device and state of the launch shapes: "" for what is trusted, else why it is not.
_known: dict[tuple[torch.device, int], dict[tuple[Any, ...], str]] = {}


def forget() -> None:
    """What this process knows; the files stay."""
    _known.clear()
    refused.clear()


def _warn_of_refusal(part: str, reason: str, device: torch.device) -> None:
    first = not refused
    refused[part] = reason
    if first:
        warnings.warn(
            f"dmoe: {part}: its kernels are not used on {device}: {reason}. PyTorch's own operations compute it "
            "instead: right, and slower. Please report it with the output of `python -m dmoe.certify`; dmoe.info() "
            "lists what else is refused",
            RuntimeWarning,
            stacklevel=5,
        )


def _warn_of_capture(name: str) -> None:
    warnings.warn(
        f"dmoe: {name}: a CUDA graph is being captured before its kernels were certified, so it holds PyTorch's own "
        "operations, which are slower: run the layer once, forward and backward, before capturing",
        RuntimeWarning,
        stacklevel=5,
    )
