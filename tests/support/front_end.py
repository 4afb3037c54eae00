"""Tells by what the compiler is given whether a kernel has to be compiled to know what it makes of it.

The front end is quick: it turns a kernel's source, with the constants and the alignments of one launch, into Triton's
own language. What stands there without the places in files, and the options of compiling, are all that the rest
sees; where both are as they were when the table was made, with the same Triton, the rest does as it did.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
from dataclasses import dataclass

PARTS = 24  # a day compiles one part of what has not changed


@dataclass
class Known:
    """Takes the place of a compiled kernel: its line of the table."""

    row: dict


def digest_of(src, target, options) -> str:
    """16 hexadecimal digits that tell one input of the compiler from another."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    backend = make_backend(target)
    options = backend.parse_options({**(options or {}), **src.parse_options()})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    text = src.make_ir(target, options, functions, modules, context).str_nodebug()
    return hashlib.sha256(f"{text}{options.hash()}".encode()).hexdigest()[:16]


@contextlib.contextmanager
def instead_of_compiling(rows: list[dict]):
    """Inside, Triton gives :class:`Known` for kernels whose digest is that of a row, and compiles others.

    What is compiled has its digest as ``source``, and so has every row. A process enters it once, before its kernels
    are asked for the first time: each keeps the compiler that it found.
    """
    from triton import compiler

    known, compile_it = {row["source"]: row for row in rows}, compiler.compile

    def look_first(src, target=None, options=None, **others):
        source = digest_of(src, target, options)
        if source in known:
            return Known(known[source])
        compiled = compile_it(src, target=target, options=options, **others)
        compiled.source = source
        return compiled

    compiler.compile = look_first
    try:
        yield
    finally:
        compiler.compile = compile_it


def unchanged(tables: dict[str, list[dict]], day: int | None = None) -> list[dict]:
    """Rows of {case: rows} that need not be made again on a day (today) if their source is the same: all but that day's
    part, which shows that the record is true. With ``DMOE_KERNELS=all`` none."""
    if os.environ.get("DMOE_KERNELS") == "all":
        return []
    part = (datetime.date.today().toordinal() if day is None else day) % PARTS
    return [row for rows in tables.values() for row in rows if int(row["source"], 16) % PARTS != part]
