"""What fairseq 0.12.2 (June 2022) needs to run on today's Python and PyTorch. The launcher applies it, nobody else.

=====================================================  ==========================  ===================================
what                                                   since                       needed until
=====================================================  ==========================  ===================================
``dataclasses.dataclass``: fairseq's (and hydra's)     Python 3.11                 fairseq declares them with
configs may be defaults of other configs                                           ``default_factory``
``torch.serialization.add_safe_globals``: what         torch 2.6                   fairseq loads with
fairseq pickles into checkpoints beside tensors                                    ``weights_only=False``
``numpy.compat``, ``numpy.int``, ``numpy.float``:      numpy 1.24 and 2.0          fairseq names Python's own
for the modules of fairseq that use them
``TransformerEncoderLayerBase``: by its own steps      torch 2.0                   fairseq says which kind of
in evaluation, not by torch's fused layer                                          mask it passes
``DistributedDataParallel``: no ``device_ids`` for     torch 1.1                   fairseq does not pass them for
a model on the CPU                                                                 ``--cpu``
... which waits for no gradient of the copies of       fairseq 0.12                fairseq keeps them as buffers
weights that encoder layers keep for the fused one
hydra's notices about old ways to call it: silent      hydra 1.1                   fairseq calls it the new way
=====================================================  ==========================  ===================================

fairseq 0.12.2 is the last release on PyPI; a later one makes :func:`apply` refuse, so that these are looked at again.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from types import SimpleNamespace
from typing import Any

SUPPORTED = "0.12.2"
_PACKAGES = ("fairseq", "fairseq_cli", "hydra", "omegaconf")


def apply() -> None:
    """Import fairseq with everything above in place; a second call does nothing.

    Raises:
        ImportError: fairseq is missing, or another version of it.
    """
    if getattr(apply, "done", False):
        return
    check_installed()
    _let_configs_be_defaults()
    warnings.filterwarnings("ignore", category=UserWarning, module="hydra")
    warnings.filterwarnings("ignore", "\\s*'config' is validated against ConfigStore", UserWarning)
    import fairseq  # noqa: F401

    _trust_checkpoint_types()
    _give_names_of_numpy_back()
    _keep_encoders_unfused()
    _let_ddp_run_on_cpu()
    apply.done = True  # type: ignore[attr-defined]


def check_installed() -> None:
    """Raise one clear ImportError unless the fairseq that this integration knows is installed."""
    try:
        found = metadata.version("fairseq")
    except metadata.PackageNotFoundError:
        found = None
    if found != SUPPORTED:
        have = "it is not installed" if found is None else f"found {found}"
        raise ImportError(
            f"dmoe.integrations.fairseq_moe needs the package fairseq, version {SUPPORTED}, but {have}; run `make "
            "fairseq` in dmoe's folder, or see the README for the two pip commands"
        )


def _let_configs_be_defaults() -> None:
    """Python 3.11 refuses unhashable defaults, and an eq-dataclass is unhashable: give such classes the identity hash.

    Only for these packages' own classes; ``default_factory`` would be cleaner, but fairseq reads ``field.default``.
    """
    if sys.version_info < (3, 11):
        return
    stock = dataclasses.dataclass

    def hashable_defaults(cls: type) -> None:
        for name in inspect.get_annotations(cls):
            default = cls.__dict__.get(name)
            if isinstance(default, dataclasses.Field):
                default = default.default
            kind = type(default)
            if dataclasses.is_dataclass(kind) and kind.__hash__ is None:
                kind.__hash__ = object.__hash__

    @functools.wraps(stock)
    def dataclass(cls: Any = None, /, **options: Any) -> Any:
        def decorate(cls: type) -> type:
            if cls.__module__.partition(".")[0] in _PACKAGES:
                hashable_defaults(cls)
            return stock(cls, **options)

        return decorate if cls is None else decorate(cls)

    dataclasses.dataclass = dataclass


def _trust_checkpoint_types() -> None:
    """torch.load reads weights only by default: name the harmless types that fairseq's checkpoints hold besides."""
    import argparse
    import collections
    import typing

    import numpy as np
    import torch
    from fairseq.distributed.utils import _TensorPlaceholder
    from numpy._core import multiarray
    from omegaconf import base, dictconfig, listconfig, nodes

    containers = [dictconfig.DictConfig, listconfig.ListConfig, base.ContainerMetadata, base.Metadata]
    leaves = [nodes.AnyNode, nodes.IntegerNode, nodes.FloatNode, nodes.StringNode, nodes.BooleanNode, nodes.EnumNode]
    plain = [typing.Any, dict, list, int, float, str, bool, tuple, set, collections.defaultdict, argparse.Namespace]
    # Meters of --eval-bleu and other scores are numpy's; its modules have had two names.
    made_by = [multiarray._reconstruct, multiarray.scalar]
    arrays = [(made, f"numpy.{core}.multiarray.{made.__name__}") for made in made_by for core in ("core", "_core")]
    kinds = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"}
    torch.serialization.add_safe_globals([*containers, *leaves, *plain, _TensorPlaceholder])
    torch.serialization.add_safe_globals([*arrays, np.ndarray, np.dtype, *kinds])


class _OlderNumpy:
    """numpy with the names for Python's own types that it once had."""

    compat = SimpleNamespace(long=int)
    int = int
    float = float

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("numpy"), name)


def _give_names_of_numpy_back() -> None:
    """To the modules that use them, and to nobody else: other packages ask numpy what it has."""
    for module in ("data.data_utils", "data.language_pair_dataset", "data.token_block_dataset"):
        importlib.import_module(f"fairseq.{module}").np = _OlderNumpy()  # type: ignore[attr-defined]
    importlib.import_module("fairseq.modules.dynamic_crf_layer").np = _OlderNumpy()  # type: ignore[attr-defined]


def _keep_encoders_unfused() -> None:
    """torch's fused layer takes other arguments since, and fairseq asks every layer whether it may go that way."""
    from fairseq.modules.transformer_layer import TransformerEncoderLayerBase

    TransformerEncoderLayerBase.can_use_fastpath = property(lambda layer: False, lambda layer, found: None)


@contextmanager
def unused_copies_aside(model: Any) -> Iterator[None]:
    """Hide from whoever looks for parameters to train the ones in encoder layers that nothing is computed with.

    Afterwards they are parameters again: optimizers and checkpoints have always counted them.
    """
    from fairseq.modules.transformer_layer import TransformerEncoderLayerBase

    names = [f"{of}_{kind}" for of in ("in_proj", "out_proj", "fc1", "fc2") for kind in ("weight", "bias")]
    layers = [module for module in model.modules() if isinstance(module, TransformerEncoderLayerBase)]
    held = [copied for layer in layers for name in names if (copied := getattr(layer, name, None)) is not None]
    aside = [copied for copied in held if copied.requires_grad]
    for copied in aside:
        copied.requires_grad_(False)
    try:
        yield
    finally:
        for copied in aside:
            copied.requires_grad_(True)


def _let_ddp_run_on_cpu() -> None:
    """fairseq passes ``device_ids`` also with ``--cpu``; torch refuses them for a model on the CPU."""
    from fairseq.models import distributed_fairseq_model as wrappers

    stock = wrappers.DistributedDataParallel

    @functools.wraps(stock, updated=())
    def data_parallel(module: Any, device_ids: Any = None, output_device: Any = None, **options: Any) -> Any:
        if next(module.parameters()).device.type == "cpu":
            device_ids = output_device = None
        with unused_copies_aside(module):
            return stock(module=module, device_ids=device_ids, output_device=output_device, **options)

    wrappers.DistributedDataParallel = data_parallel
