"""Calls of the expert MLP's operation for tests: drawn, built in any dtype, and what they should give."""

from __future__ import annotations

import oracle
import torch
from hypothesis import strategies as st

from dmoe import ExpertWeights, plan_token_choice
from dmoe.activations import NAMES as ACTIVATIONS
from dmoe.ops._moe_mlp_call import Call

# How projections lie in memory: contiguous; each matrix transposed; (E, H, 2 F), as some models of Hugging Face's; gate
# and up as two tensors; rows of gate and up that take turns, with the bias; the same as (E, H, 2 F), GPT-OSS's.
LAYOUTS = ("plain", "transposed", "merged", "apart", "apart, transposed", "interleaved", "interleaved, transposed")
# Activations with numbers, for experts with a gate: limits that some of the tests' values exceed.
WITH_NUMBERS = ("clamped_swiglu(1.5,1.702,1.0)", "clamped_swiglu(2.0,1.0,0.0)", "softcapped_swiglu(1.0,2.5)")


@st.composite
def cases(draw):
    experts = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, experts))
    uniform, gated = draw(st.booleans()), draw(st.booleans())
    return {
        "tokens": draw(st.integers(0, 12)),
        "experts": experts,
        "top_k": top_k,
        "hidden": draw(st.integers(1, 17)),
        "sizes": draw(
            st.integers(1, 19) if uniform else st.lists(st.integers(1, 9), min_size=experts, max_size=experts)
        ),
        "activation": draw(st.sampled_from((*ACTIVATIONS, *WITH_NUMBERS) if gated else ACTIVATIONS)),
        "gated": gated,
        "bias": draw(st.booleans()),
        "gate_on": draw(st.sampled_from(["output", "activation", "input"])),
        "layout": draw(st.sampled_from(["packed", "capacity", "padded", "binned"])),
        "hot": draw(st.booleans()),
        "weights": draw(st.sampled_from(LAYOUTS)),
        "seed": draw(st.integers(0, 2**20)),
    }


