"""``--profile``: labels for each MoE layer and its parts, and a profile of an evaluation.

==========================================  =========================================================
label                                       covers
==========================================  =========================================================
``decoder.layers.1.moe_layer``              the whole MoE layer
``decoder.layers.1.moe_layer/gate``         logits, choice of experts, gate loss and statistics
``decoder.layers.1.moe_layer/dispatch``     rows to the ranks of their experts, twice: sent, and received
``decoder.layers.1.moe_layer/experts``      the experts' products
``decoder.layers.1.moe_layer/combine``      rows back, summed for each token
``decoder.layers.1.self_attn``              attention
==========================================  =========================================================

They are ``torch.autograd.profiler.record_function``: in NVTX ranges of ``train --profile`` on a GPU, as in the profile
that ``eval_lm --profile`` prints and writes.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import record_function

import dmoe
from dmoe.integrations.fairseq_moe import parallel

logger = logging.getLogger(__name__)
on_cpu = False  # `train --profile` without a GPU: see backends.settle
_running = False
_DISPATCH = {"start_dispatch": "dispatch", "finish_dispatch": "dispatch", "combine": "combine"}


def running() -> bool:
    """Whether :func:`profiled` is at work."""
    return _running


@contextmanager
def profiled(folder: str | None) -> Iterator[Any]:
    """Profile what runs inside; then the first rank logs what took longest, and every rank writes a trace.

    Args:
        folder: for ``profile-rank-N.json``, which chrome://tracing and Perfetto show; None: the current one.
    """
    global _running
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    _running = True
    try:
        with profile(activities=activities) as measured:
            yield measured
    finally:
        _running = False
    by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    logger.info("profile:\n" + measured.key_averages().table(sort_by=by, row_limit=40))
    path = os.path.join(folder or ".", f"profile-rank-{parallel.world()[0]}.json")
    measured.export_chrome_trace(path)
    logger.info(f"trace written to {path}")


def label(model: nn.Module) -> None:
    """Label every MoE layer of a model, its parts, and attention; a second call does nothing."""
    for name, module in model.named_modules():
        if name.endswith(("self_attn", "encoder_attn")):
            _label_calls(module, "forward", name)
        moe = getattr(module, "moe", None)
        if not isinstance(moe, dmoe.MoE):
            continue
        _label_calls(module, "forward", name)
        _label_calls(moe.router, "forward", f"{name}/gate")
        _label_calls(moe.experts, "forward", f"{name}/experts")
        for call, part in _DISPATCH.items():
            _label_calls(moe.dispatcher, call, f"{name}/{part}")


def _label_calls(owner: Any, method: str, text: str) -> None:
    stock = getattr(owner, method)
    if hasattr(stock, "labelled"):
        return

    @functools.wraps(stock)
    def labelled(*args: Any, **kwargs: Any) -> Any:
        with record_function(text):
            return stock(*args, **kwargs)

    labelled.labelled = True  # type: ignore[attr-defined]
    setattr(owner, method, labelled)
