"""MegaBlocks' imports, moved by one substitution; every package of dmoe is installed."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from dmoe.compat import megablocks

ROOT = Path(__file__).resolve().parents[2]


IMPORTS = """
import megablocks.ops as ops
from megablocks import Arguments, MoE, dMoE, ops, grouped_gemm_util as gg
from megablocks import ParallelMLP, ParallelDroplessMLP, SparseMLP, MLP, SparseGLU, get_load_balancing_loss
from megablocks.layers import common, mpu
from megablocks.layers.arguments import Arguments, DEFAULT_ACTIVATION_FN, InitFn, from_megatron
from megablocks.layers.moe import MoE, ParallelMLP, save_load_balancing_loss, get_load_balancing_loss
from megablocks.layers.moe import clear_load_balancing_loss, batched_load_balancing_loss
from megablocks.layers.dmoe import dMoE, ParallelDroplessMLP
from megablocks.layers.router import LearnedRouter, batched_router_zloss, clear_router_zloss
from megablocks.layers.mlp import MLP, SparseMLP, GroupedMLP, SharedMLP
from megablocks.layers.glu import SparseGLU, GroupedGLU, SharedGLU
from megablocks.grouped_gemm_util import backend, ops as gg_ops
from megablocks.ops import sort, histogram, inclusive_cumsum, exclusive_cumsum, replicate, topology, gather, scatter
from megablocks.ops import padded_gather, padded_scatter, binned_gather, binned_scatter, repeat, round_up, sum
"""


def test_one_substitution_moves_a_users_imports():
    exec(IMPORTS.replace("megablocks", "dmoe.compat.megablocks"), {})
    exec(
        "import grouped_gemm.ops\nfrom grouped_gemm import backend".replace("grouped_gemm", "dmoe.compat.grouped_gemm")
    )
    for module in (megablocks, megablocks.ops, importlib.import_module("dmoe.compat.megablocks.layers")):
        assert all(hasattr(module, name) for name in module.__all__)


def _inits(top):
    return (ROOT / top).rglob("__init__.py")


def test_every_package_is_installed():
    folders = [path.parent.relative_to(ROOT).parts for top in ("dmoe", "integrations") for path in _inits(top)]
    packages = {".".join(parts if parts[0] == "dmoe" else ("dmoe", *parts)) for parts in folders}
    assert set(re.findall(r'^  "(dmoe[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)) == packages
