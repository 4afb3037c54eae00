"""``--criterion moe_cross_entropy``: cross entropy and the gate loss, and the branch's statistics on the log line.

``loss = nll_sum + wt * sample_size * transform(combine(gate losses))``. ``loss`` and ``inner_loss`` are logged per
token (or sentence) in bits, ``moe_gate_loss`` in nats.
"""

# No postponed annotations in this file: fairseq reads the types of its configs' fields and takes no strings.
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fairseq import utils
from fairseq.criterions import CRITERION_REGISTRY, FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor

from dmoe.integrations.fairseq_moe.flags import FlagError, flag, one_of
from dmoe.integrations.fairseq_moe.layer import moe_layers
from dmoe.integrations.fairseq_moe.statistics import NAMES

COMBINE = ("average", "sum")
TRANSFORMS = ("none", "neg_log")


@dataclass
class MoECrossEntropyConfig(FairseqDataclass):
    """Options of the criterion."""

    moe_gate_loss_wt: float = flag(1.0, "weight of the gate loss beside the cross entropy")
    moe_gate_loss_combine_method: str = flag("average", "'average' or 'sum' of the MoE layers' gate losses")
    moe_gate_loss_transform: str = flag(
        "none", "of the combined gate loss: 'none', or its negative logarithm 'neg_log'"
    )
    sentence_avg: bool = II("optimization.sentence_avg")


class MoECrossEntropyCriterion(FairseqCriterion):
    """See the module."""

    def __init__(
        self,
        task: Any,
        moe_gate_loss_wt: float,
        moe_gate_loss_combine_method: str,
        moe_gate_loss_transform: str,
        sentence_avg: bool,
    ) -> None:
        super().__init__(task)
        for option, value, known in (
            ("combine-method", moe_gate_loss_combine_method, COMBINE),
            ("transform", moe_gate_loss_transform, TRANSFORMS),
        ):
            if value not in known:
                raise FlagError(f"--moe-gate-loss-{option}: expected {one_of(known)}, got {value!r}")
        self.weight, self.sentence_avg = moe_gate_loss_wt, sentence_avg
        self.combine_method, self.transform = moe_gate_loss_combine_method, moe_gate_loss_transform

    def forward(self, model: Any, sample: Any, reduce: bool = True) -> tuple[Tensor, int, dict[str, Any]]:
        """Loss, sample size (its denominator) and what is logged, for one batch."""
        net_output = model(**sample["net_input"])
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        log_probs = model.get_normalized_probs(net_output, log_probs=True)
        nll = F.nll_loss(
            log_probs.view(-1, log_probs.size(-1)),
            model.get_targets(sample, net_output).view(-1),
            ignore_index=self.padding_idx,
            reduction="sum" if reduce else "none",
        )
        gate_loss = sample_size * self.combined(net_output[1].get("l_aux", []), like=nll)
        loss = nll + self.weight * gate_loss
        logged = {
            "loss": loss.data,
            "inner_loss": nll.data,
            "moe_loss": gate_loss.data,
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
            "batch_count": 1,
            **layer_statistics(model),
        }
        return loss, sample_size, logged

    def combined(self, gate_losses: list[Tensor | None], like: Tensor) -> Tensor:
        """One number from those of all MoE layers, ``()`` float32; 0 without any."""
        losses = [loss for loss in gate_losses if loss is not None]
        if not losses:
            return like.new_zeros((), dtype=torch.float32)
        total = torch.stack(losses).sum()
        if self.combine_method == "average":
            total = total / len(losses)
        return -total.log() if self.transform == "neg_log" else total

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Sums over ranks and micro-batches, to the log line."""

        def total(name: str) -> Any:
            return sum(log.get(name, 0) for log in logging_outputs)

        sample_size, tokens, batches = total("sample_size"), total("ntokens"), total("batch_count")
        metrics.log_scalar("loss", total("loss") / sample_size / math.log(2), sample_size, round=3)
        metrics.log_scalar("moe_gate_loss", total("moe_loss") / sample_size, sample_size, round=8)
        for name in NAMES:
            metrics.log_scalar(name, total(name) / batches, batches, round=3)
        metrics.log_scalar("inner_loss", total("inner_loss") / sample_size / math.log(2), sample_size, round=3)
        per_token = "inner_loss"
        if sample_size != tokens:
            metrics.log_scalar("nll_loss", total("inner_loss") / tokens / math.log(2), tokens, round=3)
            per_token = "nll_loss"
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters[per_token].avg))

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Every figure may be added up over ranks before :meth:`reduce_metrics` divides."""
        return True


def layer_statistics(model: Any) -> dict[str, Any]:
    """Means over the MoE layers of each figure of ``statistics.NAMES``, as tensors; zeros without MoE layers."""
    figures = [found for layer in moe_layers(model) if (found := layer.statistics()) is not None]
    if not figures:
        return dict.fromkeys(NAMES, 0)
    return dict(zip(NAMES, torch.stack(figures).mean(0).unbind(), strict=True))


def register() -> None:
    """Make the criterion known under the branch's name; a second call does nothing."""
    if "moe_cross_entropy" not in CRITERION_REGISTRY:
        register_criterion("moe_cross_entropy", dataclass=MoECrossEntropyConfig)(MoECrossEntropyCriterion)
