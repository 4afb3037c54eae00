"""``eval_lm`` as on the branch: part of the batches, figures in a file, and losses added up over ranks.

A model whose experts are spread needs every rank in every forward. fairseq deals batches out in turn, and ranks that
get one less find an empty one in its place, which its loop skips: they take part with the rows of a batch they had, or,
when they had none, with one token. What a rank's figures are worth is counted where fairseq's loop scores a sentence.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import fairseq_cli.eval_lm as program
import torch
import torch.distributed as dist
from fairseq import utils
from fairseq.data import LMContextWindowDataset
from fairseq.distributed import utils as distributed_utils
from fairseq.utils import safe_getattr

from dmoe.integrations.fairseq_moe import parallel, profiling
from dmoe.integrations.fairseq_moe.flags import FlagError

logger = logging.getLogger(__name__)


def register() -> None:
    """Put this module in front of ``eval_lm``'s main and its loop; a second call does nothing."""
    for owner, name, ours in (
        (program, "eval_lm", eval_lm),
        (program, "main", main),
        (LMContextWindowDataset, "collater", collater),
    ):
        stock = getattr(owner, name)
        if not hasattr(stock, "of_dmoe"):
            setattr(owner, name, _in_front(ours, stock))


def _in_front(ours: Any, stock: Any) -> Any:
    @functools.wraps(stock)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return ours(stock, *args, **kwargs)

    replaced.of_dmoe = True  # type: ignore[attr-defined]
    return replaced


def collater(stock: Any, dataset: Any, samples: list[Any]) -> Any:
    """As the stock one of ``--context-window``, which fails over the empty batch of a rank that has one less."""
    return stock(dataset, samples) if samples else {}


def main(stock: Any, cfg: Any, **unused: Any) -> Any:
    """As the stock one; with ``--profile`` under a profiler, with ``--stats-path`` with its figures in a file."""
    watch, stats = _Watch(), safe_getattr(cfg.eval_lm, "stats_path", None)
    if cfg.common_eval.results_path and not cfg.common.profile:
        logger.info("--results-path: eval_lm has the profile of --profile to write there, and --stats-path its figures")
    if stats:
        os.makedirs(os.path.dirname(stats) or ".", exist_ok=True)  # rather fail now than after an hour
    ours = functools.partial(program.eval_lm, watch=watch, max_valid_steps=cfg.dataset.max_valid_steps)
    with (
        profiling.profiled(cfg.common_eval.results_path) if cfg.common.profile else nullcontext(),
        _instead(program, "eval_lm", ours),
    ):
        results = stock(cfg, **unused)
    if stats:
        figures = {**{name: float(value) for name, value in results.items()}, **watch.figures()}
        if parallel.world()[0] == 0:
            with open(f"{stats}.json", "w") as file:
                json.dump({cfg.dataset.gen_subset: figures}, file)
            logger.info(f"Evaluation results saved to {stats}.json")
    return results


@contextmanager
def _instead(owner: Any, name: str, ours: Any) -> Iterator[None]:
    stock = getattr(owner, name)
    setattr(owner, name, ours)
    try:
        yield
    finally:
        setattr(owner, name, stock)


