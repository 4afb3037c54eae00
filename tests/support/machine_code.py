"""What a compiled kernel costs on the chip, read from its machine code: instructions a step, programs side by side."""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from pathlib import Path

# Of one multiprocessor, by architecture: bytes of shared memory, threads. Registers are 64 K everywhere.
_SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
_THREADS = {80: 2048, 90: 2048, 100: 2048}
_RESERVED = 1024  # bytes of shared memory that every program loses to the system
_TENSOR_COLUMNS = 512  # of tensor memory, from 10.0 on

_PRODUCT = re.compile(
    r"\b([HQ]GMMA|[HQ]MMA|UTC\w*MMA)\b"
)  # wgmma, mma (Q: of fp8) and tcgen05 as the machine calls them
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?(\S.*?)\s*;")


def _bin(name: str) -> Path:
    from triton.backends import nvidia

    return Path(nvidia.__file__).parent / "bin" / name


def told_about(cubin: bytes, tool: str, *options: str) -> str:
    """What ``cuobjdump`` or ``nvdisasm``, which lie in Triton, print about a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_bin(tool)), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def disassembled(cubin: bytes) -> str:
    """Its code. Without the analysis of data flow, which takes a third of the time and finds nothing in these."""
    return told_about(cubin, "nvdisasm", "-c", "-ndf")


def main_loop(sass: str) -> list[str] | None:
    """The instructions of one step of the main loop; None where nothing is multiplied in a loop.

    The main loop is the tightest one with a matrix product (:data:`_PRODUCT`) in it, and a step the shortest way
    round it: from a product along jumps, taken or not, back to the same product, every instruction on the way once. A
    simple loop is one stretch of code between a label and the jump back to it, and this is that stretch; where the loop
    over tiles is fused into it, what happens only between two tiles lies beside that way, and so does waiting. Where
    the assembler unrolled the loop, several steps count as one, or all of a tile's.
    """
    blocks = _blocks(sass)
    ways = [_way_round(blocks, name) for name, (code, _) in blocks.items() if any(_PRODUCT.search(c) for c in code)]
    shortest = min((way for way in ways if way), key=lambda way: sum(len(blocks[n][0]) for n in way), default=None)
    return shortest and [instruction for name in shortest for instruction in blocks[name][0]]


def one_by_one(step: list[str]) -> bool:
    """Whether a step of wgmma waits for its last product before it begins the next: the assembler could not see that
    nobody touches the sums in between, or the compiler asked for it."""
    return any(instruction.startswith("WARPGROUP.DEPBAR.LE gsb0, 0x0") for instruction in step)


def _blocks(sass: str) -> dict[str, tuple[list[str], list[str]]]:
    """Stretches without a jump by name: their instructions, and the names of those that may follow."""
    blocks: dict[str, tuple[list[str], list[str]]] = {}
    current: tuple[list[str], list[str]] = ([], [])
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            current[1].append(label[1])
            current = blocks[label[1]] = ([], [])
        elif found := _INSTRUCTION.match(line):
            predicate, text = found.groups()
            current[0].append(text)
            operation = text.split()[0].split(".")[0]
            if operation not in ("BRA", "EXIT", "RET", "BRX", "JMP"):
                continue
            if operation in ("BRA", "JMP") and (target := re.search(r"`\((\.L_x_\d+)\)", text)):
                current[1].append(target[1])
            conditional = predicate is not None or re.search(r"^\S+\s+!?U?P\d", text) is not None
            name = f"after {len(blocks)}"
            if conditional:
                current[1].append(name)
            current = blocks[name] = ([], [])
    return blocks


def _way_round(blocks: dict[str, tuple[list[str], list[str]]], start: str) -> list[str] | None:
    """The blocks on the way with the fewest instructions from a block back to its own beginning."""
    queue: list[tuple[int, list[str]]] = [(0, [start])]
    reached = set()
    while queue:
        length, way = heapq.heappop(queue)
        if len(way) > 1 and way[-1] == start:
            return way[:-1]
        if way[-1] in reached:
            continue
        reached.add(way[-1])
        code, followers = blocks[way[-1]]
        for name in followers:
            if name in blocks and (name == start or name not in reached):
                heapq.heappush(queue, (length + len(code), [*way, name]))
    return None


def side_by_side(arch: int, registers: int, warps: int, shared: int, tensor_columns: int = 0) -> int:
    """Programs that one multiprocessor holds at once, by what each takes of its registers, shared memory and threads.

    Registers come in eights a thread, and warps of a program lie spread over four equal parts of the multiprocessor.
    """
    warps_of_a_quarter = 64 * 1024 // 4 // (32 * -(-registers // 8) * 8)
    limits = [
        warps_of_a_quarter // -(-warps // 4) if warps >= 4 else 4 * warps_of_a_quarter // warps,
        _SHARED[arch] // (shared + _RESERVED),
        _THREADS[arch] // (32 * warps),
        32,
    ]
    if tensor_columns:
        limits.append(_TENSOR_COLUMNS // tensor_columns)
    return min(limits)
