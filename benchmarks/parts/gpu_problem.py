"""One case's data, the same for every contestant, and the float64 truth that each is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from parts.gpu_shapes import Shape

ROUTINGS = ("uniform", "zipf")
NAMES = ("y", "x", "gates", "gate_up", "down")


@dataclass
class Problem:
    """Leaves and routing of one case.

    Attributes:
        x: ``(T, H)``; gate_up: ``(E, 2F, H)``, gate rows first; down: ``(E, H, F)``: bfloat16.
        gates: gate weights, ``(T, K)`` float32 whose values are bfloat16 numbers, so that contestants which take that
            dtype compute with the same weights.
        indices: chosen experts, ``(T, K)`` int64, distinct in a row.
        grad: gradient of y, ``(T, H)`` bfloat16.
    """

    shape: Shape
    routing: str
    x: Tensor
    gates: Tensor
    gate_up: Tensor
    down: Tensor
    indices: Tensor
    grad: Tensor

    @property
    def label(self) -> str:
        """Shape and routing."""
        return f"{self.shape.label} {self.routing}"

    def router_weight(self) -> Tensor:
        """``(E, H)``, of a layer that chooses for itself."""
        generator = torch.Generator(self.x.device).manual_seed(7)
        weight = torch.randn(self.shape.experts, self.shape.hidden, generator=generator, device=self.x.device)
        return (weight * self.shape.hidden**-0.5).bfloat16()

    def load(self) -> dict[str, float]:
        """Rows of the busiest and of the idlest expert over the mean."""
        counts = torch.bincount(self.indices.flatten(), minlength=self.shape.experts) * self.shape.experts
        ratio = counts / max(self.shape.rows, 1)
        return {"least": float(ratio.min()), "most": float(ratio.max())}


def make_problem(shape: Shape, routing: str, device: torch.device, seed: int = 0) -> Problem:
    """Draw a case: normal tokens and gradients, weights uniform as ``nn.Linear``'s, and a routing.

    ``uniform``: every set of K experts is equally likely. ``zipf``: experts are drawn without replacement with
    probabilities proportional to 1 / rank, the ranks shuffled over the ids.
    """
    generator = torch.Generator(device).manual_seed(seed)
    T, H, width, E, K = shape.dims

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)

    def uniform(*size: int) -> Tensor:
        values = torch.empty(size, device=device, dtype=torch.bfloat16)
        return values.uniform_(-(size[-1] ** -0.5), size[-1] ** -0.5, generator=generator)

    noise = torch.rand(T, E, generator=generator, device=device)
    scores = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))  # Gumbel: the K largest are a weighted draw
    if routing == "zipf":
        rank = torch.randperm(E, generator=generator, device=device) + 1
        scores = scores - rank.log()
    elif routing != "uniform":
        raise ValueError(f"make_problem: routing: expected one of {ROUTINGS}, got {routing!r}")
    gates = torch.rand(T, K, generator=generator, device=device) + 0.1
    gates = (gates / gates.sum(1, keepdim=True)).bfloat16().float()
    return Problem(
        shape,
        routing,
        x=normal(T, H),
        gates=gates,
        gate_up=uniform(E, 2 * width, H),
        down=uniform(E, H, width),
        indices=scores.topk(K, dim=1).indices,
        grad=normal(T, H),
    )


class ShapesAlone(Problem):
    """A case without numbers, on ``meta``: what a contestant does with it says what it would launch."""

    def __init__(self, shape: Shape, device: torch.device | str = "meta") -> None:
        T, H, width, E, K = shape.dims

        def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        super().__init__(
            shape,
            "none",
            x=empty(T, H),
            gates=empty(T, K, dtype=torch.float32),
            gate_up=empty(E, 2 * width, H),
            down=empty(E, H, width),
            indices=empty(T, K, dtype=torch.int64),
            grad=empty(T, H),
        )

    def router_weight(self) -> Tensor:
        return self.x.new_empty(self.shape.experts, self.shape.hidden)


class Truth:
    """y and all gradients in float64, expert by expert; those of the weights are kept rounded to float32, in less room.

    Independent of every contestant: plain products over each expert's tokens, gradients written out by hand.
    """

    router: Tensor  # of a whole layer alone, which sets it

    def __init__(self, problem: Problem) -> None:
        x, grad = problem.x.double(), problem.grad.double()
        gates = problem.gates.double()
        width = problem.shape.ffn
        self.y, self.x, self.gates = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(gates)
        self.gate_up = torch.zeros_like(problem.gate_up, dtype=torch.float32)
        self.down = torch.zeros_like(problem.down, dtype=torch.float32)
        for e, token, choice in _rows_of_experts(problem):
            up, down, weight = problem.gate_up[e].double(), problem.down[e].double(), gates[token, choice, None]
            rows, dy = x[token], grad[token]
            pre = rows @ up.t()
            gate, value = pre[:, :width], pre[:, width:]
            hidden = silu(gate) * value
            out = hidden @ down.t()
            self.y.index_add_(0, token, out * weight)
            self.gates[token, choice] = (out * dy).sum(1)
            d_out = dy * weight
            self.down[e] = (d_out.t() @ hidden).float()
            d_hidden = d_out @ down
            sigmoid = gate.sigmoid()
            slope = sigmoid * (1 + gate * (1 - sigmoid))
            d_pre = torch.cat([d_hidden * value * slope, d_hidden * silu(gate)], 1)
            self.gate_up[e] = (d_pre.t() @ rows).float()
            self.x.index_add_(0, token, d_pre @ up)

    @torch.no_grad()
    def errors(self, got: dict[str, Tensor]) -> dict[str, float]:
        """Relative Frobenius errors of what a contestant returned, and the worst token's or expert's.

        A single lost row hardly shows in a norm over all tokens, and the gradients of an expert with few tokens hardly
        show in one over all experts; ``worst`` compares each with its own norm (or a tenth of the mean, if smaller).
        """
        found: dict[str, float] = {}
        for name, tensor in got.items():
            expected = getattr(self, name)
            if tensor.shape != expected.shape:
                raise ValueError(f"{name}: expected shape {tuple(expected.shape)}, got {tuple(tensor.shape)}")
            off, norm = _norms(tensor, expected)
            found[name] = float((off.square().sum() / norm.square().sum().clamp(min=1e-300)).sqrt())
            if name != "gates":  # a token's few gate gradients may all be near 0
                found[f"worst {name}"] = float((off / torch.maximum(norm, 0.1 * norm.mean()).clamp(min=1e-300)).max())
        return found


def _norms(got: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of the difference and of the truth, one per token or expert, in float64; a few experts at a time."""
    step = 8 if got.dim() == 3 else max(got.shape[0], 1)
    off, norm = [], []
    for first in range(0, got.shape[0], step):
        truth = expected[first : first + step].double().flatten(1)
        off.append((got[first : first + step].double().flatten(1) - truth).norm(dim=1))
        norm.append(truth.norm(dim=1))
    return torch.cat(off), torch.cat(norm)


def _rows_of_experts(problem: Problem) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Expert, its tokens, and which of their choices it is; for each expert that has any."""
    order = torch.argsort(problem.indices.flatten(), stable=True)
    counts = torch.bincount(problem.indices.flatten(), minlength=problem.shape.experts).tolist()
    for e, rows in enumerate(order.split(counts)):
        if len(rows):
            yield e, rows // problem.shape.top_k, rows % problem.shape.top_k