def build(case, dtype):
    """Arguments of the operation in the schema's order, a gradient of y, and which choices were kept."""
    torch.manual_seed(case["seed"])
    T, E, K, H, gated = case["tokens"], case["experts"], case["top_k"], case["hidden"], case["gated"]
    sizes = case["sizes"]
    halves = (2,) if gated else ()
    if isinstance(sizes, int):
        up, down, packed = (E, *halves, sizes, H), (E, H, sizes), []
    else:
        up, down, packed = (*halves, sum(sizes), H), (H, sum(sizes)), sizes
    indices = torch.rand(T, E).argsort(-1)[:, :K]
    if case["hot"] and T:
        indices[:, 0] = indices[0, 0]  # repeats are allowed: such a token visits the expert twice
    indices = indices.masked_fill(torch.rand(T, K) < 0.1, E)
    options = {
        "packed": {},
        "capacity": {"capacity": 2, "drop_order": "choice_major"},
        "padded": {"block_size": 4},
        "binned": {"capacity": 3, "binned": True},
    }[case["layout"]]
    plan = plan_token_choice(indices, E, **options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [
        torch.randn(T, H).to(dtype),
        torch.rand(T, K).to(wide),
        torch.randn(*up).to(dtype),
        torch.randn(*down).to(dtype),
        torch.randn(*up[:-1]).to(dtype) if case["bias"] else None,
        torch.randn(E, H).to(dtype) if case["bias"] else None,
    ]
    index = [plan.expert_offsets, plan.row_to_token, plan.row_to_slot, plan.token_offsets, plan.token_rows]
    arguments = [*tensors, *index, None, packed, case["activation"], gated, case["gate_on"], 0.0, 0.0]
    arguments = relaid(arguments, case.get("weights", "plain"))
    return arguments, torch.randn(T, H).to(dtype), indices.tolist(), (plan.token_to_rows >= 0).tolist()


def relaid(arguments, layout):
    """The same call with projections that lie in memory in this way."""
    if layout == "plain":
        return arguments
    call = Call(*arguments)
    halves = 0 if call.ffn_sizes else 1
    up, down, gate, bias = call.up_proj, transposed(call.down_proj), None, call.up_bias
    if "interleaved" in layout and call.gated and not call.ffn_sizes:
        up = interleaved(up) if layout == "interleaved" else interleaved(up, columns_first=True)
        bias = None if bias is None else interleaved(bias)
        return list(call._replace(up_proj=up, down_proj=down, up_bias=bias))
    if "apart" in layout and call.gated:
        gate, up = (half.contiguous() for half in up.unbind(halves))
    if layout == "merged" and call.gated:
        up = transposed(up.flatten(halves, halves + 1)).unflatten(-2, (2, -1))
    elif layout != "apart":
        up, gate = transposed(up), None if gate is None else transposed(gate)
    return list(call._replace(up_proj=up, down_proj=down, gate_proj=gate))


def transposed(weight):
    """The same numbers, columns first."""
    return weight.mT.contiguous().mT


def interleaved(weight, *, columns_first=False):
    """The same numbers of ``(E, 2, F, ...)``, gate 0, up 0, gate 1 and so on, and then with contiguous columns."""
    rows = weight.transpose(1, 2).flatten(1, 2).contiguous()
    rows = transposed(rows) if columns_first else rows
    return rows.unflatten(1, (-1, 2)).transpose(1, 2)


def truth(case, arguments, grad, indices, kept, dtype, wide):
    """y and all gradients from the oracle, in ``dtype`` with gate arithmetic in ``wide``."""
    kinds = [dtype, wide, dtype, dtype, dtype, dtype, dtype]
    given = [*arguments[:6], Call(*arguments).gate_proj]
    leaves = [None if t is None else t.detach().to(k).requires_grad_() for t, k in zip(given, kinds, strict=True)]
    x, gates, *weights, gate = leaves
    if gate is not None:
        weights[0] = torch.stack([gate, weights[0]], 0 if arguments[12] else 1)
    y = oracle.moe(
        x, indices, gates, kept, weights, activation=case["activation"], gated=case["gated"], gate_on=case["gate_on"],
        ffn_sizes=arguments[12],
    )  # fmt: skip
    unused = sum(0 * t.sum() for t in leaves if t is not None)  # every choice may have been masked
    ((y * grad.to(dtype)).sum() + unused).backward()
    grads = [None if t is None else t.grad for t in leaves]
    return [y.detach(), *grads]


CASE = {"tokens": 9, "experts": 3, "top_k": 2, "hidden": 6, "sizes": 5, "activation": "silu", "gated": True,
        "bias": True, "gate_on": "output", "layout": "packed", "hot": False, "seed": 3}  # fmt: skip


def leaves(dtype=torch.float64, **change):
    """x, gate weights, weights and biases that require gradients, the plan, and a gradient of y."""
    arguments, grad, indices, _ = build({**CASE, **change}, dtype)
    for tensor in arguments[:6]:
        if tensor is not None:
            tensor.requires_grad_()
    plan = plan_token_choice(torch.tensor(indices), CASE["experts"])
    weights = ExpertWeights(*arguments[2:6], gated=True, ffn_sizes=tuple(arguments[12] or ()))
    return arguments[0], plan, arguments[1], weights, grad


def summands(case, arguments, grad, indices, kept):
    """Of y and of each gradient, the sum of the magnitudes of what the assignments add to it one by one, in float64."""
    kinds = torch.float64, torch.float64
    zeros = truth(case, arguments, torch.zeros_like(grad), indices, [[False] * len(row) for row in kept], *kinds)
    total = [None if t is None else torch.zeros_like(t) for t in zeros]
    for t, row in enumerate(kept):
        for k in range(len(row)):
            one = slice(t, t + 1)
            alone = [arguments[0][one], arguments[1][one], *arguments[2:]]
            only = [[row[k] and choice == k for choice in range(len(row))]]
            parts = truth(case, alone, grad[one], indices[one], only, *kinds)
            for i, part in enumerate(parts):
                if part is not None:
                    into = total[i] if i > 2 else total[i][one]  # y, x and gate_weights are by token
                    into += part.abs()
    return total
