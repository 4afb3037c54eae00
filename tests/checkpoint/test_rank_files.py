"""Files of ranks that do not belong together, are damaged, or of several systems; and what a killed run leaves."""

from __future__ import annotations

import os

import layout_cases as cases
import pytest
import torch
from rank_jobs_together import killed_at

import dmoe
from dmoe.checkpoint import convert, read_model
from dmoe.checkpoint.__main__ import main
from dmoe.checkpoint.stored import Stored, total_bytes

PREFIXES = ("blocks.0.moe.", "blocks.1.moe.")
MAKERS = {
    "tutel": cases.tutel_ffn,
    "fairseq": cases.fairseq,
    "megablocks": cases.megablocks,
    "megatron-sequential": cases.sequential,
    "megatron-te": cases.te,
    "megatron-grouped": cases.grouped,
    "deepspeed": cases.deepspeed,
}


def state(make, rank=0, ranks=1, **options):
    found = {"embedding.weight": torch.arange(10.0)}
    for seed, prefix in enumerate(PREFIXES):
        found |= make(cases.drawn(seed, **options), prefix, rank, ranks)
    return {name: value.clone() for name, value in found.items()}


def files(folder, make, ranks, nested=False, **options):
    """A file for each rank; returns them."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"part{rank}.pt" for rank in range(ranks)]
    for rank, path in enumerate(paths):
        content = state(make, rank, ranks, **options)
        torch.save({"model": content, "iteration": 7, "rng": rank} if nested else content, path)
    return paths


def edited(path, edit):
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(tmp_path, capfd, monkeypatch):
    """Converts what must not be, and looks that nothing is left; returns the sentence."""
    monkeypatch.chdir(tmp_path)

    def convert_in_vain(*arguments, to="dmoe", target="out"):
        before = tree(tmp_path)
        words = list(map(str, arguments))
        first = next((n for n, word in enumerate(words) if word.startswith("--")), len(words))
        assert main(["convert", *words[:first], target, *words[first:], "--to", to]) == 2
        told = capfd.readouterr().err
        assert told.count("\n") == 1
        assert told.startswith("python -m dmoe.checkpoint: error: ")
        assert tree(tmp_path) == before
        return told

    return convert_in_vain


ROUTER = {"tutel": "gates.0.wg.weight", "fairseq": "gate.wg.weight", "megablocks": "router.layer.weight"}


@pytest.mark.parametrize("layout", MAKERS)
def test_ranks_that_do_not_belong_together(tmp_path, refused, layout):
    make, options = MAKERS[layout], {"biased": layout not in ("megablocks", "megatron-te", "megatron-grouped")}
    router = ROUTER.get(layout, "deepspeed_moe.gate.wg.weight" if layout == "deepspeed" else "router.weight")

    def fresh():
        return files(tmp_path / "in", make, 4, **options)

    paths = fresh()
    paths[2].unlink()
    assert f"{paths[2]}: expected the file of rank 2, got none" in refused(
        tmp_path / "in" / "part{rank}.pt", "--from", layout
    )
    paths = fresh()
    told = refused(*paths[:2])
    assert f"{paths[2]}: expected the files of all ranks, got 2 without this one, which lies beside them" in told
    paths = fresh()
    edited(paths[1], lambda content: content[PREFIXES[1] + router].add_(1))
    assert f"{paths[1]}: " in (told := refused(*paths))
    assert f"expected the same as in {paths[0]}, got other values" in told
    paths = fresh()
    edited(paths[3], lambda content: content["embedding.weight"].mul_(2))
    assert f"{paths[3]}: embedding.weight: expected the same as in {paths[0]}, got other values" in refused(*paths)
    paths = fresh()
    edited(paths[1], lambda content: content.pop("embedding.weight"))
    assert f"{paths[1]}: expected embedding.weight, which {paths[0]} has, got none" in refused(*paths)
    paths = fresh()
    edited(paths[1], lambda content: content.update({"more.weight": torch.ones(1)}))
    assert f"{paths[1]}: more.weight: expected tensors that {paths[0]} has as well" in refused(*paths)
    paths = fresh()
    gone = PREFIXES[1]
    edited(paths[1], lambda content: [content.pop(name) for name in list(content) if name.startswith(gone)])
    assert f"{paths[1]}: expected the MoE layers of {paths[0]}, got other ones: {gone}" in refused(*paths)


class _Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_more_experts_than_the_files_hold(tmp_path, refused):
    paths = files(tmp_path / "in", cases.fairseq, 4)
    for path in paths[2:]:
        path.unlink()
    assert "expected the 4 experts that its router chooses from in 2 ranks' files, got 1 in each" in refused(*paths[:2])


@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_file_is_named(tmp_path, refused, which):
    paths = files(tmp_path / "in", cases.fairseq, 2)
    whole = paths[which].read_bytes()
    paths[which].write_bytes(whole[: len(whole) // 2])
    assert f"{paths[which]}: expected a whole file of torch.save, got" in refused(*paths, "--from", "fairseq")
    assert str(paths[which]) in refused(*paths)
    content = state(cases.fairseq, which, 2)
    torch.save(content | {"extra": _Runs()}, paths[which])
    assert f"{paths[which]}: expected tensors, plain data and objects of known frameworks, got posix.system" in refused(
        *paths
    )
    assert not (tmp_path / "ran").exists()


def test_an_expert_that_is_not_there_and_one_of_another_shape(tmp_path, refused):
    (path,) = files(tmp_path / "in", cases.sequential, 1)
    name = PREFIXES[0] + "experts.local_experts.{}.linear_fc1.weight"
    edited(path, lambda content: content.pop(name.format(2)))
    told = refused(path)
    assert "blocks.0.moe: expected experts.local_experts.*.linear_fc1.weight of experts 0 to 3, found none of 2" in told
    (path,) = files(tmp_path / "in", cases.sequential, 1)
    edited(path, lambda content: content.update({name.format(1): torch.zeros(3, cases.H, dtype=torch.float64)}))
    assert "expected experts.local_experts.*.linear_fc1.weight of one shape" in refused(path)
    (path,) = files(tmp_path / "in", cases.sequential, 1)
    last = [PREFIXES[0] + f"experts.local_experts.3.linear_fc{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")]
    edited(path, lambda content: [content.pop(each) for each in last])
    assert "expected 4 experts, which its router chooses from, got 3" in refused(path)
    (path,) = files(tmp_path / "in", cases.sequential, 1)
    edited(path, lambda content: content.update({PREFIXES[0] + "experts.scales": torch.ones(4)}))
    assert "experts.scales: expected a name of the layout sequential" in refused(path)


def test_files_of_no_system_and_of_two(tmp_path, refused, capfd):
    path = tmp_path / "file.pt"
    torch.save({"weight": torch.ones(1)}, path)
    told = refused(path)
    assert f"{path}: expected a checkpoint in one of the layouts dmoe, deepspeed, " in told
    assert "got no MoE layers by names that are known" in told
    assert "got nothing of that name" in refused(tmp_path / "nothing.pt")
    both = cases.fairseq(cases.drawn(0), "a.", 0, 1) | cases.tutel_ffn(cases.drawn(1), "b.", 0, 1)
    torch.save({name: value.clone() for name, value in both.items()}, path)
    assert f"{path}: more than one layout fits: tutel and fairseq; say which: --from" in refused(path)
    assert main(["convert", str(path), str(tmp_path / "one"), "--to", "dmoe", "--from", "tutel"]) == 0
    capfd.readouterr()
    assert list(read_model(tmp_path / "one").layers) == ["b."]
    assert "--from: expected one of dmoe, " in refused(path, "--from", "other")
    torch.save({"weight": torch.ones(1)}, path)
    assert f"{path}: expected MoE layers of fairseq, got none" in refused(path, "--from", "fairseq")


def test_what_a_layout_has_no_place_for(tmp_path, refused):
    (gated,) = files(tmp_path / "gated", cases.megablocks, 1, gated=True, biased=False)
    assert "fairseq: blocks.0.moe: fairseq has no place for up of gated experts" in refused(
        gated, to="fairseq", target="X.pt"
    )
    (biased,) = files(tmp_path / "biased", cases.sequential, 1)
    assert "grouped has no place for up_bias" in refused(biased, to="megatron-grouped", target="X.pt")
    assert "expected a name with {rank} in it for 2 files" in refused(
        biased, "--ranks", 2, to="megatron-te", target="X.pt"
    )
    assert "that 3 ranks can share evenly, got 4" in refused(
        biased, "--ranks", 3, to="megatron-te", target="X{rank}.pt"
    )
    assert "expected a GPT" in refused(biased, to="fastertransformer")


def test_what_stands_beside_is_kept_but_for_the_optimizer(tmp_path, capfd):
    paths = files(tmp_path / "in", cases.sequential, 2, nested=True)
    for path in paths:
        edited(path, lambda content: content.update({"optimizer": {"state": {}, "param_groups": []}}))
    pattern = str(tmp_path / "part{rank}.pt")
    assert main(["convert", *map(str, paths), pattern, "--to", "megatron-sequential", "--ranks", "2"]) == 0
    assert "written without the optimizer's state" in capfd.readouterr().err
    for rank in range(2):
        found = torch.load(tmp_path / f"part{rank}.pt", weights_only=True)
        assert {key: found[key] for key in found if key != "model"} == {"iteration": 7, "rng": rank}
        expected = state(cases.sequential, rank, 2)
        assert all(torch.equal(found["model"][name], expected[name]) for name in expected)


def test_chunks_of_a_virtual_pipeline(tmp_path):
    chunks = {f"model{n}": cases.te(cases.drawn(n, biased=False), "layers.0.mlp.", 0, 1) for n in range(2)}
    torch.save(chunks | {"iteration": 3}, tmp_path / "in.pt")
    model = read_model(tmp_path / "in.pt")
    assert list(model.layers) == ["model0/layers.0.mlp.", "model1/layers.0.mlp."]
    convert(tmp_path / "in.pt", tmp_path / "ours", "dmoe")
    convert(tmp_path / "ours", tmp_path / "back.pt", "megatron-te")
    found = torch.load(tmp_path / "back.pt", weights_only=True)
    assert found["iteration"] == 3
    for key, chunk in chunks.items():
        assert list(found[key]) == list(chunk)
        assert all(torch.equal(found[key][name], chunk[name]) for name in chunk)


@pytest.mark.parametrize("ranks", [1, 2])
def test_safetensors_as_files_of_ranks(tmp_path, ranks):
    paths = files(tmp_path / "in", cases.tutel_ffn, ranks)
    target = tmp_path / ("part{rank}.safetensors" if ranks > 1 else "part0.safetensors")
    convert(paths, target, "tutel", options=dmoe.checkpoint.Options(ranks=ranks))
    expected, found = read_model(paths), read_model(target)
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name].read(), expected.tensors[name].read()) for name in expected.tensors)


def test_a_dtype_for_all_floating_point_numbers(tmp_path):
    (path,) = files(tmp_path / "in", cases.tutel_ffn, 1)
    assert main(["convert", str(path), str(tmp_path / "out"), "--to", "dmoe", "--dtype", "bf16"]) == 0
    given, found = read_model(path).tensors, read_model(tmp_path / "out").tensors
    for name, stored in found.items():
        assert torch.equal(stored.read(), given[name].read().to(torch.bfloat16))


@pytest.mark.parametrize("to", ["dmoe", "deepspeed", "megatron-te", "hf"])
def test_progress_tells_every_byte(tmp_path, to):
    (path,) = files(tmp_path / "in", cases.te, 1, gated=True, biased=False)
    told = []
    options = dmoe.checkpoint.Options(progress=told.append, family="mixtral")
    convert(path, tmp_path / ("out.pt" if to == "megatron-te" else "out"), to, options=options)
    assert sum(told) == total_bytes(read_model(path).tensors)
    assert len(told) > 4


@pytest.mark.parametrize(
    ("to", "target", "stage", "times"),
    [
        ("dmoe", "out", "os.rename", 1),
        ("dmoe", "out.pt", "half a file", 1),
        ("dmoe", "out{rank}.pt", "half a file", 2),
        ("dmoe", "out{rank}.pt", "os.rename", 1),
        ("deepspeed", "out", "os.rename", 1),
        ("fairseq", "out.pt", "half a file", 3),
        ("hf", "out", "os.rename", 1),
    ],
)
def test_a_killed_run_leaves_nothing_under_the_name_and_the_next_tidies(tmp_path, to, target, stage, times):
    (path,) = files(tmp_path / "in", cases.fairseq, 1)
    out = tmp_path / "there"
    out.mkdir()
    ranks = ["--ranks", "2"] if "{rank}" in target or to == "fairseq" else []
    command = ["convert", str(path), str(out / target), "--to", to, *ranks, "--family", "nllb"]
    assert killed_at(stage, lambda: main(command), times=times)
    assert all(left.name.startswith(".") for left in out.iterdir())
    assert main(command) == 0
    assert not [left for left in out.iterdir() if left.name.startswith(".")]
    assert out.iterdir()


def test_there_is_something_already(tmp_path, refused, capfd):
    (path,) = files(tmp_path / "in", cases.fairseq, 1)
    for target in ("out", "out.pt"):
        assert main(["convert", str(path), target, "--to", "dmoe"]) == 0
        capfd.readouterr()
        assert "expected no" in (told := refused(path, target=target)) or "expected nothing" in told
        assert main(["convert", str(path), target, "--to", "dmoe", "--overwrite"]) == 0
        capfd.readouterr()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").write_text("dear")
    assert "expected a model's folder to replace, with a dmoe.json" in refused(path, "--overwrite", target="other")


def test_a_reader_holds_no_file_open(tmp_path):
    paths = files(tmp_path / "in", cases.fairseq, 4)
    before = len(os.listdir("/proc/self/fd"))
    model = read_model(paths)
    for stored in model.tensors.values():
        assert isinstance(stored, Stored)
        stored.read()
    assert len(os.listdir("/proc/self/fd")) == before


def test_every_dtype_that_a_model_may_hold_goes_along(tmp_path):
    from dmoe.checkpoint.hub_folder import DTYPES

    content = state(cases.tutel_ffn)
    for dtype in DTYPES:
        content[f"other.{dtype}"] = torch.randint(0, 2, (64,), dtype=torch.uint8).view(dtype)
    torch.save(content, tmp_path / "in.pt")
    convert(tmp_path / "in.pt", tmp_path / "ours", "dmoe")
    convert(tmp_path / "ours", tmp_path / "back.pt", "tutel")
    found = torch.load(tmp_path / "back.pt", weights_only=True)
    assert found.keys() == content.keys()
    for name, tensor in content.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (found[name], tensor))), name
