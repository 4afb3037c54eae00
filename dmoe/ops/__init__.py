"""The operations, one per file, each with its plain-PyTorch ``*_ref`` beside it."""

from dmoe.ops import products
from dmoe.ops.balanced_assignment import balanced_assignment
from dmoe.ops.block_sparse import block_dds, block_dsd, block_sdd
from dmoe.ops.cumsum import exclusive_cumsum, inclusive_cumsum
from dmoe.ops.gate_weights import gate_weights
from dmoe.ops.grouped_gemm import grouped_gemm, grouped_gemm_weight
from dmoe.ops.histogram import histogram
from dmoe.ops.permute import permute, unpermute
from dmoe.ops.replicate import replicate
from dmoe.ops.router_logits import router_logits
from dmoe.ops.router_scores import router_scores
from dmoe.ops.router_top_k import router_top_k
from dmoe.ops.routing_plan import routing_plan
from dmoe.ops.sinkhorn import sinkhorn
from dmoe.ops.sort import sort
from dmoe.ops.stk_matrix import dds, dsd, sdd, sparse_matrix
from dmoe.ops.tile_table import tile_table
from dmoe.ops.topk_indices import topk_indices
from dmoe.ops.topology import BlockTopology, expert_topology, topology

__all__ = [
    "BlockTopology",
    "balanced_assignment",
    "block_dds",
    "block_dsd",
    "block_sdd",
    "dds",
    "dsd",
    "exclusive_cumsum",
    "expert_topology",
    "gate_weights",
    "grouped_gemm",
    "grouped_gemm_weight",
    "histogram",
    "inclusive_cumsum",
    "permute",
    "products",
    "replicate",
    "router_logits",
    "router_scores",
    "router_top_k",
    "routing_plan",
    "sdd",
    "sinkhorn",
    "sort",
    "sparse_matrix",
    "tile_table",
    "topk_indices",
    "topology",
    "unpermute",
]
