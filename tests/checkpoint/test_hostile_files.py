"""Files that were made to do harm, or that would be read as something else; and targets that are no files."""

from __future__ import annotations

import json
import shutil
import zipfile

import layout_cases as cases
import make_deepspeed_ckpt
import numpy
import pytest
import torch

from dmoe.checkpoint import convert, load_layers, read_model
from dmoe.checkpoint.__main__ import main
from dmoe.checkpoint.torch_reader import read_lazily

PREFIX = "blocks.0.moe."


def state(make=cases.tutel_ffn, **options):
    found = make(cases.drawn(0, **options), PREFIX, 0, 1)
    return {"embedding.weight": torch.arange(10.0)} | {name: value.clone() for name, value in found.items()}


@pytest.fixture
def refused(tmp_path, capfd):
    """Runs what must not be done, and looks that nothing is there that was not; returns the sentence."""

    def in_vain(command, *arguments):
        before = sorted(tmp_path.rglob("*"))
        assert main([command, *map(str, arguments)]) == 2
        told = capfd.readouterr().err
        assert told.count("\n") == 1
        assert "Traceback" not in told
        assert sorted(tmp_path.rglob("*")) == before
        return told

    return in_vain


@pytest.fixture
def saved(tmp_path):
    """A tiny MoE layer in Tutel's names."""
    torch.save(state(), tmp_path / "tutel.pt")
    return tmp_path / "tutel.pt"


def edited(folder, **changes):
    """A dmoe folder whose JSON says something else."""
    file = folder / "dmoe.json"
    content = json.loads(file.read_text())
    for name, value in changes.items():
        content[name] = (
            {**content[name], **value} if isinstance(content.get(name), dict) and isinstance(value, dict) else value
        )
    file.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("tag", ["..", "../evil", "/tmp/evil", ".", "a/b", "", 7])
def test_a_folder_written_is_the_target(tmp_path, refused, tag):
    """Neither a folder's ``latest`` nor what dmoe.json keeps of it leads elsewhere."""
    source = tmp_path / "gpt"
    make_deepspeed_ckpt.main([str(source), "--layers", "2"])
    convert(source, tmp_path / "ours", "dmoe")
    edited(tmp_path / "ours", origin={"tag": tag})
    (tmp_path / "there").mkdir()
    if tag != "":
        assert "tag" in refused("convert", tmp_path / "ours", tmp_path / "there" / "out", "--to", "deepspeed")
    made = cases.deepspeed(cases.drawn(0), PREFIX, 0, 1)
    torch.save(made, tmp_path / "plain.pt")
    convert(tmp_path / "plain.pt", tmp_path / "plain", "deepspeed")
    convert(tmp_path / "plain", tmp_path / "ours2", "dmoe")
    edited(tmp_path / "ours2", origin={"tag": tag})
    told = refused("convert", tmp_path / "ours2", tmp_path / "there" / "out", "--to", "deepspeed")
    assert "tag: expected the name of a folder, got" in told
    (tmp_path / "plain" / "latest").write_text(str(tag))
    assert "latest: expected the name of a folder" in refused(
        "convert", tmp_path / "plain", tmp_path / "x", "--to", "dmoe", "--from", "deepspeed"
    )


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "..", "", None, 3])
def test_files_beside_a_model_lie_beside_it(tmp_path, refused, name):
    make_deepspeed_ckpt.main([str(tmp_path / "gpt"), "--layers", "2"])
    convert(tmp_path / "gpt", tmp_path / "ours", "dmoe")
    edited(tmp_path / "ours", files={"merges": name})
    told = refused("convert", tmp_path / "ours", tmp_path / "out", "--to", "fastertransformer")
    assert "merges: expected the name of a file beside this one" in told


def test_a_tokenizers_files_go_along(tmp_path):
    make_deepspeed_ckpt.main([str(tmp_path / "gpt"), "--layers", "2", "--vocab-files"])
    files = ["--vocab", str(tmp_path / "gpt" / "vocab.json"), "--merges", str(tmp_path / "gpt" / "merges.txt")]
    assert main(["convert", str(tmp_path / "gpt"), str(tmp_path / "ours"), "--to", "dmoe", *files]) == 0
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "fastertransformer"]) == 0
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "out" / "1-gpu" / name).read_bytes() == (tmp_path / "gpt" / name).read_bytes()


class Trusted:
    """A class that somebody allowed PyTorch's own reader to make, as frameworks do when they are imported."""

    made = 0

    def __setstate__(self, content):
        Trusted.made += 1


def test_what_others_allow_is_not_made_here(tmp_path):
    value = Trusted()
    value.x = 1
    torch.save({"a": torch.ones(1), "b": value}, tmp_path / "file.pt")
    with torch.serialization.safe_globals([Trusted]):
        with pytest.raises(ValueError, match=r"got .*Trusted: nothing of the file was executed"):
            read_lazily(tmp_path / "file.pt")
        assert Trusted in torch.serialization.get_safe_globals()
    assert Trusted.made == 0


