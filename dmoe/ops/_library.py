"""Where every operation of dmoe is declared: one schema, then who implements it.

Python defines each schema exactly once. ``csrc/`` only adds implementations (``STABLE_TORCH_LIBRARY_IMPL``), so the
package imports, traces and runs with or without the compiled library: where it has no kernel, the ``*_ref`` serves.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmoe.ops._trust import Guard, Subject, trusts_compiled

NAMESPACE = "dmoe"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _load_compiled() -> str | None:
    """Load ``dmoe/_C.so``; None when it is loaded, otherwise the reason why it is not."""
    path = Path(__file__).parent.parent / "_C.so"
    if not path.exists():
        return "csrc/ was not built when dmoe was installed"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


missing_reason: str | None = _load_compiled()
compiled: bool = missing_reason is None
backends: dict[str, dict[str, str]] = {}  # by operation and device: "C++", "CUDA C++", "Triton" or "reference"
triton_calls: dict[str, Callable[..., Any]] = {}  # by operation: what serves CUDA where that is Python
_library.define("cuda_archs() -> str")  # what csrc/build_info.cpp was built for


def cuda_archs() -> tuple[str, ...]:
    """GPU architectures that the compiled library holds kernels for, as ``("sm_80", "sm_90")``; empty without any."""
    return tuple(torch.ops.dmoe.cuda_archs().split()) if compiled else ()


@functools.cache
def has_triton() -> bool:
    """Whether the kernels can run here at all; looks, and does not import."""
    return importlib.util.find_spec("triton") is not None


def on_gpu(tensor: Tensor) -> bool:
    """Where an operation is a choice between functions: whether to take CUDA's; :mod:`dmoe.ops.offline` lies."""
    return tensor.is_cuda


@functools.cache
def _warn_once_without_compiled() -> None:
    """Say, once a process, that the reference operations run, what that costs and how to change it."""
    warnings.warn(
        f"dmoe runs on its plain-PyTorch reference operations ({missing_reason}): routing and the expert MLP are "
        "several times slower on the CPU. `python -c 'import dmoe; dmoe.info()'` names the command that builds them.",
        RuntimeWarning,
        stacklevel=3,
    )


def define(
    schema: str,
    reference: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    composition: Callable[..., Any] | None = None,
    subjects: Callable[..., Sequence[Subject]] | None = None,
    autocast: Callable[..., Any] | None = None,
    tags: Sequence[torch.Tag] = (),
) -> Any:
    """Declare ``dmoe::<schema>`` and return its overload packet's default overload.

    Args:
        schema: a torch.library schema, such as ``"sort(Tensor keys, int end_bit) -> (Tensor, Tensor)"``.
        reference: the plain-PyTorch meaning of the operation. It serves the CPU when ``csrc/`` is not built.
        fake: shapes and dtypes of the results, for tracing.
        cuda: a Python implementation for CUDA (Triton); None when ``csrc/`` has it, or the reference is to serve.
        composition: serves where ``cuda`` is not trusted, and devices that nobody wrote kernels for; the reference if
            None.
        subjects: what is certified before ``cuda`` may serve; see :class:`dmoe.ops._trust.Guard`.
        autocast: called as ``autocast(op, dtype, *args)`` with autocast off; None runs the operation on its inputs as
            they are, with autocast off inside: integer work, and arithmetic that chooses its own precision.
        tags: what PyTorch's compiler is told of the operation.
    """
    name = schema[: schema.index("(")]
    _library.define(schema, tags=tuple(tags))
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)

    composition = composition or reference
    _library.impl(name, composition, "CompositeExplicitAutograd")  # any other device
    served = {"CPU": "C++", "CUDA": "CUDA C++"}
    if not has_kernel(name, "CPU"):
        _library.impl(name, reference if compiled else _warning_first(reference), "CPU")
        served["CPU"] = "reference"
    if cuda is not None:
        guarded = cuda if subjects is None else Guard(name, cuda, composition, subjects)
        _library.impl(name, guarded if has_triton() else composition, "CUDA")
        served["CUDA"], triton_calls[name] = "Triton" if has_triton() else "PyTorch", cuda
    elif not has_kernel(name, "CUDA"):
        _library.impl(name, reference, "CUDA")
        served["CUDA"] = "reference"
    else:
        _put_on_probation(name, reference)
    backends[name] = served

    for device_type in ("cpu", "cuda"):
        _library.impl(name, _autocast_kernel(op, device_type, autocast), "Autocast" + device_type.upper())
    return op


