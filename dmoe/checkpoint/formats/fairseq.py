"""fairseq's MoE branch: ``X-rank-0.pt``, ``X-rank-1.pt``, ... with the experts, beside ``X-shared.pt`` with the rest.

``experts.{i}`` counts the experts of a rank, rank after rank. With more ranks than experts each rank has a copy of
expert ``r mod E``. A run on one rank writes ``X.pt`` with everything.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmoe.checkpoint.formats.rank_files import RankFiles
from dmoe.checkpoint.layers import Layout, Row
from dmoe.config import MoEConfig
from dmoe.presets import get

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "swish": "silu"}
_PART = re.compile(r"-rank-\d+(?=\.pt$)")
GATE = "gate.wg.weight"
EXPERTS = {"fc1.weight": "up_proj", "fc1.bias": "up_bias", "fc2.weight": "down_proj", "fc2.bias": "down_bias"}
BRANCH = Layout(
    "fairseq",
    (
        Row("router.weight", (GATE,)),
        *(
            Row(ours.removesuffix("_proj"), (f"experts.{{e}}.{name}",), gated=False if ours == "up_proj" else None)
            for name, ours in EXPERTS.items()
        ),
    ),
    slices_first=False,
    replicated=True,
)


def _shared_file(path: Path) -> Path | None:
    return path.with_name(_PART.sub("-shared", path.name)) if _PART.search(path.name) else None


def _config(beside: Mapping[str, Any], **facts: Any) -> MoEConfig:
    """What the flags of the training say, in ``cfg`` or ``args``; else the branch's defaults."""
    cfg = beside.get("cfg")
    said = cfg.get("model") if isinstance(cfg, Mapping) else beside.get("args")
    flags = vars(said) if isinstance(said, Namespace) else said if isinstance(said, Mapping) else {}
    told: dict[str, Any] = {}
    if (name := flags.get("activation_fn")) in _ACTIVATIONS:
        told["activation"] = _ACTIVATIONS[name]
    if flags.get("moe_top1_expert"):
        told |= {"top_k": 1, "gate_normalization": None, "normalize_when": "before_drop"}
    elif flags.get("moe_normalize_gate_prob_before_dropping"):
        told["normalize_when"] = "before_drop"
    share = flags.get("moe_eval_capacity_token_fraction")
    if isinstance(share, float | int):
        told["eval_capacity_fraction"] = share if share > 0 else None
    return get("nllb", **{**told, **facts})


FAIRSEQ = RankFiles(
    "fairseq",
    "fairseq's MoE branch: X-rank-0.pt, ... beside X-shared.pt, or X.pt",
    (BRANCH,),
    _config,
    shared_file=_shared_file,
    rank_file=lambda target, rank: target.with_name(f"{target.name.removesuffix('.pt')}-rank-{rank}.pt"),
    container="model",
)
