"""What lies beside a model's tensors and belongs to one made of it, too: tokenizer, generation config, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

_FILES = (
    *("tokenizer*.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("spiece.model", "*.tiktoken", "tekken.json", "chat_template.*", "generation_config.json", "LICENSE*", "NOTICE*"),
    *("USE_POLICY*", "preprocessor_config.json", "processor_config.json"),
)
_FOLDERS = ("additional_chat_templates",)


def copy_beside(source: Path, target: Path) -> None:
    """Copy a model's tokenizer, chat templates, generation config and licence into another folder, where there are any.

    Raises:
        OSError: a file cannot be read, or written.
    """
    for path in sorted({path for pattern in _FILES for path in source.glob(pattern)}):
        if path.is_file():
            shutil.copyfile(path, target / path.name)
    for name in _FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
