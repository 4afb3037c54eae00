"""Writing a file that ``torch.load`` reads, with tensors that come one at a time and are not in memory together."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dmoe.checkpoint.stand_ins import StandIn
from dmoe.checkpoint.stored import Stored, held


def write_lazily(file: BinaryIO, content: Any, progress: Callable[[int], object] = lambda count: None) -> None:
    """Write to a file in the format of ``torch.save``.

    Tensors, and every :class:`Stored`, are written contiguous, each with a storage of its own: one that stands at
    several places (the same object) is written once. A :class:`StandIn` becomes the object that it stands for again.

    Args:
        file: open for writing.
        content: dicts and lists of tensors and plain data.
        progress: told the bytes of each tensor when it is on its way to the file.

    Raises:
        OSError: it cannot be written.
        pickle.PicklingError, TypeError: an object that cannot be pickled.
    """
    pickler = _Pickler(buffer := io.BytesIO())
    pickler.dump(content)
    sink = _Sink(file)
    archive: Any = torch._C.PyTorchFileWriter(sink)  # type: ignore[call-overload]
    try:
        for name, record in (("data.pkl", buffer.getvalue()), ("byteorder", b"little")):
            archive.write_record(name, record, len(record))
        for number, stored in enumerate(pickler.tensors):
            tensor = stored.read().contiguous()
            alone = tensor if tensor.untyped_storage().nbytes() == stored.nbytes else tensor.clone()
            archive.write_record(f"data/{number}", alone.untyped_storage(), stored.nbytes)
            sink.check()
            progress(stored.nbytes)
        archive.write_end_of_file()
        sink.check()
    except BaseException as error:
        sink.error = sink.error or error
        raise


class _Sink:
    """A file whose errors wait: the archive ends itself when it goes, and an error there would end the process."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: BaseException | None = None

    def write(self, content: Any) -> int:
        if self.error is None:
            try:
                self.file.write(content)
            except BaseException as error:  # raised by check
                self.error = error
        return len(content)

    def check(self) -> None:
        if self.error is not None:
            raise self.error


class _Storage:
    """What a pickled tensor says of its numbers: ``data/{number}`` holds them."""

    def __init__(self, number: int, stored: Stored) -> None:
        self.number, self.stored = number, stored


_PYTHONS: Any = pickle._Pickler  # written in Python: it lets names be written unseen


class _Pickler(_PYTHONS):
    """Pickles tensors as ``torch.save`` does, and stand-ins under the names that they stand for."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[Stored] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        kind = _storage_class(obj.stored.dtype)
        count = obj.stored.nbytes if kind is None else torch.Size(obj.stored.shape).numel()
        return "storage", kind or torch.UntypedStorage, str(obj.number), "cpu", count

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return self._tensor(held(obj))
        if isinstance(obj, Stored):
            return self._tensor(obj)
        return NotImplemented

    def save(self, obj: Any, save_persistent_id: bool = True) -> Any:
        if isinstance(obj, type) and issubclass(obj, StandIn):
            return self._name(obj.path)
        if isinstance(obj, StandIn):
            if id(obj) in self.memo:
                return self.write(self.get(self.memo[id(obj)][0]))
            return self._stand_in(obj)
        return super().save(obj, save_persistent_id)

    def _stand_in(self, obj: StandIn) -> None:
        if obj.attribute is not None:
            self._name("builtins.getattr")
            self.save((type(obj), obj.attribute))
        else:
            self._name(obj.path)
            self.save(obj.arguments)
        self.write(pickle.REDUCE)
        self.memoize(obj)
        if obj.state is not None:
            self.save(obj.state)
            self.write(pickle.BUILD)

    def _name(self, path: str) -> None:
        module, _, name = path.rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())

    def _tensor(self, stored: Stored) -> Any:
        number = len(self.tensors)
        self.tensors.append(stored)
        stride = torch.empty(stored.shape, device="meta").stride()
        given: tuple[Any, ...] = (_Storage(number, stored), 0, stored.shape, stride, False, OrderedDict())
        if _storage_class(stored.dtype) is None:
            return torch._utils._rebuild_tensor_v3, (*given, stored.dtype)
        return torch._utils._rebuild_tensor_v2, given


def _storage_class(dtype: torch.dtype) -> Any:
    """What old releases of PyTorch know a dtype by; None for dtypes that came later."""
    return getattr(torch, torch.storage._dtype_to_storage_type_map().get(dtype, ""), None)
