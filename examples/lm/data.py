"""Text as bytes: where it comes from, how it is split, and which bytes make up a batch.

Nothing here keeps a position. The batch of step ``n`` is a function of the text, the seed and ``n``, so a resumed run
sees the batches that it would have seen.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .settings import UsageError

HELD_OUT_SHARE = 0.05
# Below this many files a split by file would be a lottery, so the last part of every file is held out instead.
MIN_FILES_FOR_SPLIT = 20
_BLOCK = 1024  # bytes of the help topics that stay together
# Of the standard library: other people's packages and tests are not its text; code pages and help topics are tables.
SKIPPED_IN_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Corpus:
    """Training text and held-out text, which share no bytes of any file."""

    name: str
    """What a reader of the report should call the text."""
    train: Tensor
    """``(N,)`` uint8."""
    held_out: Tensor
    """``(M,)`` uint8."""
    files: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the text and its split: two corpora that agree in it train alike."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()


def load_corpus(data: Sequence[str], max_bytes: int, seq_len: int) -> Corpus:
    """Reads at most ``max_bytes`` of text and holds out a twentieth of it, by whole files where there are enough.

    Files are taken in the order of a hash of their paths below the folder given: the same on every machine, and not
    the alphabet, so that what a limit leaves out, or the split takes away, is no particular kind of file.

    Args:
        data: files and folders; empty means the sources of the Python standard library.
        max_bytes: where to stop reading.
        seq_len: bytes in a training sequence; each part of the split must hold a sequence and one byte more.

    Raises:
        UsageError: a path does not exist or cannot be read, there is no text, or it is too short.
    """
    if data:
        name = ", ".join(Path(path).name or path for path in data)
        found = [(f"{number}/{label}", path) for number, root in enumerate(data) for label, path in _user_files(root)]
    else:
        name = "the Python standard library"
        found = list(_stdlib_files())
    found.sort(key=lambda item: hashlib.sha256(item[0].encode()).digest())
    texts: list[bytes] = []
    room = max_bytes
    for _, path in found:
        try:
            text = path.read_bytes()[:room]
        except OSError as error:
            raise UsageError(f"--data: cannot read {path}: {error.strerror}") from error
        if text:
            texts.append(text)
            room -= len(text)
        if room == 0:
            break
    where = f"--data {' '.join(data)}" if data else f"the standard library in {sysconfig.get_path('stdlib')}"
    if not texts:
        raise UsageError(f"{where} holds no text: {len(found)} files, 0 bytes. Name a text file or folder with --data")
    train, held_out = _split(texts)
    for part, size in (("training", len(train)), ("held-out", len(held_out))):
        if size < seq_len + 1:
            raise UsageError(
                f"{where} is too short: the {part} part has {size} bytes, and a sequence takes {seq_len + 1} "
                f"(--seq-len {seq_len}, and the byte after it). Give more text, or a smaller --seq-len"
            )
    return Corpus(name, _as_tensor(train), _as_tensor(held_out), len(texts))


def help_topics() -> Corpus:
    """Python's help topics, English that comes with Python: what recipes fine-tune on."""
    from pydoc_data.topics import topics

    joined = "\n".join(topics[key] for key in sorted(topics)).encode()
    text = torch.frombuffer(bytearray(joined), dtype=torch.uint8)
    blocks = text[: len(text) // _BLOCK * _BLOCK].view(-1, _BLOCK)  # topics differ: some of each are held out
    aside = torch.arange(len(blocks)) % 20 == 0
    return Corpus("Python's help topics", blocks[~aside].flatten(), blocks[aside].flatten(), len(topics))


def training_batch(corpus: Corpus, *, seed: int, step: int, batch: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """The inputs and targets of one step, each ``(batch, seq_len)`` int64: random windows drawn from (seed, step)."""
    starts = torch.randint(len(corpus.train) - seq_len, (batch,), generator=_generator(seed, step))
    return _windows(corpus.train, starts, seq_len)


def held_out_batches(corpus: Corpus, *, max_bytes: int, batch: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows spread evenly over the held-out text, the same at every call; at most ``max_bytes`` targets in all."""
    held_out = corpus.held_out
    count = max(1, min(max_bytes, len(held_out) - 1) // seq_len)
    last = len(held_out) - 1 - seq_len
    starts = torch.tensor([last * index // max(1, count - 1) for index in range(count)])
    for chunk in starts.split(batch):
        yield _windows(held_out, chunk, seq_len)


def _windows(text: Tensor, starts: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    windows = text[starts[:, None] + torch.arange(seq_len + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def _generator(seed: int, step: int) -> torch.Generator:
    # Hashed, because a CPU generator keeps 32 bits of its seed, and neighbouring seeds should share nothing.
    digest = hashlib.sha256(f"batch {seed} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def _user_files(root: str) -> Iterator[tuple[str, Path]]:
    path = Path(root)
    if path.is_file():
        yield path.name, path
    elif path.is_dir():
        for file in path.rglob("*"):
            label = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") for part in label.parts):
                yield label.as_posix(), file
    else:
        raise UsageError(f"--data {root}: no such file or folder")


def _stdlib_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for file in root.rglob("*.py"):
        label = file.relative_to(root)
        if not SKIPPED_IN_STDLIB.intersection(label.parts):
            yield label.as_posix(), file


def _split(texts: list[bytes]) -> tuple[bytes, bytes]:
    wanted = HELD_OUT_SHARE * sum(map(len, texts))
    train, held_out, taken = [], [], 0
    for text in texts:
        if len(texts) < MIN_FILES_FOR_SPLIT:
            cut = len(text) - int(HELD_OUT_SHARE * len(text))
            train.append(text[:cut])
            held_out.append(text[cut:])
        elif taken < wanted and taken + len(text) <= 2 * wanted:  # one huge file must not be most of what is held out
            held_out.append(text)
            taken += len(text)
        else:
            train.append(text)
    return b"".join(train), b"".join(held_out)


def _as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
