"""Modules of Transformers' models, and who computes their experts: checked, and timed in turns."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AriaTextConfig, GptOssConfig, Llama4TextConfig, MixtralConfig, Qwen3MoeConfig

from dmoe.integrations.transformers import experts as experts_module
from dmoe.integrations.transformers import register, restore, use
from dmoe.integrations.transformers.lora import Adapted
from parts.harness import CheckError, Timing, interleave, relative_error, require_close, saved_bytes, stopwatch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative norms against float64, as in layer_cpu; eager itself adds experts up in bfloat16.
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}
WORDS = ("eager", "grouped_mm", "batched_mm", "dmoe")
RANK = 8


@dataclass(frozen=True)
class Case:
    """One line of the table: whose experts, how many tokens, which dtype, and whether backward is part of it."""

    model: str
    tokens: int
    dtype: str
    backward: bool
    hidden: int = 512
    ffn: int = 256
    experts: int = 32
    top_k: int = 4

    @property
    def label(self) -> str:
        """For ``--cases`` and the progress bar."""
        way = "fwd+bwd" if self.backward else "fwd"
        return (
            f"{self.model} {way} {self.dtype} T={self.tokens} H={self.hidden} F={self.ffn} E={self.experts} "
            f"K={self.top_k}"
        )


class WithExperts(nn.Module):
    """What PEFT needs around the experts: something that has them under a name."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *arguments: Tensor) -> Tensor:
        """The experts themselves."""
        y: Tensor = self.experts(*arguments)
        return y


def make_module(case: Case) -> nn.Module:
    """The experts of a model, or Llama 4's whole block, with random weights that are the same in every call."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": case.hidden,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
    module: nn.Module
    if case.model == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        module = MixtralExperts(MixtralConfig(**sizes, intermediate_size=case.ffn, num_local_experts=case.experts))
    elif case.model == "gpt_oss":
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

        module = GptOssExperts(GptOssConfig(**sizes, intermediate_size=case.ffn, num_local_experts=case.experts))
    elif case.model == "aria":
        from transformers.models.aria.modeling_aria import AriaExperts

        module = AriaExperts(AriaTextConfig(**sizes, intermediate_size=case.ffn, moe_num_experts=case.experts))
    elif case.model == "llama4":
        from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

        config = Llama4TextConfig(
            **sizes,
            intermediate_size=case.ffn,
            num_local_experts=case.experts,
            num_experts_per_tok=case.top_k,
        )
        module = Llama4TextMoe(config)
    else:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        module = Qwen3MoeExperts(Qwen3MoeConfig(**sizes, moe_intermediate_size=case.ffn, num_experts=case.experts))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.05)
    return module.to(DTYPES[case.dtype])


class Contestant:
    """One module, and who computes it."""

    def __init__(self, name: str, case: Case, module: nn.Module) -> None:
        self.name, self.case, self.module = name, case, module
        self.parameters = [p for p in module.parameters() if p.requires_grad]

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        """New tokens, and a new routing: experts differ in load, as in training."""
        case, generator = self.case, torch.Generator().manual_seed(seed)
        dtype = DTYPES[case.dtype]
        x = torch.randn(case.tokens, case.hidden, generator=generator).to(dtype).requires_grad_(case.backward)
        if case.model == "llama4":
            return (x.detach().unsqueeze(0).requires_grad_(case.backward),)
        scores = torch.randn(case.tokens, case.experts, generator=generator) + torch.randn(
            case.experts, generator=generator
        )
        gates, index = scores.softmax(1).topk(case.top_k)
        return x, index, (gates / gates.sum(1, keepdim=True)).to(dtype).requires_grad_(case.backward)

    def run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The output; backward leaves gradients where they belong."""
        if not self.case.backward:
            with torch.no_grad():
                return _first(self.module(*inputs))
        y = _first(self.module(*inputs))
        y.backward(torch.ones_like(y))
        return y

    def clear(self) -> None:
        """Gradients start from None."""
        for parameter in self.parameters:
            parameter.grad = None

    def results(self, seed: int) -> dict[str, Tensor]:
        """Output and gradients, by name."""
        self.clear()
        inputs = self.inputs(seed)
        found = {"y": self.run(inputs).detach()}
        if self.case.backward:
            found |= {f"input {i}": t.grad for i, t in enumerate(inputs) if t.grad is not None}
            found |= {n: p.grad for n, p in self.module.named_parameters() if p.grad is not None}
        self.clear()
        return found

    def saved_bytes(self) -> int:
        """Bytes kept for backward beside parameters and inputs, each storage once."""
        inputs = self.inputs(0)
        held = (*self.module.parameters(), *self.module.buffers())
        return saved_bytes(lambda: self.module(*inputs), (*held, *inputs))


def _first(result: Any) -> Tensor:
    y: Tensor = result[0] if isinstance(result, tuple) else result
    return y


