"""From logits to the next token: temperature, penalties, then the best one or a draw, as FasterTransformer does it."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_BESIDE_TEMPERATURE = 1e-6  # FasterTransformer adds it to every temperature but 1


_LARGEST = 1e30  # of penalties and temperatures


@dataclass(frozen=True)
class GenerationOptions:
    """How texts go on. Without ``top_k`` and ``top_p`` each next token is the most likely one (greedy search).

    Attributes:
        output_len: the most tokens that each sequence gets.
        end_id: ends a sequence, counts in its length, and pads what is shorter; it may lie outside the vocabulary. None
            ends nothing, and 0 pads.
        top_k: draw from the k most likely tokens; 1 is greedy. None or 0: from all.
        top_p: draw from the most likely tokens that hold this share of the probability (of the top k, if given), of
            which the last one only counts up to it, as FasterTransformer draws. None or 0: all of it.
        temperature: above 0; logits are divided by it (plus 1e-6, unless it is 1).
        repetition_penalty: above 0; what a token's logit is divided by, or multiplied with where it is negative, if the
            token stands in the prompt or what followed. 1 is none.
        presence_penalty: what is subtracted there instead; not both.
        min_length: in so many first steps ``end_id`` is not chosen.
        seed: of the draws. Each sequence has its own, by its place among the prompts.

    Raises:
        ValueError: a field out of range, or both penalties.
    """

    output_len: int
    end_id: int | None = None
    top_k: int | None = None
    top_p: float | None = None
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    min_length: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("output_len", 1), ("end_id", 0), ("top_k", 0), ("min_length", 0), ("seed", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            optional = name in ("end_id", "top_k")
            self._require(
                whole or (value is None and optional), name, f"an integer of at least {least}{', or None' * optional}"
            )
        for name in ("temperature", "repetition_penalty", "presence_penalty"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            positive = name == "presence_penalty" or (number and value > 0)
            self._require(number and positive, name, "a number" + " above 0" * (name != "presence_penalty"))
            self._require(abs(value) <= _LARGEST, name, f"at most {_LARGEST:g}, so that no logit becomes infinite")
        self._require(self.end_id is None or self.end_id < 2**31, "end_id", "an integer below 2**31")
        share = self.top_p
        number = isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share <= 1
        self._require(share is None or number, "top_p", "a number in [0, 1], or None")
        both = self.repetition_penalty != 1 and self.presence_penalty != 0
        self._require(
            not both, "presence_penalty", f"0 with repetition_penalty = {self.repetition_penalty}: one of the two"
        )

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.top_k == 1 or not (self.top_k or self.top_p)

    def _require(self, condition: bool, name: str, allowed: str) -> None:
        if not condition:
            raise ValueError(f"GenerationOptions: {name}: expected {allowed}, got {getattr(self, name)!r}")


def adjusted_logits(logits: Tensor, seen: Tensor, step: int, options: GenerationOptions) -> Tensor:
    """Temperature, then a penalty on tokens that are there already, then no end before its time.

    Args:
        logits: ``(B, V)`` in at least float32.
        seen: ``(B, V)`` bool, the ids in each sequence's prompt or continuation.
        step: tokens that were added before this one.
        options: of the search.

    Returns:
        ``(B, V)``; minus infinity for a barred ``end_id``.
    """
    if options.temperature != 1:
        logits = logits / (options.temperature + _BESIDE_TEMPERATURE)
    if options.repetition_penalty != 1:
        r = options.repetition_penalty
        logits = torch.where(seen, torch.where(logits < 0, logits * r, logits / r), logits)
    elif options.presence_penalty != 0:
        logits = torch.where(seen, logits - options.presence_penalty, logits)
    if step < options.min_length and options.end_id is not None and options.end_id < logits.shape[-1]:
        ids = torch.arange(logits.shape[-1], device=logits.device)
        logits = logits.masked_fill(ids == options.end_id, -math.inf)
    return logits


def choose(logits: Tensor, draws: Tensor | None, options: GenerationOptions) -> Tensor:
    """The next token of each sequence; of equally likely ones the lowest id comes first.

    Args:
        logits: ``(B, V)`` of :func:`adjusted_logits`.
        draws: ``(B,)`` in (0, 1]; not read where nothing is drawn.
        options: of the search.

    Returns:
        ``(B,)`` int64. With a draw u the first token, in the order of probability, at which the sum of probabilities
        reaches ``u * top_p`` of that of the top k.
    """
    if options.greedy or draws is None:
        return logits.argmax(-1)
    most = min(options.top_k or logits.shape[-1], logits.shape[-1])
    probs, ids = torch.softmax(logits, -1).sort(dim=-1, descending=True, stable=True)
    total = probs[:, :most].cumsum(-1)
    wanted = draws.to(total)[:, None] * (options.top_p or 1.0) * total[:, -1:]
    place = (total < wanted).sum(-1, keepdim=True).clamp(max=most - 1)
    return ids.gather(-1, place).squeeze(-1)


def uniform_draws(options: GenerationOptions, sequence: int) -> Tensor:
    """``(output_len,)`` float64 in (0, 1] for one sequence, on the CPU: functions of the seed and its number alone."""
    digest = hashlib.sha256(f"generate {options.seed} {sequence}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return 1.0 - torch.rand(options.output_len, generator=generator, dtype=torch.float64, device="cpu")
