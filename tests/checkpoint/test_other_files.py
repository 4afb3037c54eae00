"""Files that are no checkpoints: a sentence with the file's name, whatever torch makes of their bytes."""

from __future__ import annotations

import io

import pytest
import torch

from dmoe.checkpoint import read_file
from dmoe.checkpoint.__main__ import main


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


WHOLE = saved({"weight": torch.ones(3000)})
OTHERS = {
    "text": b"iteration 7\nloss 3.2\n",
    "nothing": b"",
    "half a file": WHOLE[: len(WHOLE) // 2],
    "all but its end": WHOLE[:-4],
    "the beginning of a pickle": b"\x80\x02K",
    "zeros": bytes(100),
    "one letter": b"q" * 5000,
    "json": b'{"a": 1}\n',
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
def test_other_files_are_told_apart(tmp_path, capsys, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a file of torch\.save, got: .") as told:
        read_file(path)
    assert str(told.value).startswith(f"{path}: ")
    assert "Weights only load failed" not in str(told.value)
    assert main(["inspect", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_objects_are_another_matter(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(saved({"args": main}))
    with pytest.raises(ValueError, match="with plain data only, got: Unsupported"):
        read_file(path)
