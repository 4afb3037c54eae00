"""How far a mixture's logits are from those of the dense model that it was made of."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_TEXT = (
    "The harbour was quiet that morning. A woman counted 37 crates, wrote the number down, and asked: how many of them "
    "will be here tomorrow?\n\ndef total(prices):\n    return sum(prices.values())\n"
)
_RANDOM_ROWS, _RANDOM_TOKENS = 2, 64


@dataclass(frozen=True)
class Difference:
    """Two models' logits on one input.

    Attributes:
        name: of the input.
        tokens: how many it has.
        absolute: largest difference of two logits.
        relative: the same, divided by the dense model's largest logit.
        kl: Kullback-Leibler divergence of the mixture's distribution from the dense one's, nats, mean over tokens.
        top_1: share of tokens for which both find the same one most likely.
    """

    name: str
    tokens: int
    absolute: float
    relative: float
    kl: float
    top_1: float


@torch.no_grad()
def compare(
    dense: str | os.PathLike[str],
    moe: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> list[Difference]:
    """Load both with Transformers, one after the other, and compare them in float32 on the CPU.

    Args:
        dense: a model's folder.
        moe: the mixture's.
        dtype: what the mixture was written in: the dense model's weights are rounded to it before they compute. None
            leaves them as they are.
        seed: of the random tokens.

    Returns:
        One for random tokens, and one for a text where the dense model's folder has a tokenizer.
    """
    from transformers import AutoConfig

    vocabulary = AutoConfig.from_pretrained(dense, local_files_only=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    inputs = {"random tokens": torch.randint(vocabulary, (_RANDOM_ROWS, _RANDOM_TOKENS), generator=generator)}
    if (text := _tokens_of_text(dense)) is not None:
        inputs["text"] = text
    expected = _logits(dense, inputs, dtype)
    actual = _logits(moe, inputs, None)
    return [_difference(name, expected[name], actual[name]) for name in inputs]


def table(differences: Sequence[Difference]) -> str:
    """For people to read."""
    lines = [f"{'input':<14} {'tokens':>6} {'max difference':>14} {'relative':>9} {'KL, nats':>9} {'top-1 alike':>11}"]
    for row in differences:
        figures = f"{row.absolute:>14.2e} {row.relative:>9.1e} {row.kl:>9.1e} {row.top_1:>11.1%}"
        lines.append(f"{row.name:<14} {row.tokens:>6} {figures}")
    return "\n".join(lines)


def _logits(
    folder: str | os.PathLike[str], inputs: dict[str, Tensor], rounding: torch.dtype | None
) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    if rounding is not None:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(rounding))
    logits = {name: model(ids, use_cache=False).logits.float() for name, ids in inputs.items()}
    del model
    gc.collect()  # before the next one: modules refer to each other
    return logits


def _tokens_of_text(folder: str | os.PathLike[str]) -> Tensor | None:
    if not any(
        os.path.exists(os.path.join(folder, name)) for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        return None
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return tokenizer(_TEXT, return_tensors="pt").input_ids


def _difference(name: str, expected: Tensor, actual: Tensor) -> Difference:
    absolute = (expected - actual).abs().max().item()
    before, after = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
    return Difference(
        name=name,
        tokens=expected[..., 0].numel(),
        absolute=absolute,
        relative=absolute / expected.abs().max().item(),
        kl=(before.exp() * (before - after)).sum(-1).mean().item(),
        top_1=(expected.argmax(-1) == actual.argmax(-1)).double().mean().item(),
    )
