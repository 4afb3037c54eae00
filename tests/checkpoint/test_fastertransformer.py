"""FasterTransformer's folders: NVIDIA's bytes, whatever ranks trained; read back for every N; refused where damaged.

A third of the entries of ft_hashes.json is compared here. All of them, in two minutes:

    python tests/support/ft_verify.py tests/support/ft_hashes.json \
        'python -m dmoe.checkpoint convert {in} {out} --to fastertransformer --gpus {gpus} --dtype {dtype}' \
        --vocab ' --vocab {vocab} --merges {merges}'
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from big_allocations import peaks_can_be_read
from ft_verify import compare, expected
from gpt_checkpoints import assert_tensors, convert, listing, make, original, set_args
from patience import PATIENCE

from dmoe import MoEConfig
from dmoe.checkpoint.formats.base import Options
from dmoe.checkpoint.formats.fastertransformer import FasterTransformer
from dmoe.checkpoint.formats.megatron_deepspeed import MegatronDeepSpeed

ROOT = Path(__file__).resolve().parents[2]
FORMAT, DEEPSPEED = FasterTransformer(), MegatronDeepSpeed()
DATA = json.loads((ROOT / "tests/support/ft_hashes.json").read_text())
ENTRIES = [3, 4, 11, 17, 24, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40]


def program(*arguments):
    return [sys.executable, *map(str, arguments)]


def environment():
    support = os.pathsep.join(map(str, (ROOT, ROOT / "tests/support")))
    return os.environ | {"PYTHONPATH": support}


@pytest.mark.parametrize("number", ENTRIES, ids=lambda number: f"{number}: {DATA['entries'][number]['note'][:40]}")
def test_the_bytes_are_nvidias(tmp_path, capsys, number):
    entry = DATA["entries"][number]
    source, out = make(tmp_path / "in", *entry["make"]), tmp_path / "out"
    given = ["--to", "fastertransformer", "--gpus", entry["gpus"], "--dtype", entry["weight_data_type"]]
    if "--vocab-files" in entry["make"]:
        given += ["--vocab", source / "vocab.json", "--merges", source / "merges.txt"]
    wanted = expected(DATA, entry)
    before = listing(source)
    status = convert(source, out, *given)
    said = capsys.readouterr().err
    assert listing(source) == before
    if wanted is None:
        assert (status, len(said.splitlines())) == (2, 1)
        assert not out.exists()
        return
    assert status == 0, said
    assert compare(out / f"{entry['gpus']}-gpu", wanted) == []
    assert {path.name for path in (out / f"{entry['gpus']}-gpu").iterdir()} == wanted.keys()
    assert bool(said) == ("warnings" in entry)


def test_the_real_command(tmp_path):
    source = make(tmp_path / "in", "--seed", 1)
    given = ("convert", source, tmp_path / "out", "--to", "fastertransformer", "--gpus", 2, "--dtype", "fp16")
    command = program("-m", "dmoe.checkpoint", *given)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    assert compare(tmp_path / "out/2-gpu", expected(DATA, DATA["entries"][2])) == []
    again = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert again.returncode == 2
    assert f"{tmp_path / 'out/2-gpu'}: expected nothing of that name" in again.stderr
    assert len(again.stderr.splitlines()) == 1


def written(tmp_path, *arguments, gpus=2, **options):
    """A folder, and the model that it was written from."""
    model = DEEPSPEED.read([make(tmp_path / "in", *arguments)], Options())
    (folder,) = FORMAT.write(model, tmp_path / "out", Options(gpus=gpus, **options))
    return folder, model


@pytest.mark.parametrize("gpus", [1, 2, 4])
@pytest.mark.parametrize(
    "arguments",
    [
        ("--dtype", "fp32"),
        ("--dtype", "fp32", "--train-tp", 2, "--train-pp", 2, "--pattern", "mp_dir_pp", "--vocab-files"),
        ("--dtype", "fp32", "--experts", 0, "--eps", 1e-6, "--ffn", 36),
        ("--dtype", "fp32", "--experts", 3, "--expert-interval", 1, "--layers", 2, "--moe-topk", 2),
    ],
)
def test_a_folder_for_any_ranks_is_the_model(tmp_path, arguments, gpus):
    folder, model = written(tmp_path, *arguments, gpus=gpus)
    assert folder == tmp_path / f"out/{gpus}-gpu"
    for source in (folder, tmp_path / "out"):
        assert FORMAT.fits([source])
        assert not DEEPSPEED.fits([source])
        again = FORMAT.read([source], Options())
        assert_tensors(again, original(*arguments))
        assert (again.gpt, again.layers) == (model.gpt, model.layers)
        assert again.origin["args"] == model.origin["args"]
    for other in (1, 2, 4):  # as if it had been written at once
        (direct,) = FORMAT.write(model, tmp_path / "direct", Options(gpus=other))
        (detour,) = FORMAT.write(again, tmp_path / "detour", Options(gpus=other))
        assert not listing(direct).keys() - {name.replace("/detour/", "/direct/") for name in listing(detour)}
        assert [*listing(direct).values()] == [*listing(detour).values()]


def test_a_few_rows_and_experts_are_read_alone(tmp_path):
    folder, _ = written(tmp_path, "--dtype", "fp32")
    model, whole = FORMAT.read([folder], Options()), original("--dtype", "fp32")
    for name, stored in model.tensors.items():
        assert torch.equal(stored.rows(1, 2), whole[name][1:2]), name


def test_fp16_and_a_detour_over_training_files(tmp_path):
    folder, model = written(tmp_path, "--train-tp", 2)
    again = FORMAT.read([folder], Options())
    assert_tensors(again, {name: tensor.half() for name, tensor in original().items()})
    DEEPSPEED.write(again, tmp_path / "trained", Options(ranks=4))
    third = DEEPSPEED.read([tmp_path / "trained"], Options())
    gates = {name for name in third.tensors if name.endswith("router.weight")}
    assert {third.tensors[name].dtype for name in gates} == {torch.float32}
    assert third.gpt == model.gpt
    (last,) = FORMAT.write(third, tmp_path / "last", Options(gpus=2))
    args = (folder / "args.txt").read_text().replace("tensor_model_parallel_size:2", "tensor_model_parallel_size:4")
    assert (last / "args.txt").read_text() == args
    for path in folder.iterdir():
        assert path.name == "args.txt" or path.read_bytes() == (last / path.name).read_bytes(), path.name


def test_a_model_of_dmoes_own(tmp_path):
    _, model = written(tmp_path)
    model.origin, model.beside = {}, {}
    (folder,) = FORMAT.write(model, tmp_path / "own", Options())
    assert folder.name == "1-gpu"
    assert "padded_vocab_size:96\n" in (folder / "args.txt").read_text()
    again = FORMAT.read([folder], Options())
    assert (again.gpt, again.layers) == (model.gpt, model.layers)


def test_the_vocabulary(tmp_path):
    folder, model = written(tmp_path, "--vocab-files")
    assert "end_id = 50256" in (folder / "config.ini").read_text()
    vocab, merges = tmp_path / "in/vocab.json", tmp_path / "in/merges.txt"
    (folder,) = FORMAT.write(model, tmp_path / "named", Options(gpus=2, vocab=vocab, merges=merges))
    assert (folder / "vocab.json").read_bytes() == vocab.read_bytes()
    again = FORMAT.read([folder], Options())
    (kept,) = FORMAT.write(again, tmp_path / "kept", Options(gpus=1))  # they and their number go along
    assert (kept / "merges.txt").read_bytes() == merges.read_bytes()
    assert "start_id = 93\nend_id = 93\n" in (kept / "config.ini").read_text()
    vocab.write_text('{"a": 0}')
    FORMAT.write(model, tmp_path / "without", Options(gpus=2, vocab=vocab))
    assert f"{vocab}: no <|endoftext|>: start_id and end_id are 50256" in model.notes
    before = listing(tmp_path)
    for content in ("[]", "{", '{"<|endoftext|>": "x"}'):
        vocab.write_text(content)
        with pytest.raises(ValueError, match=rf"{vocab}: expected a JSON object"):
            FORMAT.write(model, tmp_path / "bad", Options(gpus=2, vocab=vocab))
    with pytest.raises(FileNotFoundError):
        FORMAT.write(model, tmp_path / "bad", Options(gpus=2, vocab=tmp_path / "no.json"))
    with pytest.raises(FileNotFoundError):  # after the tensors: the folder made for it goes away
        FORMAT.write(model, tmp_path / "bad", Options(gpus=2, merges=tmp_path / "no.txt"))
    assert listing(tmp_path).keys() == before.keys()


@pytest.mark.parametrize(
    ("arguments", "changes", "warnings"),
    [
        ((), {}, []),
        (("--moe-topk", 2), {}, ["top_k = 2: FasterTransformer's example runs one expert"]),
        ((), {"openai_gelu": True}, ["openai_gelu=True"]),
        ((), {"onnx_safe": True}, ["onnx_safe=True"]),
        ((), {"bias_gelu_fusion": False}, ["bias_gelu_fusion=False"]),
        ((), {"bias_gelu_fusion": None}, ["bias_gelu_fusion=absent"]),
        (("--dtype", "bf16"), {}, ["wpe: positions.weight: numbers beyond float16's range became infinite"]),
    ],
)
def test_what_would_be_computed_otherwise_is_said(tmp_path, capsys, arguments, changes, warnings):
    folder = make(tmp_path / "in", *arguments)
    set_args(folder, **changes)
    assert convert(folder, tmp_path / "out", "--to", "fastertransformer", "--dtype", "fp16") == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(warnings)
    for line, warning in zip(lines, warnings, strict=True):
        assert line.startswith("fastertransformer: ")
        assert warning in line
    assert (tmp_path / "out/1-gpu/config.ini").is_file()


def test_without_ffn_hidden_size_there_is_a_description_all_the_same(tmp_path):
    folder = make(tmp_path / "in", "--ffn", 48)
    set_args(folder, ffn_hidden_size=None)
    assert convert(folder, tmp_path / "out", "--to", "fastertransformer") == 0
    assert "inter_size = 48" in (tmp_path / "out/1-gpu/config.ini").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gpus": 0}, "gpus: expected a divisor of 4 heads and of F = 128, got 0"),
        ({"gpus": 8}, "gpus: expected a divisor of 4 heads"),
        ({"dtype": torch.bfloat16}, "dtype: expected fp16 or fp32, got torch.bfloat16"),
    ],
)
def test_options_that_the_layout_has_not(tmp_path, change, said):
    _, model = written(tmp_path)
    with pytest.raises(ValueError, match=said):
        FORMAT.write(model, tmp_path / "other", replace(Options(gpus=2), **change))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("norm", "rms"), ("tied_head", False), ("gated", True), ("positions", "rotary"), ("activation", "relu")],
)
def test_architectures_that_the_layout_has_not(tmp_path, name, value):
    _, model = written(tmp_path)
    model.gpt[name] = value
    for layout in (FORMAT, DEEPSPEED):
        with pytest.raises(ValueError, match=rf"{name}: expected .*, got {value!r}"):
            layout.write(model, tmp_path / "other", Options())
    model.gpt = None
    with pytest.raises(ValueError, match="expected a GPT with all its tensors"):
        FORMAT.write(model, tmp_path / "other", Options())
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"score_function": "sigmoid"},
        {"gate_scale": 2.0},
        {"bias": "none"},
        {"router_bias": True},
        {"softmax_order": "after_topk"},
        {"gate_normalization": 1.0},
        {"shared_ffn_hidden_size": 8},
        {"activation": "relu"},
        {"router": "cosine"},
        {"capacity_factor": 1.0},
    ],
)
def test_layers_that_the_layout_has_not(tmp_path, change):
    _, model = written(tmp_path)
    fields = {"hidden_size": 32, "ffn_hidden_size": 128, "num_experts": 4, "top_k": 1, "gated": False}
    given = fields | {"activation": "gelu_tanh", "bias": "expert"} | change
    model.layers["blocks.3.ffn."] = MoEConfig(**given)
    with pytest.raises(ValueError, match=rf"blocks.3.ffn: {next(iter(change))}: expected"):
        FORMAT.write(model, tmp_path / "other", Options())
    assert not (tmp_path / "other").exists()


def lose(folder):
    (folder / "model.layers.1.mlp.moe.gate.wg.weight.bin").unlink()
    return "model.layers.1.mlp.moe.gate.wg.weight.bin: expected a file of 512 bytes"


def lose_one_of_a_rank(folder):
    (folder / "model.layers.0.mlp.dense_h_to_4h.bias.1.bin").unlink()
    return "model.layers.0.mlp.dense_h_to_4h.bias.1.bin: expected a file of 256 bytes"


def cut(folder):
    path = folder / "model.layers.3.mlp.moe.experts.dense_4h_to_h.weight.1.bin"
    path.write_bytes(path.read_bytes()[:-4])
    return f"{path.name}: expected 32768 bytes, torch.float32 of (4, 64, 32), got 32764"


def add(folder):
    shutil.copy(folder / "model.layers.3.input_layernorm.bias.bin", folder / "model.layers.4.input_layernorm.bias.bin")
    return "model.layers.4.input_layernorm.bias.bin: expected the files of the model in config.ini, got one more"


def no_config(folder):
    (folder / "config.ini").unlink()
    return "config.ini: expected FasterTransformer's description"


def no_ini(folder):
    (folder / "config.ini").write_text("no sections")
    return "config.ini: expected sections and keys"


def config(key, value, said):
    def change(folder):
        path = folder / "config.ini"
        text, count = re.subn(
            rf"(?m)^{key} = .*\n", f"{key} = {value}\n" if value is not None else "", path.read_text()
        )
        assert count == 1
        path.write_text(text)
        return said

    change.__name__ = f"{key} {value}"
    return change


DAMAGE = [
    lose,
    lose_one_of_a_rank,
    cut,
    add,
    no_config,
    no_ini,
    config("tensor_para_size", 1, "model.layers.0.attention.query_key_value.weight.0.bin: expected 12288 bytes"),
    config("tensor_para_size", 4, "model.layers.0.attention.query_key_value.weight.0.bin: expected 3072 bytes"),
    config("tensor_para_size", 3, "config.ini: tensor_para_size: expected a divisor of 4 heads"),
    config("head_num", 8, "model.wte.bin: expected 24576 bytes"),
    config("head_num", None, "config.ini: head_num: expected int of at least 1, got none"),
    config("inter_size", 64, "model.layers.0.mlp.dense_h_to_4h.weight.0.bin: expected"),
    config("inter_size", "many", "config.ini: inter_size: expected int of at least 1, got 'many'"),
    config("num_layer", 5, "model.layers.4.input_layernorm.weight.bin: expected a file of"),
    config("num_layer", 2, "config.ini: moe_layers: expected numbers of 2 layers"),
    config("vocab_size", 97, "model.wte.bin: expected 12416 bytes"),
    config("weight_data_type", "fp16", "model.wte.bin: expected 6144 bytes"),
    config("weight_data_type", "int8", "config.ini: weight_data_type: expected fp16 or fp32"),
    config("expert_num", 8, "model.layers.1.mlp.moe.gate.wg.weight.bin: expected 1024 bytes"),
    config("expert_num", 0, "config.ini: expert_num: expected int of at least 1"),
    config("moe_layers", "[3]", "model.layers.1.mlp.dense_h_to_4h.weight.0.bin: expected a file of"),
    config("moe_layers", "[1, 1]", "config.ini: moe_layers: expected"),
    config("moe_layers", "all", "config.ini: moe_layers: expected"),
    config("gpt_with_moe", 0, "config.ini: moe_layers: expected"),
    config("has_adapters", True, "config.ini: has_adapters: expected False"),
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda given: given.__name__)
def test_damage_is_one_sentence_and_leaves_nothing(tmp_path, capsys, damage):
    folder, _ = written(tmp_path, "--dtype", "fp32")
    said = damage(folder)
    before = listing(tmp_path)
    for target in ("fastertransformer", "deepspeed"):
        assert convert(folder, tmp_path / "new", "--to", target) == 2
        line = capsys.readouterr().err
        assert len(line.splitlines()) == 1
        assert f"{folder}/{said}" in line
    assert listing(tmp_path) == before


def test_which_of_several_folders(tmp_path, capsys):
    _, model = written(tmp_path)
    FORMAT.write(model, tmp_path / "out", Options(gpus=4))
    assert FORMAT.fits([tmp_path / "out"])
    assert convert(tmp_path / "out", tmp_path / "new", "--to", "fastertransformer") == 2
    assert "expected one folder of FasterTransformer's, got 2-gpu, 4-gpu" in capsys.readouterr().err
    assert not FORMAT.fits([tmp_path])
    assert not FORMAT.fits([tmp_path / "in"])
    assert not FORMAT.fits([tmp_path / "nothing"])


def test_what_exists_stays_unless_asked(tmp_path):
    folder, model = written(tmp_path)
    before = listing(tmp_path)
    with pytest.raises(FileExistsError, match="2-gpu: expected nothing of that name"):
        FORMAT.write(model, tmp_path / "out", Options(gpus=2))
    assert listing(tmp_path) == before
    other = FORMAT.read([folder], Options())
    set_args(tmp_path / "in", lr=1.0)
    new = DEEPSPEED.read([tmp_path / "in"], Options())
    FORMAT.write(new, tmp_path / "out", Options(gpus=2, overwrite=True))
    assert "\nlr:1.0\n" in (folder / "args.txt").read_text()
    FORMAT.write(other, tmp_path / "out", Options(gpus=2, overwrite=True))  # from where it is written
    assert listing(tmp_path / "out") == {name: digest for name, digest in before.items() if "/out/" in name}


def test_a_disk_that_fills_leaves_nothing(tmp_path):
    _, model = written(tmp_path)
    before = listing(tmp_path)

    class Full:
        def __init__(self, after):
            self.after = after

        def __call__(self, written):
            self.after -= 1
            if self.after == 0:
                raise OSError(28, "No space left on device")

    for target in ("out", "new"):
        with pytest.raises(OSError, match="No space left"):
            FORMAT.write(model, tmp_path / target, Options(gpus=4, progress=Full(40)))
        assert listing(tmp_path) == before
    for after in (3, 40):
        with pytest.raises(OSError, match="No space left"):
            DEEPSPEED.write(model, tmp_path / "trained", Options(progress=Full(after)))
        assert listing(tmp_path) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from dmoe.checkpoint.formats.base import Options
from dmoe.checkpoint.formats.known import FORMATS

source, out, name, at = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
count = 0

def kill(written):
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)

model = FORMATS["deepspeed-gpt"].read([source], Options())
FORMATS[name].write(model, out, Options(gpus=2, progress=kill))
"""