class _Watch:
    """Counts tokens and seconds of an evaluation, under the branch's names."""

    def __init__(self) -> None:
        self._started = self._loaded = time.perf_counter()
        self._tokens = 0

    def over(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches."""
        self._loaded = time.perf_counter()
        for batch in batches:
            self._tokens += batch.get("ntokens", 0)
            yield batch

    def figures(self) -> dict[str, float]:
        """``ntok_total`` of all ranks, which all have to ask; seconds of this one."""
        ended, tokens = time.perf_counter(), torch.tensor(self._tokens)
        if parallel.world()[1] > 1:
            group = distributed_utils.get_data_parallel_group()
            tokens = utils.move_to_cuda(tokens) if dist.get_backend(group) == "nccl" else tokens
            dist.all_reduce(tokens, group=group)
        return {
            "ntok_total": int(tokens),
            "wall_time": ended - self._started,
            "wall_time_load": self._loaded - self._started,
            "wall_time_model": ended - self._loaded,
        }


def eval_lm(
    stock: Any,
    models: list[Any],
    source_dictionary: Any,
    batch_iterator: Any,
    *rest: Any,
    max_valid_steps: int | None = None,
    watch: _Watch | None = None,
    **options: Any,
) -> dict[str, Any]:
    """As the stock one, over the batches of all ranks: every rank returns the loss and perplexity of all tokens.

    Args:
        stock, models, source_dictionary, batch_iterator, rest, options: as for fairseq's.
        max_valid_steps: N, of which each rank takes N + 1 batches, as on the branch and in training's validation.
        watch: what counts.
    """
    if profiling.running():
        for model in models:
            profiling.label(model)
    if max_valid_steps is not None:
        batch_iterator = islice(batch_iterator, max_valid_steps + 1)
    if watch is not None:
        batch_iterator = watch.over(batch_iterator)
    ranks = parallel.world()[1]
    if ranks == 1:
        return stock(models, source_dictionary, batch_iterator, *rest, **options)
    if rest:
        raise FlagError("eval_lm: expected its options by name on several ranks")
    counted = _Counter(program.SequenceScorer, source_dictionary, options)
    batches = _together(models, source_dictionary, batch_iterator)
    with _instead(program, "SequenceScorer", counted.scorer):
        results = stock(models, source_dictionary, batches, **options)
    device = next(models[0].parameters()).device
    tokens = torch.as_tensor(counted.tokens, dtype=torch.float64, device=device)
    sums = torch.stack([torch.as_tensor(results["loss"], dtype=torch.float64, device=device) * tokens, tokens])
    dist.all_reduce(sums, group=distributed_utils.get_data_parallel_group())
    total, count = sums.tolist()
    loss = total / count if count else 0.0
    logger.info(f"{int(count):,} tokens on {ranks} ranks, loss {loss:.4f}")
    return {"loss": loss, "perplexity": 2**loss}


def _together(models: list[Any], dictionary: Any, batches: Any) -> Iterator[Any]:
    """The batches that there are; in place of an empty one, a forward that nobody looks at."""
    stand_in: dict[str, Any] = {
        "src_tokens": torch.full((1, 1), dictionary.eos()),
        "src_lengths": torch.ones(1, dtype=torch.long),
    }
    for batch in batches:
        if "net_input" in batch:
            stand_in = {**batch["net_input"]}
            yield batch
            continue
        inputs = utils.move_to_cuda(stand_in, next(models[0].parameters()).device)
        with torch.no_grad():
            for model in models:
                model.eval()
                model(**inputs)


class _Counter:
    """How many tokens fairseq's loop divides by: those it scores, less what it joins to the next or leaves out.

    Args:
        scorer: the class that scores a batch.
        dictionary: of the source.
        options: those of the loop.
    """

    def __init__(self, scorer: Any, dictionary: Any, options: dict[str, Any]) -> None:
        self._stock = scorer
        self.tokens: Any = 0  # a tensor, once there are some: nobody waits for each sentence's
        self._without_first = bool(options.get("remove_bos_token"))
        joins = options.get("post_process")
        self._joined: torch.Tensor | None = None
        if joins is not None:  # subwords that end like this are joined to the next one
            ends = joins.rstrip()
            self._joined = torch.tensor([dictionary[index].endswith(ends) for index in range(len(dictionary))])

    def scorer(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the class: an object of it whose scores are counted."""
        scorer = self._stock(*args, **kwargs)
        generate = scorer.generate

        def counting(models: Any, sample: Any, **options: Any) -> Any:
            scored = generate(models, sample, **options)
            self.tokens += sum(self._count(best[0]) for best in scored)
            return scored

        scorer.generate = counting
        return scorer

    def _count(self, sentence: dict[str, Any]) -> torch.Tensor:
        tokens, scores = sentence["tokens"], sentence["positional_scores"]
        last = len(tokens) - 1
        if self._without_first:
            tokens, scores = tokens[1:], scores[1:]
        kept = (~scores.isinf()).sum()
        if self._joined is None:
            return kept
        self._joined = self._joined.to(tokens.device)
        return kept - self._joined[tokens[:last]].sum()