probation: dict[str, Callable[..., Any]] = {}  # by operation of csrc/ for CUDA: its reference
_on_probation: list[torch.library.Library] = []  # holds what stands before them; empty once they are trusted


def _put_on_probation(name: str, reference: Callable[..., Any], key: str = "CUDA") -> None:
    """Have csrc/'s operations certified, all at once, before the first of them runs on a GPU.

    What stands before them is taken away when they are trusted, and then costs nothing; else their references serve.
    """
    probation[name] = reference
    if torch.version.cuda is None and key == "CUDA":  # nothing here can run them
        return
    if not _on_probation:
        _on_probation.append(torch.library.Library(NAMESPACE, "IMPL"))
    operation = getattr(getattr(torch.ops, NAMESPACE), name).default

    def first(*arguments: Any) -> Any:
        if not trusts_compiled(arguments):
            return reference(*arguments)
        while _on_probation:
            _on_probation.pop()._destroy()
        return operation(*arguments)

    with warnings.catch_warnings():  # PyTorch tells of every implementation that takes another's place
        warnings.simplefilter("ignore")
        _on_probation[0].impl(name, first, key, allow_override=True)


def has_kernel(name: str, device_key: str) -> bool:
    """Whether ``csrc/`` (or an earlier registration) implements an operation for ``CPU`` or ``CUDA``."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", device_key)


def _warning_first(reference: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(reference)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        _warn_once_without_compiled()
        return reference(*args, **kwargs)

    return on_cpu


def _autocast_kernel(op: Any, device_type: str, rule: Callable[..., Any] | None) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return op(*args, **kwargs) if rule is None else rule(op, dtype, *args, **kwargs)

    return kernel


def count_flops() -> None:
    """Give PyTorch's FLOP counter the formulas of :mod:`dmoe.ops.flops`, where it has been imported.

    Not at ``import dmoe``, because importing the counter loads Triton. What users call calls this first.
    """
    if not torch.compiler.is_compiling() and "torch.utils.flop_counter" in sys.modules:
        import dmoe.ops.flops  # noqa: F401


def register_autograd(op: Any, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Attach a gradient formula to an operation returned by :func:`define`.

    What ``torch.library.register_autograd`` does for operations without keyword-only arguments. Its own kernel asks
    the schema for its arguments once for each of them in every call, which copies them all: a fifth of a millisecond
    for the 26 of ``moe_mlp``, more than all else that Python does for one token.

    Args:
        op: the operation.
        backward: ``backward(ctx, *grads)``, the gradients of the arguments.
        setup_context: ``setup_context(ctx, inputs, output)``, given all arguments, those that have defaults too.
    """
    # The dispatcher leaves out what is equal to its default, at the end.
    defaults = tuple(argument.default_value for argument in op._schema.arguments)

    def forward(ctx: Any, *inputs: Any) -> Any:
        *arguments, keys = inputs
        with torch._C._AutoDispatchBelowAutograd():
            result = op.redispatch(keys, *arguments)
        setup_context(ctx, (*arguments, *defaults[len(arguments) :]), result)
        return result

    def differentiate(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad
        ctx.needs_input_grad = needed[:-1]  # the keys are no argument
        try:
            result = backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = needed
        return (*result, None) if isinstance(result, tuple) else (result, None)

    # A class of its own, with the name under which its node appears in a graph.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    function: Any = type(f"{NAMESPACE}_{op._opname}", (torch.autograd.Function,), methods)

    def kernel(keys: Any, *arguments: Any) -> Any:
        below = keys & torch._C._after_autograd_keyset
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return function.apply(*arguments, below)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(below, *arguments)

    _library.impl(op._opname, kernel, "Autograd", with_keyset=True)


def refuse_double_backward(op: Any) -> None:
    """Make differentiating a backward operation one clear sentence instead of a missing-kernel error."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{op}: double backward is not supported (a gradient of a gradient, e.g. create_graph=True, was asked "
            "for); use MoEConfig(backend='reference') where second derivatives are needed"
        )

    register_autograd(op, refuse, lambda ctx, inputs, output: None)
