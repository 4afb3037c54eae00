"""Continuing texts: prompts of any lengths side by side, each as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmoe.models.gpt import MoEGPT
from dmoe.models.sampling import GenerationOptions, adjusted_logits, choose, uniform_draws


@dataclass(frozen=True)
class Generated:
    """What :func:`generate` returns, on the CPU; N prompts in their order.

    Attributes:
        ids: ``(N, longest prompt + output_len)`` int64: prompt, continuation, then ``end_id`` (0 without one).
        lengths: ``(N,)`` int64, tokens of prompt and continuation, with an ``end_id`` that was generated.
        prompt_lengths: ``(N,)`` int64.
        log_probs: ``(N, output_len)``, each generated token's log-probability among all V of the logits that it was
            chosen by, after temperature and penalties; 0 behind the end. None where nobody asked.
    """

    ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    log_probs: Tensor | None = None

    def continuations(self) -> list[list[int]]:
        """What each prompt got, without padding."""
        bounds = zip(self.ids.tolist(), self.prompt_lengths.tolist(), self.lengths.tolist(), strict=True)
        return [ids[start:stop] for ids, start, stop in bounds]


def generate(
    model: MoEGPT,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    *,
    batch_size: int | None = None,
    log_probs: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Generated:
    """Continue each prompt by at most ``output_len`` tokens.

    A sequence goes through the model by itself: neither what stands beside it nor padding changes its tokens, but for
    rounding. Its prompt goes through once, then one token a step, with keys and values kept. Layers with a capacity,
    and experts that choose their tokens, see the tokens of one sequence that arrive together.

    Args:
        model: in evaluation mode or not; it runs in evaluation mode, and gets its mode back.
        prompts: ids, at least one each.
        options: how to go on.
        batch_size: how many sequences go through the model at once; None is all.
        log_probs: whether to return them.
        progress: called with a number of steps, ``output_len`` for each batch in all.

    Raises:
        ValueError: no prompt, an empty one, ids outside the vocabulary, more tokens than the model has positions; or
            logits that are NaN.
    """
    rows = [list(map(int, prompt)) for prompt in prompts]
    _check(model, rows, options, batch_size)
    longest = max(map(len, rows))
    pad = 0 if options.end_id is None else options.end_id
    done = Generated(
        torch.full((len(rows), longest + options.output_len), pad, device="cpu"),
        torch.tensor(list(map(len, rows)), device="cpu"),
        torch.tensor(list(map(len, rows)), device="cpu"),
        torch.zeros(len(rows), options.output_len, device="cpu") if log_probs else None,
    )
    size = batch_size or len(rows)
    with torch.no_grad(), _evaluating(model):
        for first in range(0, len(rows), size):
            _continue(model, rows[first : first + size], first, options, done, progress)
    return done


def _continue(
    model: MoEGPT,
    prompts: list[list[int]],
    first: int,
    options: GenerationOptions,
    done: Generated,
    progress: Callable[[int], object] | None,
) -> None:
    """One batch, whose first prompt is the one with number ``first``; results go into ``done``."""
    device, V = model.embedding.weight.device, model.config.vocab_size
    lengths = torch.tensor(list(map(len, prompts)), device=device)
    width = max(map(len, prompts))
    tokens = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=device)
    mask = torch.arange(width, device=device) < lengths[:, None]
    seen = torch.zeros(len(prompts), V + 1, dtype=torch.bool, device=device)  # padding is seen at V, which is nothing
    seen.scatter_(1, tokens.masked_fill(~mask, V), True)
    seen = seen[:, :V]
    for number, prompt in enumerate(prompts, first):
        done.ids[number, : len(prompt)] = torch.tensor(prompt)
    draws = None
    if not options.greedy:
        draws = torch.stack([uniform_draws(options, first + n) for n in range(len(prompts))])
    cache = model.new_cache(len(prompts), width + options.output_len - 1)
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    last = lengths - 1  # the place, in what goes through the model, of each sequence's last token
    for step in range(options.output_len):
        features = model.features(tokens, token_mask=mask, cache=cache)
        raw = model.logits(features[torch.arange(len(prompts), device=device), last])
        logits = adjusted_logits(raw.to(torch.promote_types(raw.dtype, torch.float32)), seen, step, options)
        chosen = choose(logits, None if draws is None else draws[:, step].to(device), options)
        broken = (torch.isnan(raw).any(-1) & running).cpu()
        if bool(broken.any()):
            raise ValueError(
                f"generate: logits: expected numbers, got NaN for prompt {first + int(broken.nonzero()[0, 0])} at step "
                f"{step}: weights that are not finite, or a type too narrow for them ({raw.dtype})"
            )
        _record(done, first, step, chosen.cpu(), running.cpu(), logits if done.log_probs is not None else None)
        seen.scatter_(1, chosen[:, None], True)
        if options.end_id is not None:
            running = running & (chosen != options.end_id)
        if progress is not None:
            ended = not bool(running.any())
            progress(options.output_len - step if ended else 1)
        if not bool(running.any()):
            return
        tokens, mask, last = chosen[:, None], running[:, None], torch.zeros_like(last)


def _record(done: Generated, first: int, step: int, chosen: Tensor, running: Tensor, logits: Tensor | None) -> None:
    """Write down one step of the sequences that are still running."""
    rows = running.nonzero().squeeze(1)
    at = first + rows
    done.ids[at, done.lengths[at]] = chosen[rows]
    done.lengths[at] += 1
    if logits is not None and done.log_probs is not None:
        of_chosen = torch.log_softmax(logits, -1).cpu().gather(1, chosen[:, None]).squeeze(1)
        done.log_probs[at, step] = of_chosen[rows].to(done.log_probs.dtype)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _check(model: MoEGPT, prompts: list[list[int]], options: GenerationOptions, batch_size: int | None) -> None:
    V, most = model.config.vocab_size, model.config.max_positions
    if not prompts:
        raise ValueError("generate: prompts: expected at least one, got none")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"generate: batch_size: expected at least 1, or None, got {batch_size}")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"generate: prompts: expected at least one id in each, got none in prompt {number}")
        wrong = next((token for token in prompt if not 0 <= token < V), None)
        if wrong is not None:
            raise ValueError(f"generate: prompts: expected ids in [0, {V}), got {wrong} in prompt {number}")
        if len(prompt) + options.output_len > most:
            raise ValueError(
                f"generate: output_len: expected at most {most} tokens in all, the model's max_positions, got "
                f"{len(prompt)} in prompt {number} and output_len = {options.output_len}"
            )
