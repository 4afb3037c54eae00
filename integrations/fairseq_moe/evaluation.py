"""``eval_lm`` on several ranks: they stay together to the end, and their losses are added up.

A model whose experts are spread needs every rank in every forward. fairseq deals batches out in turn, and ranks that
get one less find an empty one in its place, which its loop skips: they take part with the rows of a batch they had, or,
when they had none, with one token. What a rank's figures are worth is counted where fairseq's loop scores a sentence.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import fairseq_cli.eval_lm as program
import torch
import torch.distributed as dist
from fairseq import utils
from fairseq.data import LMContextWindowDataset
from fairseq.distributed import utils as distributed_utils

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
    """As the stock one; with ``--profile`` under a profiler."""
    if not cfg.common.profile:
        return stock(cfg, **unused)
    with profiling.profiled(cfg.common_eval.results_path):
        return stock(cfg, **unused)


def eval_lm(
    stock: Any, models: list[Any], source_dictionary: Any, batch_iterator: Any, *rest: Any, **options: Any
) -> dict[str, Any]:
    """As the stock one, over the batches of all ranks: every rank returns the loss and perplexity of all tokens."""
    if profiling.running():
        for model in models:
            profiling.label(model)
    ranks = parallel.world()[1]
    if ranks == 1:
        return stock(models, source_dictionary, batch_iterator, *rest, **options)
    if rest:
        raise FlagError("eval_lm: expected its options by name on several ranks")
    counted = _Counter(program.SequenceScorer, source_dictionary, options)
    batches = _together(models, source_dictionary, batch_iterator)
    scorer, program.SequenceScorer = program.SequenceScorer, counted.scorer
    try:
        results = stock(models, source_dictionary, batches, **options)
    finally:
        program.SequenceScorer = scorer
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
