"""python -m dmoe.generate, on a model that a stand-in for the reader of checkpoints gives."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpt_cases import FORWARD, found_in_files, reference_model, small_model
from patience import PATIENCE

import dmoe
from dmoe.generate import main
from dmoe.models import GenerationOptions, generate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(monkeypatch):
    """A model of 300 tokens, so that a BPE of bytes fits; read_model finds it in any folder named MODEL."""
    made = small_model(vocab_size=300, dtype=torch.float32)
    made.extras = {}

    def read_model(path):
        if str(path) != "MODEL":
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return found_in_files(made, made.extras)

    monkeypatch.setattr(dmoe.checkpoint, "read_model", read_model)
    return made


@pytest.fixture
def bpe(tmp_path):
    """GPT-2's alphabet of bytes, two merges and the end of text."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {sign: n for n, sign in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    words |= {"th": 256, "the": 257, "<|endoftext|>": 258}
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab.write_text(json.dumps(words))
    merges.write_text("#version: 0.2\nt h\nth e\n")
    return vocab, merges


def told(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_ids_go_on_greedily(model, capsys):
    assert main(["MODEL", "--ids", "16,33,76", "--ids", "5", "--output-len", "8", "--json"]) == 0
    expected = generate(model, [[16, 33, 76], [5]], GenerationOptions(output_len=8)).continuations()
    assert told(capsys) == [
        {"prompt_ids": [16, 33, 76], "ids": expected[0]},
        {"prompt_ids": [5], "ids": expected[1]},
    ]
    assert main(["MODEL", "--ids", "5", "--output-len", "8"]) == 0
    out = capsys.readouterr()
    assert out.out == f"5 -> {','.join(map(str, expected[1]))}\n"
    assert out.err == "", "no bar where nobody looks"


def test_all_options_reach_the_search(model, capsys):
    prompts = ["--ids", "16,33,76", "--ids", "5", "--ids", "9,9"]
    flags = "--top-k 9 --top-p 0.9 --temperature 1.5 --repetition-penalty 1.2 --min-length 2 --seed 4 --end-id 3"
    how = {"top_k": 9, "top_p": 0.9, "temperature": 1.5, "repetition_penalty": 1.2, "min_length": 2, "seed": 4}
    found = generate(model, [[16, 33, 76], [5], [9, 9]], GenerationOptions(output_len=6, end_id=3, **how))
    for batch in ([], ["--batch-size", "2"]):
        assert main(["MODEL", *prompts, *flags.split(), "--output-len", "6", "--json", "--log-probs", *batch]) == 0
        lines = told(capsys)
        assert [line["ids"] for line in lines] == found.continuations()
        assert all(len(line["log_probs"]) == len(line["ids"]) for line in lines)
    assert (
        main(["MODEL", "--ids", "5", "--output-len", "6", "--presence-penalty", "2", "--json", "--dtype", "fp64"]) == 0
    )
    expected = generate(model, [[5]], GenerationOptions(output_len=6, presence_penalty=2.0)).continuations()[0]
    assert told(capsys)[0]["ids"] == expected
    assert main(["MODEL", "--ids", "5", "--output-len", "2", "--log-probs", "--dtype", "bf16"]) == 0
    assert "log-probabilities -" in capsys.readouterr().out


def test_the_models_own_end_ends(model, capsys):
    first = generate(model, [[5]], GenerationOptions(output_len=1)).ids[0, 1].item()
    model.extras = {"end_id": first}
    assert main(["MODEL", "--ids", "5", "--json"]) == 2  # 32 more are too many for this model
    assert "expected at most 20 tokens in all" in capsys.readouterr().err
    assert main(["MODEL", "--ids", "5", "--json", "--output-len", "9"]) == 0
    assert told(capsys)[0]["ids"] == [first]
    assert main(["MODEL", "--ids", "5", "--json", "--output-len", "9", "--end-id", "299"]) == 0
    assert len(told(capsys)[0]["ids"]) == 9


def test_text_in_and_text_out(model, bpe, capsys, tmp_path):
    vocab, merges = map(str, bpe)
    file = tmp_path / "prompts.txt"
    file.write_text("thé\n\nwe\n", encoding="utf-8")
    flags = ["--vocab", vocab, "--merges", merges, "--output-len", "5", "--json"]
    assert main(["MODEL", "--text", "the", "--text", "a<|endoftext|>", "--file", str(file), "--ids", "1", *flags]) == 0
    lines = told(capsys)
    words = json.loads(Path(vocab).read_text())
    assert [line["prompt_ids"] for line in lines] == [
        [1],
        [257],
        [words["a"], 258],
        [256, words["Ã"], words["©"]],  # GPT-2's names of the two bytes of é
        [words["w"], words["e"]],
    ]
    assert all(isinstance(line["text"], str) for line in lines)
    # Own files are found by themselves, and the end of their text ends.
    model.extras = {"vocab": vocab, "merges": merges}
    model.positions.weight.data.zero_()
    model.norm.bias.data = model.embedding.weight.data[258] * 1e4
    assert main(["MODEL", "--text", "the", "--output-len", "5", "--json"]) == 0
    assert told(capsys) == [{"prompt_ids": [257], "ids": [258], "text": ""}]
    assert main(["MODEL", "--ids", "257", "--output-len", "5", "--json"]) == 0
    assert told(capsys) == [{"prompt_ids": [257], "ids": [258], "text": ""}]
    assert main(["MODEL", "--text", "the", "--output-len", "5", "--end-id", "299"]) == 0
    assert capsys.readouterr().out == "257 -> 258,258,258,258,258\n  " + "<|endoftext|>" * 5 + "\n"


BAD = [
    (["MODEL"], "expected a prompt: --ids, --text or --file, got none"),
    (["NOWHERE", "--ids", "1"], "NOWHERE: No such file or directory"),
    (["MODEL", "--text", "a"], "--text, --file: expected --vocab and --merges with MODEL, which does not have both"),
    (["MODEL", "--text", "a", "--vocab", "no.json", "--merges", "no.txt"], "no.json: No such file or directory"),
    (["MODEL", "--file", "no.txt"], "no.txt: No such file or directory"),
    (["MODEL", "--ids", "300"], "prompts: expected ids in [0, 300), got 300 in prompt 0"),
    (["MODEL", "--ids", "1", "--output-len", "0"], "output_len: expected an integer of at least 1, got 0"),
    (["MODEL", "--ids", "1", "--device", "quantum"], "--device quantum: expected one that torch can use"),
    (["MODEL", "--ids", "1", "--output-len", "2", "--batch-size", "0"], "batch_size: expected at least 1"),
    (
        ["MODEL", "--ids", "1", "--repetition-penalty", "1.1", "--presence-penalty", "1"],
        "presence_penalty: expected 0 with repetition_penalty = 1.1",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=str)
def test_errors_are_one_line(model, capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("python -m dmoe.generate: error: ")
    assert message in err


def test_ids_that_are_no_numbers_are_told(model, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["MODEL", "--ids", "1,two"])
    assert ended.value.code == 2
    assert "argument --ids: expected ids as 16,33,76, got '1,two'" in capsys.readouterr().err


def test_a_vocabulary_that_is_none_and_a_package_that_is_missing(model, bpe, capsys, monkeypatch, tmp_path):
    vocab, merges = map(str, bpe)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert main(["MODEL", "--text", "a", "--vocab", str(broken), "--merges", merges]) == 2
    err = capsys.readouterr().err
    assert "expected a GPT-2 BPE, got" in err
    assert err.count("\n") == 1
    file = tmp_path / "latin"
    file.write_bytes(b"\xff\xfe\n")
    assert main(["MODEL", "--file", str(file), "--vocab", vocab, "--merges", merges]) == 2
    assert "expected UTF-8" in capsys.readouterr().err
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["MODEL", "--text", "a", "--vocab", vocab, "--merges", merges]) == 2
    assert (
        "expected the tokenizers package for text, which is missing: pip install tokenizers" in capsys.readouterr().err
    )


def test_the_recorded_continuations(monkeypatch, capsys):
    case = FORWARD[0]
    made = reference_model(case, torch.float32)
    found = found_in_files(made)
    monkeypatch.setattr(dmoe.checkpoint, "read_model", lambda path: found)
    prompts = [flag for prompt in case["prompts"] for flag in ("--ids", ",".join(map(str, prompt)))]
    for wanted in case["generate"]:
        how = {n: v for n, v in wanted.items() if n not in ("ids", "lengths") and "margin" not in n}
        flags = [text for name, value in how.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        assert main(["MODEL", *prompts, *flags, "--json"]) == 0
        for line, ids, length in zip(told(capsys), wanted["ids"], wanted["lengths"], strict=True):
            assert line["prompt_ids"] + line["ids"] == ids[:length]


def test_it_is_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "dmoe.generate", "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert "--repetition-penalty" in done.stdout
    assert done.stderr == ""