def test_an_archive_that_was_packed_again(tmp_path, saved, refused):
    with (
        zipfile.ZipFile(saved) as archive,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    assert torch.load(tmp_path / "packed.pt")  # which inflates it
    assert "compressed, as torch.save does not" in refused("inspect", tmp_path / "packed.pt", "--from", "tutel")


def test_bombs(tmp_path, refused):
    """Lists of lists that share, an expert of a huge number, a storage larger than its record."""
    shared = 1
    for _ in range(40):
        shared = [shared, shared]
    torch.save(state() | {"shared": shared}, tmp_path / "lists.pt")
    assert list(read_model(tmp_path / "lists.pt").layers) == [PREFIX]
    huge = state(cases.fairseq)
    huge[f"{PREFIX}experts.1000000000000.fc1.weight"] = torch.ones(cases.F, cases.H, dtype=torch.float64)
    torch.save({"model": huge}, tmp_path / "huge.pt")
    assert "experts.*.fc1.weight of experts 0 to 1000000000000, found none of 4, 5, 6" in refused(
        "inspect", tmp_path / "huge.pt"
    )
    torch.save({"a": torch.ones(4)}, tmp_path / "file.pt")
    with zipfile.ZipFile(tmp_path / "file.pt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "short.pt", "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content[:4] if name.endswith("data/0") else content)
    with pytest.raises(ValueError, match=r"data/0: expected 16 bytes, got 4"):
        read_lazily(tmp_path / "short.pt")


def test_conjugated_and_negated_views(tmp_path):
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    torch.save({"conj": numbers.conj()}, tmp_path / "file.pt")
    assert torch.equal(read_lazily(tmp_path / "file.pt")["conj"].read(), numbers.conj().resolve_conj())
    torch.save({"neg": numbers.conj().imag}, tmp_path / "file.pt")
    assert torch.equal(read_lazily(tmp_path / "file.pt")["neg"].read(), numbers.conj().imag.resolve_neg())


def test_names_that_would_meet_in_dmoe(tmp_path, refused):
    found = {name: value.clone() for name, value in cases.deepspeed(cases.drawn(0), "b.", 0, 1).items()}
    torch.save(found | {"b.experts.up_proj": torch.ones(3)}, tmp_path / "file.pt")
    assert "b.experts.up_proj: expected one tensor that has this name in dmoe" in refused(
        "inspect", tmp_path / "file.pt", "--from", "deepspeed"
    )


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_swin_moe_from_elsewhere_is_swin_moe(tmp_path, saved, ranks):
    given = [f"--ranks={ranks}"] if ranks > 1 else []
    target, source = ("X.pth", "X.pth.rank{rank}") if ranks > 1 else ("X.pth.global", "X.pth.global")
    assert main(["convert", str(saved), str(tmp_path / target), "--to", "swin-moe", *given]) == 0
    found, expected = read_model(tmp_path / source), read_model(saved)
    assert list(found.layers) == [PREFIX + "_moe_layer."]
    assert {name.replace("_moe_layer.", "") for name in found.tensors} == set(expected.tensors)
    for name, stored in found.tensors.items():
        assert torch.equal(stored.read(), expected.tensors[name.replace("_moe_layer.", "")].read())


@pytest.mark.parametrize("to", ["megatron-sequential", "megatron-te", "megatron-grouped", "deepspeed"])
def test_no_rank_is_without_an_expert_of_its_own(tmp_path, refused, to):
    torch.save(state(cases.megablocks, biased=False), tmp_path / "in.pt")
    told = refused("convert", tmp_path / "in.pt", tmp_path / "out{rank}.pt", "--to", to, "--ranks", 8)
    assert "expected at most 4 ranks, each with experts of its own" in told
    torch.save(state(cases.tutel_llama, gated=True, biased=False), tmp_path / "in.pt")
    assert "at most 4 ranks" in refused(
        "convert", tmp_path / "in.pt", tmp_path / "out{rank}.pt", "--to", "tutel", "--ranks", 8
    )


@pytest.mark.parametrize("make", [cases.fairseq, cases.sequential, cases.tutel_ffn])
def test_a_single_expert(tmp_path, monkeypatch, make):
    monkeypatch.setattr(cases, "E", 1)
    torch.save(state(make), tmp_path / "in.pt")
    (layer,) = load_layers(tmp_path / "in.pt").values()
    assert (layer.config.num_experts, layer.config.top_k) == (1, 1)


def test_without_a_router_somebody_has_to_say(tmp_path, refused):
    content = {name: value for name, value in state().items() if "wg.weight" not in name}
    torch.save(content, tmp_path / "in.pt")
    assert "expected a router beside the experts, which tells how many" in refused("inspect", tmp_path / "in.pt")
    assert main(["inspect", str(tmp_path / "in.pt"), "--num-experts", "4"]) == 0


def test_what_the_user_says_is_heeded_or_refused(tmp_path, refused, capfd):
    make_deepspeed_ckpt.main([str(tmp_path / "gpt"), "--layers", "2"])
    assert "--set: expected nothing for a GPT" in refused("inspect", tmp_path / "gpt", "--set", "top_k=2")
    from layout_cases import E, F, H

    arrays = {
        "Moe/Router/dense/kernel": numpy.ones((H, E), numpy.float32),
        "Moe/Mlp/Dense_0/kernel": numpy.ones((E, H, F), numpy.float32),
        "Moe/Mlp/Dense_0/bias": numpy.ones((E, F), numpy.float32),
        "Moe/Mlp/Dense_1/kernel": numpy.ones((E, F, H), numpy.float32),
        "Moe/Mlp/Dense_1/bias": numpy.ones((E, H), numpy.float32),
    }
    numpy.savez(tmp_path / "vit.npz", **{f"Encoder/encoderblock_1/{name}": value for name, value in arrays.items()})
    assert "expected fields" in (told := refused("inspect", tmp_path / "vit.npz", "--set", "foo=1")) or "foo" in told
    assert "top_k" in refused("inspect", tmp_path / "vit.npz", "--set", "top_k=99")
    assert load_layers(tmp_path / "vit.npz", top_k=1)["Encoder.encoderblock_1.Moe"].config.top_k == 1
    content = bytearray((tmp_path / "vit.npz").read_bytes())
    at = content.index(b"PK\x01\x02") + 8
    content[at] |= 1  # says that it is encrypted
    (tmp_path / "vit.npz").write_bytes(content)
    assert "vit.npz" in refused("inspect", tmp_path / "vit.npz", "--from", "vmoe")


def test_ranks_in_an_order_of_ones_own(tmp_path, refused):
    for rank, number in enumerate((3, 1)):
        found = cases.fairseq(cases.drawn(0), PREFIX, rank, 2)
        torch.save({"model": {name: value.clone() for name, value in found.items()}}, tmp_path / f"r{number}.pt")
    files = [tmp_path / "r3.pt", tmp_path / "r1.pt"]
    assert "--as-given" in refused("convert", *files, tmp_path / "out", "--to", "dmoe")
    assert main(["convert", *map(str, files), str(tmp_path / "out"), "--to", "dmoe", "--as-given"]) == 0
    stored = read_model(tmp_path / "out").tensors[PREFIX + "experts.up_proj"]
    assert torch.equal(stored.read(), cases.drawn(0)["up"])


def test_ranks_of_before_are_not_left_beside(tmp_path, saved, refused, capfd):
    target = tmp_path / "r{rank}.pt"
    assert main(["convert", str(saved), str(target), "--to", "tutel", "--ranks", "4"]) == 0
    capfd.readouterr()
    told = refused("convert", saved, target, "--to", "tutel", "--ranks", "2", "--overwrite")
    assert "r2.pt: expected no file of a rank 2 beside those of 2 ranks" in told


def test_targets_that_are_no_files(tmp_path, saved, refused):
    (tmp_path / "folder.pt").mkdir()
    for overwrite in ([], ["--overwrite"]):
        told = refused("convert", saved, tmp_path / "folder.pt", "--to", "tutel", *overwrite)
        assert "folder.pt: expected the name of a file to write, got a folder or a device" in told
    assert "got a folder or a device" in refused("convert", saved, "/dev/null", "--to", "tutel", "--overwrite")
    for target in ("nowhere/out", "nowhere/out.pt"):
        assert "nowhere" in refused("convert", saved, tmp_path / target, "--to", "dmoe")


@pytest.mark.parametrize("value", [-1, "x", [], [[]], True, {"hidden_size": "x"}, {}])
@pytest.mark.parametrize("field", ["gpt", "origin", "layers", "files", "format"])
def test_json_that_says_something_else(tmp_path, capfd, field, value):
    make_deepspeed_ckpt.main([str(tmp_path / "gpt"), "--layers", "2"])
    convert(tmp_path / "gpt", tmp_path / "ours", "dmoe")
    content = json.loads((tmp_path / "ours" / "dmoe.json").read_text())
    (tmp_path / "ours" / "dmoe.json").write_text(json.dumps(content | {field: value}))
    for to in ("deepspeed", "fastertransformer"):
        status = main(["convert", str(tmp_path / "ours"), str(tmp_path / f"out {to}"), "--to", to])
        told = capfd.readouterr().err
        assert status in (0, 2)
        assert "Traceback" not in told
        assert status == 0 or told.count("\n") == 1
        shutil.rmtree(tmp_path / f"out {to}", ignore_errors=True)


def test_keys_that_are_no_names(tmp_path):
    torch.save(state() | {7: torch.ones(1), ("a", 1): 2}, tmp_path / "in.pt")
    assert list(read_model(tmp_path / "in.pt").layers) == [PREFIX]


def test_an_empty_folder(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    for layout in ("deepspeed", "tutel", "hf", "fastertransformer", "deepspeed-gpt", "dmoe"):
        assert "empty" in refused("convert", tmp_path / "empty", tmp_path / "out", "--to", "dmoe", "--from", layout)
    assert "empty" in refused("convert", tmp_path / "empty", tmp_path / "out", "--to", "dmoe")
    assert "empty" in refused("inspect", tmp_path / "empty")
