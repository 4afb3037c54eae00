"""Fine-tuning of a finished run's mixture: what is trained, in which form experts are held, what memory it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dmoe

from .data import Corpus, training_batch
from .optimizer import optimizer
from .settings import Settings
from .training import Run

_OF_COMPARISONS = ("compare_dense", "dense_lr", "seeds", "teacher", "kd_temperature", "kd_coefficient", "kd_stop")


@dataclass(frozen=True)
class Way:
    """One way to fine-tune.

    Attributes:
        experts: what experts are held as: None as they are trained, or a format of :mod:`dmoe.quant`.
        rank: of the adapters; None trains all weights.
    """

    experts: str | None
    rank: int | None

    @property
    def name(self) -> str:
        """For the table and the picture."""
        held = self.experts or "float32"
        return f"{held} experts, LoRA of rank {self.rank}" if self.rank else f"{held}, all weights trained"


class FineTuning(Run):
    """A run that begins with another one's weights.

    Args:
        way: what is trained.
        weights: the state of the base's model.
        settings: of this run; sizes of the model are the base's.
        corpus: the other text.
        device: where it runs.
    """

    def __init__(
        self, way: Way, weights: Mapping[str, Any], settings: Settings, corpus: Corpus, device: torch.device
    ) -> None:
        super().__init__("moe", settings, corpus, device)
        self.name, self.way = way.name, way
        self.model.load_state_dict(weights)
        if way.experts is not None:
            dmoe.quant.quantize(self.model, way.experts)
        if way.rank is not None:
            dmoe.lora.add(self.model, rank=way.rank, alpha=2 * way.rank)
        self.optimizer = optimizer(self.model, settings)

    def memory(self) -> dict[str, int]:
        """Bytes that a step needs for ``experts``, ``other weights``, ``gradients``, ``optimizer``, and ``saved``.

        Counted, not measured: AdamW keeps two numbers for each that is trained, and ``saved`` is what autograd keeps of
        one batch beside the weights.
        """
        held = [*self.model.parameters(), *self.model.buffers()]
        of_experts = {id(t) for layer in self.model.moe_layers for t in _tensors_of(layer.experts)}
        experts = sum(_bytes(t) for t in held if id(t) in of_experts)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return {
            "experts": experts,
            "other weights": sum(map(_bytes, held)) - experts,
            "gradients": sum(map(_bytes, trained)),
            "optimizer": 2 * sum(map(_bytes, trained)),
            "saved": self._saved(held),
        }

    def _saved(self, held: list[Tensor]) -> int:
        own = {tensor.untyped_storage().data_ptr() for tensor in held}
        found: dict[int, int] = {}
        kept: list[Tensor] = []  # so that no memory is freed and taken again, under the same address

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
                kept.append(tensor)
            return tensor

        s = self.settings
        inputs, _ = training_batch(self.corpus, seed=s.seed, step=0, batch=s.batch, seq_len=s.seq_len)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self._logits(self.model, self._to_device(inputs))
        if self.model.moe_layers:
            dmoe.aux_loss(self.model)  # read, and thereby gone
        return sum(found.values())


def settings_of(base: Mapping[str, Any], **changed: Any) -> Settings:
    """Settings of a fine-tuning: the base's, with what is changed; nothing is compared and nobody teaches."""
    default = Settings()
    plain: dict[str, Any] = {name: getattr(default, name) for name in _OF_COMPARISONS}
    return dataclasses.replace(Settings.from_dict(dict(base)), **plain, **changed)


def _tensors_of(module: torch.nn.Module) -> list[Tensor]:
    """Of the experts themselves, without their adapters."""
    held = (*module.named_parameters(), *module.named_buffers())
    return [tensor for name, tensor in held if not name.startswith("lora.")]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