@pytest.mark.parametrize(("name", "at"), [("fastertransformer", 1), ("fastertransformer", 60), ("deepspeed-gpt", 50)])
def test_a_killed_process_leaves_no_folder_and_the_next_one_tidies(tmp_path, name, at):
    source, out = make(tmp_path / "in", "--seed", 1), tmp_path / "out"
    command = program("-c", KILLED, source, out, name, at)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == -signal.SIGKILL, done.stderr
    final = out / "2-gpu" if name == "fastertransformer" else out
    assert not final.exists()
    left = [path.name for path in final.parent.iterdir() if path.name.startswith(f".{final.name}.")]
    assert len(left) == 1
    assert convert(source, out, "--to", name, "--gpus", 2) == 0
    assert final.exists()
    assert not [path.name for path in final.parent.iterdir() if path.name.startswith(".")]
    if name == "fastertransformer":
        assert compare(final, expected(DATA, DATA["entries"][2])) == []


MEASURED = """
import sys
from big_allocations import Peak
from gpt_checkpoints import convert

small, source, out, to, gpus = sys.argv[1:]
for n, target in enumerate(("fastertransformer", "deepspeed")):  # what is imported and allocated once
    assert convert(small, f"{out}-{n}", "--to", target, "--gpus", "2") == 0
with Peak() as peak:
    assert convert(source, out, "--to", to, "--gpus", gpus, "--dtype", "fp32") == 0
print(peak.bytes)
"""


@pytest.mark.skipif(not peaks_can_be_read(), reason="the kernel does not say how much memory was used")
def test_memory_is_bounded_by_layers_not_by_the_model(tmp_path):
    small = make(tmp_path / "small")
    sizes = ("--layers", 3, "--expert-interval", 1, "--hidden", 256, "--experts", 32, "--vocab", 512)
    source = make(tmp_path / "in", *sizes)
    layer = 32 * 2 * 256 * 1024 * 2
    whole = sum(path.stat().st_size for path in source.rglob("*.pt"))
    assert whole > 3 * layer
    for number, (start, to, gpus) in enumerate(
        [(source, "fastertransformer", 1), (source, "fastertransformer", 4), (tmp_path / "out1", "deepspeed", 1)]
    ):
        command = program("-c", MEASURED, small, start, tmp_path / f"out{number}", to, gpus)
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        peak = int(done.stdout.split()[-1])
        assert peak < 2 * layer, (to, gpus, peak)
