"""A small Qwen3 mixture of experts in torchtitan's own loop, with its experts on dmoe; a minute on two cores.

    pip install 'dmoe[torchtitan]'    # or make .venv/torchtitan; export PYTHONPATH=.venv/torchtitan
    torchrun --nproc-per-node 2 -m dmoe.integrations.torchtitan --module examples.torchtitan.qwen3_moe \\
        --config small --parallelism.expert_parallel_degree 2    # and any other option of torchtitan
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.qwen3 import model_registry
from torchtitan.trainer import Trainer

from dmoe.integrations.torchtitan import use


@dataclass(kw_only=True, slots=True)
class NoTokenizer(BaseTokenizer.Config):
    """The loader has bytes already."""

    def build(self, **_: Any) -> None:
        """None."""


class Bytes(BaseDataLoader):
    """Windows of a text at random places, other ones on each data-parallel rank; a token is a byte."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """``dataset_path``: the text."""

    def __init__(self, config: Any, *, dp_rank: int, seq_len: int, local_batch_size: int, **_: Any) -> None:
        self.text = torch.tensor(list(Path(config.dataset_path).read_bytes()))
        self.size, self.places, self.drawn = local_batch_size, torch.arange(seq_len), torch.Generator()
        self.drawn.manual_seed(dp_rank)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            first = torch.randint(len(self.text) - len(self.places), (self.size, 1), generator=self.drawn)
            tokens, labels = self.text[first + self.places], self.text[first + self.places + 1]
            yield {"input": tokens, "positions": self.places.expand(self.size, -1)}, labels

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a run that goes on draws its windows anew."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


def small() -> Trainer.Config:
    """Two layers of torchtitan's debug model of Qwen3's mixtures, with narrower experts."""
    spec = model_registry("debugmodel_moe")
    del spec.model.layers[2:]
    for layer in spec.model.layers:
        layer.moe.routed_experts.inner_experts.hidden_dim = 128
        if not torch.accelerator.is_available():  # the CPU trains no FlexAttention
            layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config = Trainer.Config(
        model_spec=spec,
        loss=CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size),
        tokenizer=NoTokenizer(),
        dataloader=Bytes.Config(dataset_path=str(Path(__file__).parents[2] / "README.md")),
        optimizer=default_adamw(lr=1e-3),
        training=TrainingConfig(local_batch_size=4, seq_len=64, steps=50, disable_cuda_graphs=True),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),  # the default wants a newer PyTorch than 2.13
    )
    return use(config)  # this is all
