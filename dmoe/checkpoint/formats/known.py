"""The layouts there are, in the order in which files are tried for them."""

from __future__ import annotations

from dmoe.checkpoint.formats.base import Format
from dmoe.checkpoint.formats.fastertransformer import FasterTransformer
from dmoe.checkpoint.formats.megatron_deepspeed import MegatronDeepSpeed

FORMATS: tuple[Format, ...] = (FasterTransformer(), MegatronDeepSpeed())
