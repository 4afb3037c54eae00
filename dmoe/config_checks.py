"""What a config's options have to be, alone and together: each bad value is named, with what was expected."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dmoe.activation_functions import name_of
from dmoe.router_family import check_types, require

if TYPE_CHECKING:
    from dmoe.config import MoEConfig


def check_config(c: MoEConfig) -> None:
    """Check every option of a config; what its router's family minds is :meth:`RouterFamily.check`'s.

    Raises:
        ValueError: naming the field, what was expected and what it is.
    """
    check_types(c, "MoEConfig", skip=("activation", "ffn_hidden_size", "losses", "router", "token_groups"))
    _check_experts(c)
    _check_router(c)
    _check_capacity(c)
    _check_losses(c)
    if c.batch_invariant:
        _check_invariant(c)


def _require(c: MoEConfig, condition: bool, field: str, allowed: str) -> None:
    require("MoEConfig", c, condition, field, allowed)


def _check_experts(c: MoEConfig) -> None:
    for name in ("hidden_size", "num_experts", "top_k", "num_moe_layers", "num_groups", "overlap_degree"):
        _require(c, getattr(c, name) >= 1, name, "at least 1")
    if isinstance(c.ffn_hidden_size, tuple):
        whole = all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in c.ffn_hidden_size)
        _require(
            c,
            whole and len(c.ffn_hidden_size) == c.num_experts,
            "ffn_hidden_size",
            f"num_experts = {c.num_experts} widths of at least 1",
        )
    else:
        size = c.ffn_hidden_size
        whole = isinstance(size, int) and not isinstance(size, bool) and size >= 1
        _require(c, whole, "ffn_hidden_size", "an integer of at least 1, or a list")
    whole_blocks = all(size % 16 == 0 for size in c.ffn_sizes)
    _require(
        c,
        c.backend != "block_sparse" or whole_blocks,
        "ffn_hidden_size",
        "multiples of 16 with backend='block_sparse'",
    )
    _require(c, c.top_k <= c.num_experts, "top_k", f"at most num_experts = {c.num_experts}")
    for name in ("activation_dropout", "expert_dropout", "input_jitter"):
        _require(c, 0 <= getattr(c, name) < 1, name, "0 <= p < 1")
    shared = c.shared_ffn_hidden_size
    _require(c, shared is None or shared >= 1, "shared_ffn_hidden_size", "at least 1, or None")
    _require(
        c,
        not c.shared_expert_gate or shared is not None,
        "shared_expert_gate",
        "False without shared_ffn_hidden_size",
    )
    for name in ("expert_compute", "saved_activations"):
        if getattr(c, name) is None:
            continue
        allowed = f"None with backend={c.backend!r}, which computes in the dtype of x"
        _require(c, c.backend not in ("block_sparse", "reference"), name, allowed)
        _require(c, not c.accumulate_main_grad, "accumulate_main_grad", f"False with {name}={getattr(c, name)!r}")
    if c.backend in ("block_sparse", "reference"):
        for name in ("accumulate_main_grad", "recompute_pre_activation"):
            allowed = f"False with backend={c.backend!r}, whose backward has no such option"
            _require(c, not getattr(c, name), name, allowed)
    if callable(c.activation):
        why = f"with the function {name_of(c.activation)} as activation"
        _require(c, c.backend != "block_sparse", "backend", f"None, 'grouped', 'torch' or 'reference' {why}")
        _require(c, not c.accumulate_main_grad, "accumulate_main_grad", f"False {why}")
    _require(c, not c.return_bias or c.bias == "output", "return_bias", "False unless bias='output'")
    _require(c, c.init_std is None or c.init_std >= 0, "init_std", "at least 0, or None")
    by_name = c.init == "linear" or c.init_std is None
    _require(c, by_name, "init", f"'linear' when init_std = {c.init_std} is given")
    frozen = c.frozen_down_bias and c.bias != "expert"
    _require(c, not frozen, "frozen_down_bias", "False without bias='expert'")


def _check_router(c: MoEConfig) -> None:
    leaks = c.family.looks_ahead and c.causal and not c.allow_future_leak
    if leaks:
        raise ValueError(
            "MoEConfig: router: expected 'top_k' in a causal model, because where a token goes depends on later "
            "ones here; pass causal=False for an encoder, or allow_future_leak=True; got "
            f"{c.family.name!r}"
        )
    if c.family.experts_choose:
        why = f"with router={c.family.name!r}"
        for name in ("selection_bias", "capacity", "eval_capacity_factor", "eval_capacity_fraction"):
            _require(c, not getattr(c, name), name, f"no value {why} ({name} has no meaning there)")
        _require(c, c.capacity_over == "local", "capacity_over", f"'local' {why}")
        _require(c, c.num_groups == 1, "num_groups", f"1 {why}")
        _require(c, c.gate_normalization is None, "gate_normalization", f"None {why}")
    norm = c.gate_normalization
    _require(c, norm is None or 1 <= norm < math.inf, "gate_normalization", "a finite p >= 1, or None")
    sorted_after = c.softmax_order == "after_topk"
    _require(
        c,
        not (sorted_after and c.score_function != "softmax"),
        "softmax_order",
        f"'before_topk' with {c.score_function} scores",
    )
    _require(c, c.num_experts % c.num_groups == 0, "num_groups", f"a divisor of num_experts = {c.num_experts}")
    groups = c.top_k_groups
    _require(
        c,
        groups is None or 1 <= groups <= c.num_groups,
        "top_k_groups",
        f"1 to num_groups = {c.num_groups}, or None",
    )
    reachable = (c.num_experts // c.num_groups) * (c.num_groups if groups is None else groups)
    _require(c, c.top_k <= reachable, "top_k", f"at most {reachable}, the experts in top_k_groups groups")
    _require(c, 0 < c.gate_scale < math.inf, "gate_scale", "a positive number")
    softcap = c.router_logit_softcap
    _require(c, softcap is None or 0 < softcap < math.inf, "router_logit_softcap", "a positive number, or None")
    if c.selection_bias_on == "logits":
        by_sign = c.selection_bias and c.selection_bias_rule == "sign"
        _require(c, by_sign, "selection_bias_on", "'scores' without selection_bias=True and its rule 'sign'")
        _require(c, c.num_groups == 1, "num_groups", "1 with selection_bias_on='logits', which ranks no groups")


def _check_capacity(c: MoEConfig) -> None:
    _require(c, c.capacity is None or c.capacity >= 0, "capacity", "at least 0 rows, or None")
    for name in ("capacity_factor", "eval_capacity_factor"):
        factor = getattr(c, name)
        allowed = "a positive number, or None" if c.family.experts_choose else "a finite number, or None"
        finite = factor is None or (math.isfinite(factor) and (factor > 0 or not c.family.experts_choose))
        _require(c, finite, name, allowed)
    fraction = c.eval_capacity_fraction
    _require(c, fraction is None or 0 < fraction <= 1, "eval_capacity_fraction", "0 < share <= 1, or None")
    groups = c.token_groups
    whole = isinstance(groups, int) and not isinstance(groups, bool) and groups >= 1
    _require(c, whole or groups == "sequence", "token_groups", "an integer of at least 1, or 'sequence'")
    _require(c, c.capacity_multiple_of >= 1, "capacity_multiple_of", "at least 1")
    if c.capacity_over == "group":
        in_order = c.drop_order in ("token_major", "choice_major")
        _require(c, in_order, "drop_order", "'token_major' or 'choice_major' with capacity_over='group'")
        _require(c, groups == 1, "token_groups", "1 with capacity_over='group'")
    both = c.capacity is not None and c.capacity_factor is not None
    _require(c, not both, "capacity_factor", f"None when capacity = {c.capacity} is given")
    _require(c, c.min_capacity >= 0, "min_capacity", "at least 0")
    bound = c.max_rows_received
    _require(c, bound is None or bound >= 0, "max_rows_received", "at least 0, or None")
    _require(c, bound is not None or c.on_overflow == "drop", "on_overflow", "'drop' without max_rows_received")
    _require(c, not c.wire_backward or c.wire_dtype is not None, "wire_backward", "False without wire_dtype")
    _check_transport(c)
    _check_levelling(c)
    _require(c, 0 <= c.selection_bias_update_rate < math.inf, "selection_bias_update_rate", "at least 0")
    _require(c, 0 <= c.selection_bias_decay < 1, "selection_bias_decay", "0 <= share < 1")
    if c.selection_bias and c.selection_bias_rule == "quantile":
        grouped = c.top_k_groups is not None and c.top_k_groups < c.num_groups
        _require(c, not grouped, "top_k_groups", "None with selection_bias_rule='quantile'")
        few = c.top_k < c.num_experts
        _require(c, few, "top_k", f"less than num_experts = {c.num_experts} with selection_bias_rule='quantile'")


def _check_transport(c: MoEConfig) -> None:
    if c.transport == "deep_ep":
        for name in ("max_rows_received", "wire_dtype", "join_choices"):
            _require(c, getattr(c, name) is None, name, "None with transport='deep_ep'")
        _require(c, c.hidden_size % 16 == 0, "hidden_size", "a multiple of 16 with transport='deep_ep'")


def _check_levelling(c: MoEConfig) -> None:
    _require(c, c.max_expert_copies >= 1, "max_expert_copies", "at least 1")
    _require(c, 0 <= c.balance_slack < math.inf, "balance_slack", "at least 0")
    rows = c.min_rows_per_copy
    _require(c, rows is None or rows >= 1, "min_rows_per_copy", "at least 1, or None")
    if c.balance_ranks is not None:
        why = "with balance_ranks='replicate'"
        _require(c, isinstance(c.ffn_hidden_size, int), "ffn_hidden_size", f"one width for all experts {why}")
        _require(c, c.overlap_degree == 1, "overlap_degree", f"1 {why}")


def _check_losses(c: MoEConfig) -> None:
    for name in ("load_balancing_coefficient", "router_z_loss_coefficient"):
        _require(c, 0 <= getattr(c, name) < math.inf, name, "at least 0")
    if c.losses is None:
        return
    allowed = "a mapping of names to coefficients of at least 0, or None"
    _require(c, isinstance(c.losses, tuple), "losses", allowed)
    for term in c.losses:
        named = isinstance(term, tuple) and len(term) == 2 and isinstance(term[0], str)
        number = named and isinstance(term[1], int | float) and not isinstance(term[1], bool)
        _require(c, number and 0 <= float(term[1]) < math.inf, "losses", allowed)
    names = [term[0] for term in c.losses]
    _require(c, len(set(names)) == len(names), "losses", "each name once")


def _check_invariant(c: MoEConfig) -> None:
    """``batch_invariant`` goes with what gives each token results of its own."""
    why = "with batch_invariant=True"
    _require(c, c.backend in (None, "grouped"), "backend", f"None or 'grouped' {why}")
    for name in ("expert_compute", "saved_activations"):
        _require(c, getattr(c, name) is None, name, f"None {why}, which fp8's products do not promise")
    plain = c.gate_normalization in (None, 1, 2)
    _require(c, plain, "gate_normalization", f"None, 1 or 2 {why}: other powers round by an element's place")
    named = not callable(c.activation)
    _require(c, named, "activation", f"one that the kernels know {why}; a function runs on a composition")
    for name in ("activation_dropout", "expert_dropout", "input_jitter"):
        _require(c, not getattr(c, name), name, f"0 {why}: what is drawn goes by a token's place in the batch")
    if c.family.name != "top_k":
        raise ValueError(
            f"MoEConfig: router: expected 'top_k' {why}, which no other family promises, got {c.family.name!r}"
        )
    for name in ("capacity", "capacity_factor", "eval_capacity_factor", "eval_capacity_fraction", "max_rows_received"):
        _require(c, getattr(c, name) in (None, 0), name, f"None {why}: who is dropped depends on the batch")
    _require(c, c.overlap_degree == 1, "overlap_degree", f"1 {why}")
