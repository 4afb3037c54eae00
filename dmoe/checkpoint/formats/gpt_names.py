"""A GPT with MoE layers, tensor by tensor: its names in dmoe, Megatron and FasterTransformer, and how ranks cut it."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Kind(enum.Enum):
    """What Megatron's and FasterTransformer's ranks hold of a tensor."""

    WHOLE = "all of it on every rank"
    GATE = "all of it; FasterTransformer has it transposed"
    VOCABULARY = "Megatron: some rows; FasterTransformer: all of it"
    HEADS = "the queries, keys and values of some heads"
    ROWS = "some outputs of a linear layer"
    COLUMNS = "some inputs of a linear layer"


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a GPT's tensors are made of.

    Attributes:
        vocabulary, hidden, layers, heads, ffn, positions: V (padded), H, layers, attention heads, F, longest sequence.
        experts: E of each MoE layer, by the layer's number in the whole model.
        residual: those of them that have a dense block beside the experts (PR-MoE).
    """

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    ffn: int
    positions: int
    experts: dict[int, int] = field(default_factory=dict)
    residual: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Part:
    """A tensor of the model.

    Attributes:
        ours: its name in :class:`dmoe.models.MoEGPT`, behind ``blocks.{l}.`` where it belongs to a layer.
        theirs: its name in a FasterTransformer folder, behind ``layers.{l}.``. Megatron's is the same but for
            ``mlp.moe.``, and for ``attention.``, which is ``self_attention.`` there since 2022.
        shape: of the whole tensor in dmoe; an expert tensor's begins with E.
        kind: how it is cut.
        expert: whether it is one tensor for each expert.
    """

    ours: str
    theirs: str
    shape: tuple[int, ...]
    kind: Kind = Kind.WHOLE
    expert: bool = False

    @property
    def matrix(self) -> bool:
        """Whether it is a linear layer's weight (of each expert), and not a bias."""
        return len(self.shape) == 2 + self.expert

    @property
    def cut(self) -> bool:
        """Whether FasterTransformer's ranks have files of their own."""
        return self.kind in (Kind.HEADS, Kind.ROWS, Kind.COLUMNS)

    @property
    def by_rows(self) -> bool:
        """Whether rows of the tensor (experts, or rows of one that is whole) are the same rows of every file's."""
        return self.expert or self.kind in (Kind.WHOLE, Kind.VOCABULARY)


EXPERTS, GATE = "mlp.moe.experts.", "mlp.moe.gate.wg.weight"
DENSE = "mlp."
RESIDUAL = "mlp.mlp."
COEFFICIENT = "mlp.coefficient."


def embedding_parts(sizes: Sizes) -> list[Part]:
    """What comes before the layers."""
    return [
        Part("embedding.weight", "wte", (sizes.vocabulary, sizes.hidden), Kind.VOCABULARY),
        Part("positions.weight", "wpe", (sizes.positions, sizes.hidden)),
    ]


def last_parts(sizes: Sizes) -> list[Part]:
    """What comes behind the layers; the head is the embedding."""
    return [Part(f"norm.{kind}", f"final_layernorm.{kind}", (sizes.hidden,)) for kind in ("weight", "bias")]


def layer_parts(sizes: Sizes, layer: int) -> list[Part]:
    """The tensors of a layer, in the order of the model."""
    h = sizes.hidden
    parts = [Part(f"attention_norm.{kind}", f"input_layernorm.{kind}", (h,)) for kind in ("weight", "bias")]
    parts += [
        Part("attention.qkv.weight", "attention.query_key_value.weight", (3 * h, h), Kind.HEADS),
        Part("attention.qkv.bias", "attention.query_key_value.bias", (3 * h,), Kind.HEADS),
        Part("attention.out.weight", "attention.dense.weight", (h, h), Kind.COLUMNS),
        Part("attention.out.bias", "attention.dense.bias", (h,)),
    ]
    parts += [Part(f"ffn_norm.{kind}", f"post_attention_layernorm.{kind}", (h,)) for kind in ("weight", "bias")]
    if layer not in sizes.experts:
        return parts + list(_dense("ffn.", DENSE, sizes))
    parts += list(_moe(moe_prefix(sizes, layer), sizes, sizes.experts[layer]))
    if layer in sizes.residual:
        parts += list(_dense("ffn.mlp.", RESIDUAL, sizes))
        parts.append(Part("ffn.coefficient.weight", COEFFICIENT + "weight", (2, h)))
        parts.append(Part("ffn.coefficient.bias", COEFFICIENT + "bias", (2,)))
    return parts


