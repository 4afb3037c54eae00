"""Cases recorded from other systems: reading them, feeding their random numbers, comparing every field of them.

A case is ``system``, ``settings``, ``inputs`` and ``outputs``. The ``zoo_*.py`` beside this file hold a function for
each system, which builds dmoe's counterpart of the settings and compares; it goes by what a case says, never by its
name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dmoe import MoE, MoEConfig, Routing
from dmoe.routing import noise

RTOL = 1e-5  # what the goldens are given for
ATOL = 1e-6  # times the largest number of a field: sums that cancel keep the roundings of their summands


class Fields(Mapping[str, Any]):
    """A dictionary of a case, and of the dictionaries in it, that notes which entries were read."""

    def __init__(self, values: dict[str, Any], name: str) -> None:
        self.name, self._values, self._read = name, {}, set()
        for key, value in values.items():
            self._values[key] = self._noting(value, f"{name}.{key}")

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]  # what is not there was not read
        self._read.add(key)
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Entries that nothing here is compared with, or depends on, each with its reason."""
        self._read.update(reasons)

    def _noting(self, value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return type(self)(value, name)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return [type(self)(each, f"{name}[{place}]") for place, each in enumerate(value)]
        return value

    def unread(self) -> list[str]:
        """Names of entries that nobody looked at."""
        found = [f"{self.name}.{key}" for key in self._values if key not in self._read]
        for key in self._read & self._values.keys():
            value = self._values[key]
            inner = value if isinstance(value, list) else [value]
            found += [name for part in inner if isinstance(part, Fields) for name in part.unread()]
        return found


class Outputs(Fields):
    """What the other system computed."""

    def matches(self, key: str, got: Any, size: float | None = None) -> None:
        """Compare with a field, where the case has it; ``size`` as for :func:`assert_matches`."""
        if key in self:
            assert_matches(f"{self.name}.{key}", self[key], got, size)

    def differs(self, key: str, cannot: str) -> Any:
        """A field that dmoe does not reproduce, for a reason of :data:`CANNOT`; None where the case is without it."""
        assert cannot in CANNOT
        return self.get(key)


# What dmoe does not reproduce, and what it does instead; the tests assert the latter. These are the only ones.
CANNOT = {
    "tutel counts its dynamic capacity by the last token": "With batch priority and a capacity_factor of at most 0 "
    "Tutel takes the last token's place in the queue, which is not the last place, for the busiest expert's count, and "
    "drops tokens where it promises not to. dmoe drops nothing at 0, and at most what exceeds a negative factor. Given "
    "Tutel's capacity as a number it keeps the same tokens.",
    "transformers' NLLB keeps its first capacity": "NllbMoeTop2Router overwrites its own expert_capacity in the first "
    "call, and in every evaluation, and goes on with that. dmoe computes each call's from that call's tokens.",
    "deepspeed without RTS keeps any tokens": "Without random token selection DeepSpeed's top-1 gate takes topk of "
    "equal numbers, whose order PyTorch does not promise. dmoe keeps the first tokens.",
}


@dataclass
class Case:
    """One case, read and fed.

    Attributes:
        settings, inputs, outputs: what the case says; every entry has to be read, or left out with a reason.
        draws: random numbers of each kind that the other system was given, by dmoe's name of the kind.
    """

    settings: Fields
    inputs: Fields
    outputs: Outputs
    draws: dict[str, Tensor] = field(default_factory=dict)
    drawn: set[str] = field(default_factory=set)

    def given(self, key: str) -> Tensor | None:
        """An input as float32 numbers; None where it is missing, or a remark that it is not used."""
        value = self.inputs.get(key)
        return None if value is None or isinstance(value, str) else numbers(value)

    def feed(self, kind: str, given: Tensor | None) -> bool:
        """Let ``dmoe.routing.noise`` draw these numbers, which it then has to; whether there are any."""
        if given is not None:
            self.draws[kind] = given
        return given is not None

    def draw(self, kind: str) -> Callable[[Tensor], Tensor]:
        """What takes the place of ``dmoe.routing.noise``'s function."""

        def drawn(like: Tensor) -> Tensor:
            assert kind in self.draws, f"{kind} numbers were drawn, and the case gives none"
            self.drawn.add(kind)
            return self.draws[kind].to(like.dtype).reshape(like.shape)

        return drawn


def case_of(document: dict[str, Any], number: int) -> Case:
    """A case of a file, with the inputs of another one where it says so."""
    raw = document["cases"][number]
    inputs = dict(raw["inputs"])
    if "same_as" in inputs:
        other = next(each for each in document["cases"] if each["id"] == inputs["same_as"])
        inputs = other["inputs"] | {key: value for key, value in inputs.items() if key != "same_as"}
    settings = Fields(raw["settings"], "settings")
    return Case(settings, Fields(inputs, "inputs"), Outputs(raw["outputs"], "outputs"))


def run_case(case: Case, run: Callable[[Case], None], monkeypatch: Any) -> None:
    """Run a system's function on a case; everything that the case holds has to be looked at."""
    for kind in ("gaussian", "gumbel", "uniform"):
        monkeypatch.setattr(noise, kind, case.draw(kind))
    run(case)
    unread = case.settings.unread() + case.inputs.unread() + case.outputs.unread()
    assert not unread, f"nothing here looks at {', '.join(unread)}"
    assert case.drawn == set(case.draws), f"given, and not drawn: {set(case.draws) - case.drawn}"


def numbers(value: Any) -> Tensor:
    """Nested lists as float32."""
    return torch.tensor(value, dtype=torch.float32)


def assert_matches(name: str, expected: Any, got: Any, size: float | None = None) -> None:
    """Floating-point tensors and numbers to ``RTOL``; integers, flags and nested lists exactly.

    ``size`` is that of the summands which roundings are of, where it is not that of the largest sum.
    """
    if isinstance(got, Tensor) and got.is_floating_point():
        want = torch.tensor(expected, dtype=torch.float64)
        size = want.abs().max().item() if size is None and want.numel() else size
        torch.testing.assert_close(
            got.detach().double(), want, rtol=RTOL, atol=ATOL * (size or 0), msg=lambda text: f"{name}: {text}"
        )
    elif isinstance(got, float):
        assert abs(got - expected) <= RTOL * abs(expected), f"{name}: expected {expected}, got {got}"
    else:
        got = got.tolist() if isinstance(got, Tensor) else got
        assert got == expected, f"{name}: expected {expected}, got {got}"


def config_of(num_experts: int, **fields: Any) -> MoEConfig:
    """A config of a router, or of a layer where the sizes are given; experts as the other systems' are: not gated."""
    sizes = {"hidden_size": 4, "ffn_hidden_size": 4, "gated": False, "activation": "relu", "losses": {}}
    return MoEConfig(num_experts=num_experts, **{**sizes, **fields})


def route(config: MoEConfig, logits: Tensor, training: bool = True, **about: Any) -> tuple[MoE, Routing]:
    """A layer of this config, and how its router takes the logits."""
    layer = MoE(config).train(training)
    return layer, layer.router.route(logits, **about)


def losses_of(config: MoEConfig, losses: Mapping[str, float], logits: Tensor, training: bool = True) -> Tensor:
    """The sum of some losses times their coefficients for these logits; 0 where the layer has none."""
    layer, routing = route(replace(config, losses=dict(losses)), logits, training)
    found = layer.router_losses(routing)
    return logits.new_zeros(()) if found is None else found


@dataclass(frozen=True)
class Kept:
    """The assignments of a routing that take a row: token, expert, row and weight of each, all ``(N,)``."""

    token: Tensor
    expert: Tensor
    row: Tensor
    weight: Tensor
    num_tokens: int
    num_experts: int

    def dense(self) -> Tensor:
        """Combine weights ``(T, E)``."""
        weights = self.weight.new_zeros(self.num_tokens, self.num_experts)
        return weights.index_put((self.token, self.expert), self.weight, accumulate=True)

    def tokens(self, groups: int = 1) -> list[list[list[int]]]:
        """Sorted tokens of each expert in each group, counted from the group's first: ``[G][E][...]``."""
        size = self.num_tokens // groups
        found = [[[] for _ in range(self.num_experts)] for _ in range(groups)]
        for token, expert in sorted(zip(self.token.tolist(), self.expert.tolist(), strict=True)):
            found[token // size][expert].append(token % size)
        return found


def kept_of(routing: Routing) -> Kept:
    """What a routing's rows say, which is all that the experts go by."""
    plan = routing.plan
    token = torch.arange(plan.num_tokens).repeat_interleave(plan.token_offsets.diff().long())
    row = plan.token_rows[: len(token)].long()
    weight = routing.gate_weights.flatten()[: len(token)]
    assert not weight[row < 0].any(), "a dropped assignment weighs nothing"
    token, row, weight = token[row >= 0], row[row >= 0], weight[row >= 0]
    assert torch.equal(plan.row_to_token[row].long(), token)
    expert = torch.searchsorted(plan.expert_offsets[1:].long(), row, right=True)
    counts = torch.bincount(expert, minlength=plan.num_experts)
    assert torch.equal(counts, plan.kept_per_expert.long())
    return Kept(token, expert, row, weight, plan.num_tokens, plan.num_experts)


def queue_places(config: MoEConfig, logits: Tensor, training: bool = True) -> Tensor:
    """The place of each choice in its expert's queue, ``(T, K)``, also of those beyond the capacity.

    Rows stand in the order in which they are kept, so a capacity that holds them all shows every place.
    """
    tokens = logits.shape[0]
    unlimited = {"capacity_factor": None, "eval_capacity_factor": None, "eval_capacity_fraction": None}
    _, routing = route(replace(config, capacity=tokens * config.top_k, losses={}, **unlimited), logits, training)
    rows, chosen = routing.plan.token_to_rows.long(), routing.expert_indices
    groups = config.token_groups
    group = torch.arange(tokens).unsqueeze(1) // (tokens // groups)
    queue = (chosen * groups + group).flatten()
    first = torch.full((config.num_experts * groups,), len(queue)).scatter_reduce(0, queue, rows.flatten(), "amin")
    return rows - first[queue].view_as(rows)


def copy_mlps(layer: MoE, experts: list[Mapping[str, Any]], names: tuple[str, str] = ("fc1", "fc2")) -> None:
    """Give a layer the weights of dense ones: ``up_weight``, ``up_bias`` and so on by the two names, [out, in]."""
    up, down = names
    bare = f"{up}_weight" not in experts[0]  # the weights alone, under the linears' names

    def stacked(name: str) -> Tensor:
        return torch.stack([numbers(expert[name]) for expert in experts])

    with torch.no_grad():
        layer.experts.up_proj.copy_(stacked(up if bare else f"{up}_weight"))
        layer.experts.down_proj.copy_(stacked(down if bare else f"{down}_weight"))
        if not bare:
            layer.experts.up_bias.copy_(stacked(f"{up}_bias"))
            layer.experts.down_bias.copy_(stacked(f"{down}_bias"))


def sizes_of(experts: list[Mapping[str, Any]], up: str = "fc1_weight") -> dict[str, int]:
    """Widths of dense experts as the config has them."""
    return {"hidden_size": len(experts[0][up][0]), "ffn_hidden_size": len(experts[0][up])}
