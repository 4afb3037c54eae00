"""One small GPT with dense or MoE FFNs, for examples, checkpoints of other systems, and generation.

    model = dmoe.models.load("checkpoint", dtype=torch.bfloat16)
    options = dmoe.models.GenerationOptions(output_len=32, end_id=50256, top_p=0.9)
    print(dmoe.models.generate(model, [[16, 33, 76]], options).continuations())

``python -m dmoe.generate`` does the same from the command line.
"""

from __future__ import annotations

from dmoe.models.cache import KeyValueCache
from dmoe.models.config import MoEGPTConfig
from dmoe.models.ffn import DenseFFN
from dmoe.models.generation import Generated, generate
from dmoe.models.gpt import Block, MoEGPT
from dmoe.models.loading import build, load, load_with_extras
from dmoe.models.sampling import GenerationOptions

__all__ = [
    "Block",
    "DenseFFN",
    "Generated",
    "GenerationOptions",
    "KeyValueCache",
    "MoEGPT",
    "MoEGPTConfig",
    "build",
    "generate",
    "load",
    "load_with_extras",
]