class DenseDelta(Contestant):
    """PEFT's own way on dmoe's operation: weights with the product added, and a gradient as large as they."""

    def run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """With the factors left unread."""
        own = experts_module.adapted
        experts_module.adapted = lambda module, name: Adapted(getattr(module, name))
        try:
            return super().run(inputs)
        finally:
            experts_module.adapted = own


class HandedOver(Contestant):
    """``use(model)``: the wrappers hand the factors over."""

    def __init__(self, name: str, case: Case, module: nn.Module) -> None:
        super().__init__(name, case, module)
        use(module)


def field(case: Case, memory: int) -> tuple[list[Contestant], dict[str, str]]:
    """All who can run a case, and why the others do not.

    Args:
        case: which.
        memory: bytes that one of them may use.
    """
    register()
    if case.model == "lora":
        return _with_adapters(case), {}
    module = make_module(case)
    reasons: dict[str, str] = {}
    found = []
    for word in ("eager", "dmoe") if case.model == "llama4" else WORDS:
        weights = 3 * case.hidden * case.ffn * torch.finfo(DTYPES[case.dtype]).bits // 8
        needed = case.tokens * case.top_k * weights * (3 if case.backward else 1)
        if word == "batched_mm" and needed > memory:
            reasons[word] = f"would need {needed / 2**30:.1f} GiB: a copy of its experts' weights for each token"
            continue
        own = copy.deepcopy(module)
        if case.model == "llama4":
            if word == "dmoe":
                use(own)
        else:
            _name(own, word)
        found.append(Contestant(word, case, own))
    return found, reasons


def _with_adapters(case: Case) -> list[Contestant]:
    from peft import LoraConfig, get_peft_model

    targets = ["experts.gate_up_proj", "experts.down_proj"]
    ways: dict[str, tuple[str, Callable[..., Contestant]]] = {
        "PEFT, grouped_mm": ("grouped_mm", Contestant),
        "PEFT's sum, dmoe": ("dmoe", DenseDelta),
        "factors, the word": ("dmoe", Contestant),
        "factors, use()": ("dmoe", HandedOver),
    }
    found = []
    for name, (word, kind) in ways.items():
        module = WithExperts(make_module(case))
        _name(module.experts, word)
        model = get_peft_model(module, LoraConfig(r=RANK, target_parameters=targets))
        torch.manual_seed(1)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                nn.init.normal_(parameter, std=0.05)
        found.append(kind(name, case, model))
    return found


def _name(experts: Any, word: str) -> None:
    experts.config._experts_implementation = word


def errors_of(contestant: Contestant, expected: dict[str, Tensor], passed_over: str | None = None) -> dict[str, float]:
    """Relative norms of a contestant's output and gradients against what was expected.

    Raises:
        CheckError: other gradients than expected, or one that is off, unless its name ends with ``passed_over``.
    """
    case, got = contestant.case, contestant.results(0)
    where = f"{case.label}, {contestant.name}"
    if got.keys() != expected.keys():
        raise CheckError(f"{where}: gradients of {sorted(got)}, not of {sorted(expected)}")
    errors = {name: relative_error(got[name], expected[name]) for name in got}
    held = {n: e for n, e in errors.items() if passed_over is None or not n.endswith(passed_over)}
    require_close(where, held, TOLERANCE[case.dtype])
    return errors


def timings_of(contestants: Sequence[Contestant], args: Any, tick: Callable[[], None]) -> dict[str, Timing]:
    """Each with new tokens and a new routing in every turn, as the command line says (``args``).

    Of one thread the processor's time: what else runs on the machine does not count.
    """
    clock = time.process_time if args.threads == 1 else time.perf_counter

    def turn(contestant: Contestant, i: int) -> float:
        contestant.clear()
        inputs = contestant.inputs(100 + args.warmup + i)
        return stopwatch(lambda: contestant.run(inputs), clock)

    return interleave(
        {each.name: functools.partial(turn, each) for each in contestants},
        rounds=args.rounds,
        warmup=args.warmup,
        seconds_each=args.seconds,
        seed=args.seed,
        tick=tick,
    )


def exact(case: Case, contestant: Contestant, seed: int) -> dict[str, Tensor]:
    """What a contestant's module computes in float64, by Transformers' own loop over experts.

    Of Llama 4 in bfloat16 what that computes itself: a router in float64 would send some tokens elsewhere.
    """
    if case.model == "llama4" and case.dtype == "bf16":
        return contestant.results(seed)
    module = copy.deepcopy(contestant.module)
    restore(module)
    for each in module.modules():
        if hasattr(each, "config"):
            _name(each, "eager")
    wide = _Exact(contestant.name, case, module.double())
    return wide.results(seed)


class _Exact(Contestant):
    """On the same numbers as the others, in float64."""

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        """See :meth:`Contestant.inputs`."""
        rounded = (t.detach() for t in super().inputs(seed))
        return tuple(t.double().requires_grad_(self.case.backward) if t.is_floating_point() else t for t in rounded)