def moe_prefix(sizes: Sizes, layer: int) -> str:
    """Where the :class:`dmoe.MoE` of a layer is, behind ``blocks.{l}.``."""
    return "ffn.moe." if layer in sizes.residual else "ffn."


def _dense(ours: str, theirs: str, sizes: Sizes) -> Iterator[Part]:
    h, f = sizes.hidden, sizes.ffn
    yield Part(ours + "up_proj.weight", theirs + "dense_h_to_4h.weight", (f, h), Kind.ROWS)
    yield Part(ours + "up_proj.bias", theirs + "dense_h_to_4h.bias", (f,), Kind.ROWS)
    yield Part(ours + "down_proj.weight", theirs + "dense_4h_to_h.weight", (h, f), Kind.COLUMNS)
    yield Part(ours + "down_proj.bias", theirs + "dense_4h_to_h.bias", (h,))


def _moe(ours: str, sizes: Sizes, experts: int) -> Iterator[Part]:
    h, f, e = sizes.hidden, sizes.ffn, experts
    yield Part(ours + "router.weight", GATE, (e, h), Kind.GATE)
    yield Part(ours + "experts.up_proj", EXPERTS + "dense_h_to_4h.weight", (e, f, h), Kind.ROWS, True)
    yield Part(ours + "experts.up_bias", EXPERTS + "dense_h_to_4h.bias", (e, f), Kind.ROWS, True)
    yield Part(ours + "experts.down_proj", EXPERTS + "dense_4h_to_h.weight", (e, h, f), Kind.COLUMNS, True)
    yield Part(ours + "experts.down_bias", EXPERTS + "dense_4h_to_h.bias", (e, h), Kind.WHOLE, True)


def all_parts(sizes: Sizes) -> Iterator[tuple[str, str, Part]]:
    """Every tensor in the order of the model: its whole name in dmoe, in FasterTransformer (without ``model.``), it."""
    for part in embedding_parts(sizes):
        yield part.ours, part.theirs, part
    for layer in range(sizes.layers):
        for part in layer_parts(sizes, layer):
            yield f"blocks.{layer}.{part.ours}", f"layers.{layer}.{part.theirs}", part
    for part in last_parts(sizes):
        yield part.ours, part.theirs, part


def ft_pieces(part: Part, tensor: Tensor, gpus: int) -> list[Tensor]:
    """What FasterTransformer's ranks have of a tensor.

    Args:
        part: which one.
        tensor: of ``part.shape``; some of its experts are enough where it has any, some rows of one that is whole.
        gpus: N, a divisor of the heads and of F.

    Returns:
        A tensor for each rank, or one for all; linear weights as (in, out).
    """
    if not part.cut:
        return [tensor.mT if part.kind is Kind.GATE else tensor]
    if part.kind is Kind.HEADS:  # (3, heads, D) and, of the weight, H
        own = tensor.unflatten(0, (3, gpus, -1)).unbind(1)
        return [piece.permute(2, 0, 1) if part.matrix else piece for piece in own]
    dim = -1 if part.kind is Kind.COLUMNS or not part.matrix else -2
    pieces = tensor.unflatten(dim, (gpus, -1)).unbind(dim - 1)
    return [piece.mT if part.matrix else piece for piece in pieces]


def ft_joined(part: Part, pieces: Sequence[Tensor]) -> Tensor:
    """The inverse of :func:`ft_pieces`."""
    if not part.cut:
        return pieces[0].mT if part.kind is Kind.GATE else pieces[0]
    if part.kind is Kind.HEADS:
        return torch.cat([piece.permute(1, 2, 0) if part.matrix else piece for piece in pieces], 1).flatten(0, 1)
    dim = -1 if part.kind is Kind.COLUMNS or not part.matrix else -2
    return torch.cat([piece.mT if part.matrix else piece for piece in pieces], dim)


def megatron_rows(tensor: Tensor, heads: int) -> Tensor:
    """dmoe's rows of queries, keys and values, (3, heads, D), in Megatron's order: (heads, 3, D)."""
    return tensor.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def dmoe_rows(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of :func:`megatron_rows`."""
    return tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
