"""The experts' kernels on tokens and rows that lie beyond 2**31 numbers: the same bits as near the beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmoe.certify.draw import Draw
from dmoe.certify.experts import drawn_call
from dmoe.ops import moe_mlp_cuda as kernels
from dmoe.ops._moe_mlp_call import Call

_BEYOND = 2**31


def same_bits_far_away(part: str, asked: Sequence[Any], device: torch.device, tile_rows: int, *_: Any) -> str:
    """Why it is refused, ``""`` if it is not; also where the device has no room for such tensors, or is no GPU."""
    return difference(part, asked, device, tile_rows, _BEYOND) if device.type == "cuda" else ""


def difference(part: str, asked: Sequence[Any], device: torch.device, tile_rows: int, beyond: int) -> str:
    """What differs between the drawn problem and the same behind ``beyond`` numbers, ``""`` if nothing does."""
    near, used = drawn_call(asked, Draw(device, 0), tile_rows)
    if near.activation_dropout or near.expert_dropout:
        return ""  # masks go by the assignment, which is another there
    hidden, width = near.x.shape[1], max(near.x.shape[1], near.pre_width)
    rows, tokens = beyond // width + 1, beyond // hidden + 1
    item = near.x.element_size()
    needed = item * (6 * tokens * hidden + 4 * rows * (hidden + 2 * near.pre_width))
    if device.type == "cuda" and 1.5 * needed > torch.cuda.mem_get_info(device)[0]:
        return ""
    far = moved(near, tokens, rows)
    if part == "moe_mlp":
        found, expected = ({"y": kernels.moe_mlp_cuda(*call)[0]} for call in (far, near))
    else:
        found, expected = (_gradients(call, where, used) for call, where in ((far, rows), (near, 0)))
    for name, there in expected.items():
        here = found[name]
        here = here[tokens:] if here.shape[0] != there.shape[0] else here
        if not torch.equal(here.nan_to_num(), there.nan_to_num()):
            return f"{name}: beyond 2**31 numbers it differs from the same problem near the beginning"
    return ""


def moved(call: Call, tokens: int, rows: int) -> Call:
    """The same call behind ``tokens`` tokens that go nowhere and ``rows`` rows that are nobody's."""

    def behind(values: Tensor | None, count: int) -> Any:
        if values is None:
            return None
        room = values.new_empty(count + values.shape[0], *values.shape[1:])
        room[count:] = values
        return room

    def holes(index: Tensor) -> Tensor:
        return torch.cat([index.new_full((rows,), -1), index])

    tiles = call.tiles
    assert tiles is not None
    at = call.row_to_token
    return call._replace(
        x=behind(call.x, tokens),
        residual=behind(call.residual, tokens),
        gate_weights=call.gate_weights.flatten(),
        expert_offsets=call.expert_offsets + rows,
        row_to_token=holes(torch.where(at < 0, at, at + tokens)),
        row_to_slot=holes(call.row_to_slot),
        token_offsets=torch.cat([call.token_offsets.new_zeros(tokens), call.token_offsets]),
        token_rows=torch.where(call.token_rows < 0, call.token_rows, call.token_rows + rows),
        tiles=torch.where(tiles < 0, tiles, tiles + tiles.new_tensor([0, rows])),
    )


def _gradients(call: Call, first_row: int, used: int) -> dict[str, Tensor]:
    call = call.with_buffers((None, None))
    generator = torch.Generator(call.x.device).manual_seed(1)
    real = int(call.token_offsets.shape[0]) - 1
    tokens = int((call.token_offsets.diff() > 0).sum())
    grad = call.x.new_empty(call.x.shape)
    grad[real - tokens :] = torch.randn(tokens, call.x.shape[1], generator=generator, device=call.x.device)
    pre = call.x.new_empty(call.row_to_token.shape[0], call.pre_width)
    numbers = torch.randn(used, call.pre_width, generator=generator, device=call.x.device)
    pre[first_row : first_row + used] = numbers.masked_fill(
        (call.row_to_token[first_row : first_row + used] < 0).unsqueeze(1), 0
    )
    grads = kernels.moe_mlp_backward_cuda(grad, pre, True, *call)
    names = ("gradient of x", "gradient of gate_weights", *(f"gradient {i}" for i in range(2, len(grads))))
    return {
        name: value.flatten() if name == "gradient of gate_weights" else value
        for name, value in zip(names, grads, strict=True)
        if value.numel()
    }
