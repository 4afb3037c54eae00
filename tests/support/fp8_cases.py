"""Experts in fp8, one row after the other in float64: rounding to e4m3 by arithmetic, gradients by hand.

Imports nothing of dmoe. A gradient passes rounding as if it were not there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTS = {"silu": F.silu, "gelu": F.gelu, "relu": torch.relu, "relu_squared": lambda x: torch.relu(x) ** 2}


def rounded(values):
    """To 4 significant bits, halves to even, from 2^-6 down to multiples of 2^-9: e4m3."""
    exponent = torch.frexp(values)[1].double() - 1
    step = torch.exp2(exponent.clamp(min=-6) - 3)
    return (values / step).round() * step


def on_grid(values):
    """Numbers as one scale for all of them rounds them: the least power of two by which they fit under 448."""
    values = values.float().double()
    largest = values.abs().max() if values.numel() else values.new_zeros(())
    if largest == 0:
        return values
    scale = 2.0**-110
    while largest / scale > 448:
        scale *= 2
    return rounded(values / scale) * scale


def blocks_on_grid(weight):
    """A matrix, each block of 128 x 128 by itself."""
    out = weight.clone()
    for i in range(0, weight.shape[0], 128):
        for j in range(0, weight.shape[1], 128):
            out[i : i + 128, j : j + 128] = on_grid(weight[i : i + 128, j : j + 128])
    return out


def run(case, *, compute, saved, recompute):
    """y and a dict of gradients; see ``Case`` in the tests for what ``case`` holds."""
    row_q = on_grid if compute else (lambda v: v)
    block_q = blocks_on_grid if compute else (lambda w: w)
    kept = on_grid if saved else (lambda v: v)
    c = case
    x_forward = [kept(row) if compute else row for row in c.x]
    x_backward = [kept(row) for row in c.x]
    act = ACTS[c.activation]

    def activated(pre):
        return act(pre[: len(pre) // 2]) * pre[len(pre) // 2 :] if c.gated else act(pre)

    # (E, C, H) with C the widest expert's columns, as one matrix or as gate and up apart.
    ups = [[block_q(part) for part in (w.chunk(2) if c.apart else [w])] for w in c.up]
    downs = [block_q(w) for w in c.down]
    y = torch.zeros_like(c.x)
    grads = {
        "x": torch.zeros_like(c.x),
        "gates": torch.zeros_like(c.gates),
        "up": [torch.zeros_like(w) for w in c.up],
        "down": [torch.zeros_like(w) for w in c.down],
    }
    if c.biases is not None:
        grads["up_bias"] = [torch.zeros_like(b) for b, _ in c.biases]
        grads["down_bias"] = [torch.zeros_like(b) for _, b in c.biases]
    if c.factors is not None:
        grads |= {name: torch.zeros_like(c.factors[name]) for name in ("a_up", "b_up", "a_down", "b_down")}

    for t, chosen in enumerate(c.indices.tolist()):
        for k, e in enumerate(chosen):
            if e == len(c.up):
                continue
            g, go = c.gates[t, k], c.grad_y[t]
            on_input = g if c.gate_on == "input" else 1.0
            on_hidden = g if c.gate_on == "activation" else 1.0
            low = None if c.factors is None else {n: c.factors[n][e] for n in ("a_up", "b_up", "a_down", "b_down")}

            def before(row, e=e, low=low):
                pre = torch.cat([part @ row_q(row) for part in ups[e]])
                inner = None
                if low is not None:
                    inner = c.scale * (low["a_up"] @ row)
                    pre = pre + low["b_up"] @ inner
                return (pre if c.biases is None else pre + c.biases[e][0]), inner

            pre, inner_up = before(x_forward[t] * on_input)
            hidden = activated(pre) * on_hidden
            out, inner_down = downs[e] @ row_q(hidden), None
            if low is not None:
                inner_down = c.scale * (low["a_down"] @ hidden)
                out = out + low["b_down"] @ inner_down
            out = out if c.biases is None else out + c.biases[e][1]
            y[t] += out * (g if c.gate_on == "output" else 1.0)

            x_row = x_backward[t] * on_input
            if recompute:
                pre, inner_up = before(x_row)
            else:
                pre = kept(pre)
            grad_hidden = downs[e].T @ row_q(go)
            if low is not None:
                grad_hidden = grad_hidden + c.scale * (low["a_down"].T @ (low["b_down"].T @ go))
            pre = pre.detach().requires_grad_()
            value = activated(pre)
            (slope,) = torch.autograd.grad(value, pre, grad_hidden)
            value = value.detach()
            weight = 1.0 if c.gate_on == "input" else g
            grad_pre = slope * weight
            parts = grad_pre.chunk(2) if c.apart else [grad_pre]
            grad_row = sum(w.T @ row_q(p) for w, p in zip(ups[e], parts, strict=True))
            if low is not None:
                back = c.scale * (low["b_up"].T @ grad_pre)
                grad_row = grad_row + low["a_up"].T @ back
                grads["a_up"][e] += torch.outer(back, x_row)
                grads["b_up"][e] += torch.outer(grad_pre, inner_up)
                grads["a_down"][e] += torch.outer(c.scale * (low["b_down"].T @ go), value * weight)
                grads["b_down"][e] += torch.outer(go, inner_down * (g if c.gate_on == "output" else 1.0))
            grads["x"][t] += grad_row * on_input
            if c.gate_on == "input":
                grads["gates"][t, k] = x_backward[t] @ grad_row
            else:
                grads["gates"][t, k] = value @ grad_hidden
            grads["up"][e] += torch.outer(grad_pre, x_row)
            grads["down"][e] += torch.outer(go, value * weight)
            if c.biases is not None:
                if c.gate_on == "output":
                    grads["gates"][t, k] += c.biases[e][1] @ go
                grads["up_bias"][e] += grad_pre
                grads["down_bias"][e] += go * (g if c.gate_on == "output" else 1.0)
    return y, grads
