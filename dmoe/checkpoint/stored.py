"""Tensors that lie in files: what is known of them at once, and their numbers when they are asked for.

A converter is a table of which tensor is made of which: it makes :class:`Stored` of `Stored`, and no number moves
before a writer reads the result, tensor by tensor. So a model larger than memory passes through, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

Join: TypeAlias = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Stored:
    """A tensor to be read.

    Attributes:
        shape, dtype: of the tensor.
        fetch: ``fetch(start, stop)`` reads those rows of its first dimension; of a single number ``fetch(0, 1)`` does.
            What it returns is the caller's own, or not written to.
        where: the file it is in, for messages.
        numbers: where the tensor lies in one piece: ``numbers(start, stop)`` reads those of its numbers in C order, so
            that it can be given another shape and still be read in parts. None where it is made of something.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Callable[[int, int], Tensor]
    where: str = ""
    numbers: Callable[[int, int], Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """All of it, on the CPU."""
        return self.rows(0, self.shape[0] if self.shape else 1)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the first dimension; no more of the file is read where that is possible.

        Raises:
            ValueError: what was read is not what was announced, as where a file has changed meanwhile.
        """
        tensor = self.fetch(start, stop)
        expected = (stop - start, *self.shape[1:]) if self.shape else ()
        if tuple(tensor.shape) != expected or tensor.dtype != self.dtype:
            raise ValueError(
                f"{self.where or 'a tensor'}: expected {self.dtype} of {expected}, got {tensor.dtype} of "
                f"{tuple(tensor.shape)}"
            )
        return tensor

    def meta(self) -> Tensor:
        """A tensor without numbers, of this shape and dtype."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def held(tensor: Tensor, where: str = "") -> Stored:
    """A tensor in memory as one to be read."""
    tensor = tensor.detach().to("cpu")
    shape = tuple(tensor.shape)
    if tensor.is_contiguous():
        return in_one_piece(shape, tensor.dtype, lambda a, b: tensor.view(-1)[a:b], where)
    return Stored(shape, tensor.dtype, lambda a, b: tensor[a:b] if shape else tensor, where)


def in_one_piece(
    shape: tuple[int, ...], dtype: torch.dtype, numbers: Callable[[int, int], Tensor], where: str = ""
) -> Stored:
    """A tensor whose numbers lie one after the other: ``numbers(start, stop)`` reads those, ``(stop - start,)``."""
    row = torch.Size(shape[1:]).numel()

    def fetch(start: int, stop: int) -> Tensor:
        return numbers(start * row, stop * row).view((stop - start, *shape[1:]) if shape else ())

    return Stored(shape, dtype, fetch, where, numbers)


def reshaped(stored: Stored, shape: tuple[int, ...]) -> Stored:
    """The same numbers in C order, in another shape.

    Raises:
        ValueError: of another number of numbers.
    """
    if torch.Size(shape).numel() != torch.Size(stored.shape).numel():
        raise ValueError(f"{stored.where or 'a tensor'}: expected numbers for {shape}, got a tensor of {stored.shape}")
    if stored.numbers is not None:
        return in_one_piece(shape, stored.dtype, stored.numbers, stored.where)
    return mapped([stored], lambda tensors: tensors[0].reshape(shape))


def mapped(
    parts: Sequence[Stored], join: Join, *, by_rows: bool = False, shape: tuple[int, ...] | None = None
) -> Stored:
    """What ``join`` makes of tensors.

    Args:
        parts: what it is given, in a list.
        join: a pure function of tensors. It is called with tensors on ``meta`` first, for shape and dtype, without a
            ``shape``.
        by_rows: whether rows of the result are made of the same rows of every part, so that a few need only those.
        shape: of the result, in the dtype of the first part. ``torch.cat`` on ``meta`` would import what takes 145 MB.
    """
    made = join([part.meta() for part in parts]) if shape is None else None
    where = next((part.where for part in parts if part.where), "")

    def fetch(start: int, stop: int) -> Tensor:
        if by_rows:
            return join([part.rows(start, stop) for part in parts])
        whole = join([part.read() for part in parts])
        return whole[start:stop] if whole.dim() else whole

    if made is None:
        assert shape is not None
        return Stored(shape, parts[0].dtype, fetch, where)
    return Stored(tuple(made.shape), made.dtype, fetch, where)


def stacked(parts: Sequence[Stored]) -> Stored:
    """Tensors of one shape along a new first dimension, of which some rows need only those parts.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    first = _alike(parts, 0)

    def fetch(start: int, stop: int) -> Tensor:
        whole = torch.empty((stop - start, *first.shape), dtype=first.dtype)
        for row, part in enumerate(parts[start:stop]):
            whole[row] = part.read()
        return whole

    return Stored((len(parts), *first.shape), first.dtype, fetch, first.where)


def taken(stored: Stored, row: int) -> Stored:
    """One row of the first dimension, without that dimension."""
    if len(stored.shape) == 1:
        return Stored((), stored.dtype, lambda a, b: stored.rows(row, row + 1)[0], stored.where)
    return Stored(stored.shape[1:], stored.dtype, lambda a, b: stored.rows(row, row + 1)[0][a:b], stored.where)


def concatenated(parts: Sequence[Stored], dim: int = 0) -> Stored:
    """Tensors one after the other along a dimension.

    Raises:
        ValueError: dtypes differ, or shapes in any other dimension.
    """
    if len(parts) == 1:
        return parts[0]
    first = _alike(parts, dim, free=True)
    if dim:
        shape = (*first.shape[:dim], sum(part.shape[dim] for part in parts), *first.shape[dim + 1 :])
        return mapped(parts, lambda tensors: torch.cat(list(tensors), dim), by_rows=True, shape=shape)

    def fetch(start: int, stop: int) -> Tensor:
        whole = torch.empty((stop - start, *first.shape[1:]), dtype=first.dtype)
        before = 0
        for part in parts:
            a, b = max(start, before), min(stop, before + part.shape[0])
            if a < b:
                whole[a - start : b - start] = part.rows(a - before, b - before)
            before += part.shape[0]
        return whole

    return Stored((sum(part.shape[0] for part in parts), *first.shape[1:]), first.dtype, fetch, first.where)


def cut(stored: Stored, dim: int, start: int, stop: int) -> Stored:
    """Positions ``start`` to ``stop`` along a dimension."""
    if dim:
        return mapped([stored], lambda tensors: tensors[0].narrow(dim, start, stop - start), by_rows=True)
    return replace(
        stored,
        shape=(stop - start, *stored.shape[1:]),
        fetch=lambda a, b: stored.rows(start + a, start + b),
        numbers=None,
    )


def cast(stored: Stored, dtype: torch.dtype) -> Stored:
    """The same numbers in another dtype, rounded to nearest even."""
    if stored.dtype == dtype:
        return stored
    return replace(stored, dtype=dtype, fetch=lambda a, b: stored.rows(a, b).to(dtype), numbers=None)


def same(first: Stored, other: Stored) -> bool:
    """Whether two are equal in shape, dtype and every bit; a few megabytes of each are in memory at a time."""
    if (first.shape, first.dtype) != (other.shape, other.dtype):
        return False
    rows = first.shape[0] if first.shape else 1
    each = max(1, (4 << 20) * rows // max(1, first.nbytes))
    return all(
        torch.equal(_bits(first.rows(a, min(rows, a + each))), _bits(other.rows(a, min(rows, a + each))))
        for a in range(0, rows, each)
    )


def total_bytes(tensors: Mapping[str, Stored]) -> int:
    """Bytes of all of them."""
    return sum(tensor.nbytes for tensor in tensors.values())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _alike(parts: Sequence[Stored], dim: int, *, free: bool = False) -> Stored:
    """The first of tensors that agree in dtype and shape, but for ``dim`` where that is ``free``."""
    first = parts[0]
    for part in parts[1:]:
        shapes = [list(each.shape) for each in (first, part)]
        if free and min(map(len, shapes)) > dim:
            shapes[0][dim] = shapes[1][dim]
        if shapes[0] != shapes[1] or first.dtype != part.dtype:
            raise ValueError(
                f"{part.where or 'a part'}: expected {first.dtype} of {first.shape} as in {first.where or 'the first'}"
                f", got {part.dtype} of {part.shape}"
            )
    return first
