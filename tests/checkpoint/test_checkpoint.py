"""Checkpoint files of ranks: what merging, splitting and looking at them does, and what they refuse."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import rank_jobs_checkpoint as jobs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe import MoE, MoEConfig
from dmoe.checkpoint import inspect_state, merge_states, read_file, split_state, write_file
from dmoe.checkpoint.__main__ import main
from dmoe.checkpoint.files import in_rank_order
from dmoe.routing import Hash, TopK

H = 3


@st.composite
def cases(draw):
    """Experts, how they are spread, and the layer's options."""
    shards = draw(st.sampled_from([1, 2, 3]))
    blocks = draw(st.sampled_from([1, 2, 4]))
    each = draw(st.integers(1, 3))
    packed = draw(st.booleans())
    if packed:
        widths = [shards * draw(st.integers(1, 3)) for _ in range(blocks * each)]
    else:
        widths = [shards * draw(st.integers(1, 3))] * (blocks * each)
    return {
        "widths": widths,
        "packed": packed,
        "ranks": blocks * shards,
        "shards": shards,
        "gated": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "expert", "output"])),
        "layers": draw(st.integers(1, 2)),
        "named": draw(st.booleans()),
        "around": draw(st.booleans()),
    }


def numbered(shape, start):
    return torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


def model_of(case):
    config = MoEConfig(
        hidden_size=H,
        ffn_hidden_size=case["widths"] if case["packed"] else case["widths"][0],
        num_experts=len(case["widths"]),
        top_k=1,
        gated=case["gated"],
        bias=case["bias"],
        shared_ffn_hidden_size=2,
    )
    return torch.nn.Sequential(*(MoE(config) for _ in range(case["layers"]))), config


def checkpoint_of(case):
    """All values different, so that nothing can be mistaken for anything else."""
    model, config = model_of(case)
    optimizer = torch.optim.AdamW(model.named_parameters() if case["named"] else model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = {name: numbered(value.shape, 1000 * n) for n, (name, value) in enumerate(model.state_dict().items())}
    moments = optimizer.state_dict()
    for n, of_parameter in moments["state"].items():
        for offset, kind in ((0.25, "exp_avg"), (0.5, "exp_avg_sq")):
            of_parameter[kind] = numbered(of_parameter[kind].shape, 1000 * n + offset)
    if not case["around"]:
        return OrderedDict(state)
    return {"run": [{"net": state, "optim": moments}], "step": 7, "note": None, "config": config, "mean": float("nan")}


def same(a, b):
    """Equal in structure, types, dtypes and bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def expert(tensor, field, widths, index, packed):
    """One expert of a parameter, with F as the last dimension."""
    if not packed or field == "down_bias":
        one = tensor[index]
    else:
        first = sum(widths[:index])
        columns = slice(first, first + widths[index])
        one = tensor[:, columns] if field in ("down_proj", "gate_up_proj", "gate_up_bias") else tensor[columns]
    return one.movedim(-2, -1) if field in ("up_proj", "gate_up_proj") else one


@given(case=cases())
@settings(max_examples=150)
def test_each_rank_gets_its_slices_of_its_experts_and_merging_gives_them_back(case):
    whole = checkpoint_of(case)
    widths = None if case["around"] or not case["packed"] else case["widths"]
    options = {"shards": case["shards"], "widths": widths}
    before = copy.deepcopy(whole)
    parts = split_state(whole, case["ranks"], **options)
    assert same(whole, before)
    assert len(parts) == case["ranks"]
    each = len(case["widths"]) // (case["ranks"] // case["shards"])
    for rank, part in enumerate(parts):
        first, shard = rank // case["shards"] * each, rank % case["shards"]
        local = [width // case["shards"] for width in case["widths"][first : first + each]]
        trees = [(whole, part)]
        if case["around"]:
            trees = [(whole["run"][0]["net"], part["run"][0]["net"])]
            assert same({**whole, "run": 0}, {**part, "run": 0})
        ((model, mine),) = trees
        assert list(model) == list(mine)
        for name, tensor in model.items():
            if ".experts." not in name:
                assert torch.equal(tensor, mine[name]), name
                continue
            field = name.rpartition(".")[2]
            for position in range(each):
                full = expert(tensor, field, case["widths"], first + position, case["packed"])
                here = expert(mine[name], field, local, position, case["packed"])
                if field != "down_bias":
                    full = full[..., shard * local[position] : (shard + 1) * local[position]]
                assert torch.equal(here, full), name
        if case["around"]:
            names = [name for name, _ in model_of(case)[0].named_parameters()]
            states = part["run"][0]["optim"]["state"]
            for index, name in enumerate(names):
                for kind, offset in (("exp_avg", 0.25), ("exp_avg_sq", 0.5)):
                    expected = mine[name] - 1000 * list(model).index(name) + 1000 * index + offset
                    assert torch.equal(states[index][kind], expected), (name, kind)
                assert torch.equal(states[index]["step"], torch.ones(()))
    merged = merge_states(parts, **options)
    assert type(merged) is type(whole)
    assert same(merged, whole)


FIELDS = {
    "hidden_size": 6, "ffn_hidden_size": 4, "num_experts": 8, "top_k": 2, "bias": "expert",
    "shared_ffn_hidden_size": 5, "load_balancing_coefficient": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("form", ["plain", "groups", "named", "by name"])
@pytest.mark.parametrize("widths", [4, [3, 1, 2, 4, 4, 2, 1, 3]], ids=["equal", "different"])
def test_files_of_ranks_merge_into_what_one_process_goes_on_with(ranks, tmp_path, form, widths):
    fields = {**FIELDS, "ffn_hidden_size": widths}
    torch.manual_seed(1)
    batches = [torch.randn(4, 7, 6, dtype=torch.float64) for _ in range(5)]
    file = str(tmp_path / "rank{rank}.pt")
    results = ranks.run(jobs.train_and_save, fields, form, batches[:3], file)
    files = [file.format(rank=rank) for rank in range(4)]
    options = [] if widths == 4 else ["--widths", ",".join(map(str, widths))]
    assert main(["merge", str(tmp_path / "whole.pt"), *reversed(files), *options]) == 0

    single = jobs.Net(fields)
    optimizer = jobs.make_optimizer(single, form)
    losses = jobs.take_steps(single, optimizer, batches[:3], range(4))
    assert [float(loss) for loss in losses] == pytest.approx(results[0][0], rel=1e-11)

    merged = torch.load(tmp_path / "whole.pt", weights_only=True)
    model = jobs.Net(fields)
    model.load_state_dict(merged["model"])
    for rank, (_, y) in enumerate(results):
        with torch.no_grad():
            torch.testing.assert_close(model(batches[0][rank]), y, rtol=1e-12, atol=1e-12)
    again = jobs.make_optimizer(model, form)
    if form == "by name":
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        set_optimizer_state_dict(model, again, merged["optimizer"])
    else:
        again.load_state_dict(merged["optimizer"])
    # The next steps, of the merged one and of the one that never was on ranks.
    ours = jobs.take_steps(model, again, batches[3:], range(4))
    theirs = jobs.take_steps(single, optimizer, batches[3:], range(4))
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-10, atol=0)
    for (name, one), other in zip(model.named_parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def test_files_split_from_one_process_go_on_on_ranks(ranks, tmp_path):
    torch.manual_seed(1)
    batches = [torch.randn(4, 7, 6, dtype=torch.float64) for _ in range(4)]
    model = jobs.Net(FIELDS)
    optimizer = jobs.make_optimizer(model, "groups")
    jobs.take_steps(model, optimizer, batches[:2], range(4))
    write_file(tmp_path / "whole.pt", jobs.checkpoint_of(model, optimizer, "groups", 2))
    start = str(tmp_path / "part-{rank}.pt")
    assert main(["split", str(tmp_path / "whole.pt"), "4", start]) == 0
    results = ranks.run(jobs.train_and_save, FIELDS, "groups", batches[2:], None, start)
    losses = [float(loss) for loss in jobs.take_steps(model, optimizer, batches[2:], range(4))]
    assert results[0][0] == pytest.approx(losses, rel=1e-11)
    # An expert's part is in its file alone: views of a mapped whole would carry the whole along.
    sizes = [(tmp_path / f"part-{rank}.pt").stat().st_size for rank in range(4)]
    assert max(sizes) < (tmp_path / "whole.pt").stat().st_size


# ---------------------------------------------------------------------------------------------------------- refusals


def layer(experts=4, width=4, **fields):
    torch.manual_seed(0)
    return MoE(hidden_size=H, ffn_hidden_size=width, num_experts=experts, top_k=1, **fields)


def parts_of(count=2, **fields):
    return split_state({"model": layer(**fields).state_dict(), "step": 3}, count)


def test_what_differs_is_named_with_the_ranks():
    parts = parts_of(4)
    parts[2]["model"]["router.weight"] = parts[2]["model"]["router.weight"].clone()
    parts[2]["model"]["router.weight"][0, 0] += 1e-6
    with pytest.raises(ValueError, match=r"model/router\.weight: expected the same on all ranks, got .* on ranks 0, 1, "
                       r"3; .* on rank 2 \(with other values\)"):  # fmt: skip
        merge_states(parts)
    kept = merge_states(parts, ignore=["model/router*"])
    assert torch.equal(kept["model"]["router.weight"], parts[0]["model"]["router.weight"])
    parts = parts_of(4)
    parts[1]["step"] = 4
    with pytest.raises(ValueError, match="step: expected the same on all ranks, got 3 on ranks 0, 2, 3; 4 on rank 1"):
        merge_states(parts)
    parts[1]["step"] = 3
    parts[0]["rng"] = 1
    with pytest.raises(ValueError, match=r"rng: expected the same .*, got 1 on rank 0; nothing on ranks 1, 2, 3"):
        merge_states(parts)


def test_the_sign_of_zero_and_nan_are_bits_too():
    parts = parts_of(2)
    for value in (0.0, float("nan")):
        for part in parts:
            part["x"] = torch.tensor([value])
        assert merge_states(parts)["x"].view(torch.int32) == parts[0]["x"].view(torch.int32)
    parts[0]["x"], parts[1]["x"] = torch.tensor([0.0]), torch.tensor([-0.0])
    with pytest.raises(ValueError, match="x: expected the same on all ranks"):
        merge_states(parts)


def test_shapes_and_dtypes_of_ranks_have_to_fit():
    parts = parts_of(2)
    parts[1] = parts_of(2, width=6)[1]
    with pytest.raises(ValueError, match=r"rank 1: model/experts\.gate_up_proj: expected shape \(2, 2, 4, 3\) .*, got "
                       r"\(2, 2, 6, 3\)"):  # fmt: skip
        merge_states(parts)
    parts = parts_of(2)
    parts[1]["model"]["experts.down_proj"] = parts[1]["model"]["experts.down_proj"].double()
    with pytest.raises(ValueError, match=r"experts\.down_proj: .* got float32 on rank 0; float64 on rank 1"):
        merge_states(parts)
    parts = parts_of(2)
    del parts[1]["model"]["experts.down_proj"]
    with pytest.raises(ValueError, match=r"experts\.down_proj: expected the same .* got .* on rank 0; nothing on rank"):
        merge_states(parts)


def test_a_missing_rank_is_noticed_by_the_router():
    parts = parts_of(4)
    with pytest.raises(ValueError, match="expected 4 experts, which its router chooses from, got 3: a rank's file is"):
        merge_states(parts[:3])
    with pytest.raises(ValueError, match=r"expected 4 experts, .*, got 8: too many files, or shards"):
        merge_states(parts * 2)


def test_biases_of_shards_are_one():
    parts = split_state(layer(bias="expert").state_dict(), 4, shards=2)
    assert [part["experts.down_bias"].shape for part in parts] == [(2, H)] * 4
    parts[3]["experts.down_bias"] += 1
    with pytest.raises(ValueError, match=r"down_bias: expected the same on the shards .* on rank 3 than on rank 2"):
        merge_states(parts, shards=2)


@pytest.mark.parametrize(
    ("ranks", "shards", "message"),
    [
        (3, 1, r"experts: expected a number of experts that 3 blocks of ranks can share evenly .*, got 4"),
        (4, 3, r"ranks: expected a multiple of shards = 3, got 4"),
        (6, 3, r"expected widths that 3 shards can share evenly, got 4"),
        (0, 1, r"ranks: expected an integer of at least 1, got 0"),
        (2, 0, r"shards: expected an integer of at least 1, got 0"),
    ],
)
def test_what_cannot_be_divided_is_refused(ranks, shards, message):
    with pytest.raises(ValueError, match=message):
        split_state(layer().state_dict(), ranks, shards=shards)


def test_widths_that_differ_have_to_be_known():
    state = layer(width=[1, 2, 3, 4]).state_dict()
    with pytest.raises(ValueError, match="split: experts: expected the widths of its experts, which differ"):
        split_state(state, 2)
    with pytest.raises(
        ValueError, match=r"up_proj: expected shape \(2, 11, 3\) .*the given widths.*, got \(2, 10, 3\)"
    ):
        split_state(state, 2, widths=[1, 2, 3, 5])
    with pytest.raises(ValueError, match=r"widths: expected integers of at least 1, got \[1, 2, 7, 0\]"):
        split_state(state, 2, widths=[1, 2, 7, 0])
    parts = split_state(state, 2, widths={"experts": [1, 2, 3, 4]})
    assert [part["experts.down_proj"].shape[1] for part in parts] == [3, 7]
    with pytest.raises(ValueError, match=r"rank 0: .*: expected shape \(2, 3, 3\) .* got \(2, 7, 3\)"):
        merge_states(parts[::-1], widths=[1, 2, 3, 4])
    saved = [{"model": part, "config": {"ffn_hidden_size": [1, 2, 3, 4]}} for part in parts]
    assert same(dict(merge_states(saved)["model"]), dict(state))


def test_an_optimizer_that_tells_too_little_is_refused():
    model = layer(experts=2, width=4, bias="expert")  # router.weight and down_bias are both (2, H)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    def state(parameters):
        optimizer = torch.optim.AdamW(parameters)
        optimizer.step()
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    assert len(split_state(state(list(model.parameters())), 2)) == 2
    with pytest.raises(ValueError, match=r"optimizer/state/0: expected one parameter of shape \(2, 3\) that it can be"):
        split_state(state([model.experts.down_bias]), 2)
    (first, _) = split_state(state([("experts.down_bias", model.experts.down_bias)]), 2)
    assert first["optimizer"]["state"][0]["exp_avg"].shape == (1, 3)
    (first, _) = split_state(state([("router.weight", model.router.weight)]), 2)
    assert first["optimizer"]["state"][0]["exp_avg"].shape == (2, 3)
    odd = state(list(model.parameters()))
    odd["optimizer"]["state"][1]["row"] = torch.ones(5)
    with pytest.raises(ValueError, match=r"state/1/row: expected a number or a tensor of experts.gate_up_proj's shape"):
        split_state(odd, 2)
    with pytest.raises(
        ValueError, match="expected an optimizer's state as a dict with 'state' and 'param_groups', got"
    ):
        split_state({"model": model.state_dict(), "optim": {"state.experts.down_proj.exp_avg": torch.ones(1)}}, 2)


@pytest.mark.parametrize(
    ("state", "kind", "message"),
    [
        ([1], TypeError, "the state: expected a state dict, got list"),
        ({"weight": torch.ones(2)}, ValueError, "expected a checkpoint with MoE layers, whose experts' parameters"),
        ({"experts.up_proj": torch.ones(2, 2, 2)}, ValueError, r"experts.down_proj: expected \(E, H, F\), .* got none"),
        ({"experts.down_proj": torch.ones(2)}, ValueError, r"expected \(E, H, F\), or \(H, sum F\), got shape \(2,\)"),
    ],
)
def test_what_is_no_checkpoint_is_refused(state, kind, message):
    with pytest.raises(kind, match=message):
        split_state(state, 1)
    with pytest.raises(kind, match=message.replace("the state", "rank 0")):
        merge_states([state])


def test_other_systems_layouts_are_not_taken_for_ours():
    mixtral = {"experts.gate_up_proj": torch.ones(4, 8, 3), "experts.down_proj": torch.ones(4, 3, 4)}
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: expected shape \(4, 2, 4, 3\) .*, got \(4, 8, 3\)"):
        split_state(mixtral, 2)


def test_dtensors_are_sent_elsewhere_and_their_parts_are_taken(ranks, tmp_path):
    file = str(tmp_path / "rank{rank}.pt")
    results = ranks.run(jobs.save_dtensors, FIELDS, file, ranks=2)
    for told in results:
        assert told.startswith("merge: rank 0: moe.experts.gate_up_proj: expected a plain tensor, got a DTensor: files")
        assert "torch.distributed.checkpoint" in told
    merged = merge_states([read_file(file.format(rank=rank)) for rank in range(2)])
    assert same(dict(merged), dict(jobs.Net(FIELDS).state_dict()))


# ------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def files(tmp_path):
    whole = {"model": layer().state_dict(), "step": 3}
    write_file(tmp_path / "whole.pt", whole)
    assert main(["split", str(tmp_path / "whole.pt"), "4", str(tmp_path / "rank{rank}.pt")]) == 0
    return tmp_path


def told(capsys, *arguments):
    """What the program says on stderr when it refuses."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m dmoe.checkpoint: error: ")
    assert "Traceback" not in error
    return error


def test_the_program_merges_splits_and_looks(files, capsys):
    parts = [files / f"rank{rank}.pt" for rank in range(4)]
    assert main(["merge", str(files / "again.pt"), *map(str, parts)]) == 0
    whole, again = (torch.load(files / name, weights_only=True) for name in ("whole.pt", "again.pt"))
    assert same(whole, again)
    assert again["model"]._metadata == whole["model"]._metadata == layer().state_dict()._metadata
    capsys.readouterr()
    assert main(["inspect", *map(str, reversed(parts))]) == 0
    shown = capsys.readouterr().out
    assert f"rank 3: {parts[3]}: 1 MoE layers, 36 parameters of experts, 144 bytes" in shown
    assert "model/experts: 1 experts of 4, width 4, hidden size 3, gated, float32, 36 parameters, 144 bytes" in shown
    assert "who holds what:\n  model/experts: rank 0 expert 0; rank 1 expert 1; rank 2 expert 2; rank 3 exp" in shown
    assert main(["inspect", str(files / "whole.pt")]) == 0
    assert "model/experts: 4 experts, width 4," in capsys.readouterr().out


def test_inspect_knows_shards_and_widths(tmp_path, capsys):
    state = layer(bias="expert").state_dict()
    for rank, part in enumerate(split_state(state, 4, shards=2)):
        write_file(tmp_path / f"{rank}.pt", part)
    assert main(["inspect", *(str(tmp_path / f"{rank}.pt") for rank in range(4))]) == 0
    out = capsys.readouterr().out
    assert "rank 2 experts 2 to 3, slice 0 of 2; rank 3 experts 2 to 3, slice 1 of 2" in out
    assert "2 experts of 4, width 2, hidden size 3, gated with biases, float32, 86 parameters" not in out
    (part,) = inspect_state(layer(width=[1, 2, 3, 4], gated=False).state_dict())
    assert (part.num_experts, part.ffn_size, part.packed, part.gated) == (None, 10, True, False)
    assert (part.parameters, part.bytes, part.routed_experts) == (60, 240, 4)


def test_the_program_refuses_in_one_line(files, capsys, tmp_path):
    parts = [files / f"rank{rank}.pt" for rank in range(4)]
    out = files / "out.pt"
    assert "none of rank 1; if" in told(capsys, "merge", out, parts[0], *parts[2:])
    assert "expected 4 experts, which" in told(capsys, "merge", out, *parts[:3])
    assert "expected each rank's file once, got it 2 times" in told(capsys, "merge", out, *parts, parts[0])
    assert "No such file" in told(capsys, "merge", out, files / "missing.pt")
    (files / "text.pt").write_text("no checkpoint")
    assert "text.pt: expected a file of torch.save" in told(capsys, "inspect", files / "text.pt")
    (files / "half.pt").write_bytes((files / "whole.pt").read_bytes()[:700])
    assert "half.pt: expected a file of torch.save, got: " in told(capsys, "inspect", files / "half.pt")
    torch.save([1, 2], files / "list.pt")
    assert "expected a state dict, or a dict around one, got list" in told(capsys, "inspect", files / "list.pt")
    torch.save({"a": torch.ones(2)}, files / "dense.pt")
    assert "expected a checkpoint with MoE layers" in told(capsys, "inspect", files / "dense.pt")
    torch.save({"a": Strange()}, files / "strange.pt")
    assert "plain data only, got: Unsupported" in told(capsys, "inspect", files / "strange.pt")
    assert "expected {rank} in it, got part.pt" in told(capsys, "split", files / "whole.pt", 2, "part.pt")
    assert "[LAYER=]F,F,... with integers, got a" in told(capsys, "merge", out, *parts, "--widths", "a")
    assert not out.exists()
    whole = (files / "whole.pt").read_bytes()
    assert "got one; --overwrite replaces it" in told(capsys, "merge", files / "whole.pt", *parts)
    assert "another file to write" in told(capsys, "merge", parts[0], *parts, "--overwrite")
    assert "rank0.pt: expected no file" in told(capsys, "split", files / "whole.pt", 4, files / "rank{rank}.pt")
    assert (files / "whole.pt").read_bytes() == whole
    assert main(["merge", str(files / "whole.pt"), *map(str, parts), "--overwrite"]) == 0
    before = parts[1].read_bytes()
    (files / "link.pt").hardlink_to(parts[1])  # another name of what is read, while it is read
    assert main(["merge", str(files / "link.pt"), *map(str, parts), "--overwrite"]) == 0
    assert same(read_file(files / "link.pt"), read_file(files / "whole.pt"))
    assert parts[1].read_bytes() == before


class Strange:
    pass


def test_a_failed_write_leaves_the_old_file(files, monkeypatch):
    before = (files / "whole.pt").read_bytes()

    def half(content, file):
        file.write(b"half")
        raise OSError("no space left on device")

    names = sorted(path.name for path in files.iterdir())
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space left"):
        write_file(files / "whole.pt", {}, overwrite=True)
    assert (files / "whole.pt").read_bytes() == before
    assert sorted(path.name for path in files.iterdir()) == names


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["r10", "r9", *(f"r{n}" for n in range(9))], [f"r{n}" for n in range(11)]),
        (["run7/rank_1/m.pt", "run7/rank_0/m.pt"], ["run7/rank_0/m.pt", "run7/rank_1/m.pt"]),
        (["step5-rank1.pt", "step6-rank0.pt"], ["step6-rank0.pt", "step5-rank1.pt"]),
        (["b.pt", "a.pt"], ["b.pt", "a.pt"]),
        (["m7.pt"], ["m7.pt"]),
        (["r1", "r2"], "expected files of ranks 0 to 2, got none of rank 0; if the numbers are no ranks"),
        (["r0", "r1", "r01"], "expected one file of each rank, got 2 of rank 1"),
        (["a0-1", "a1-0"], "expected names that differ in one number, the rank, got 2 numbers that differ"),
        (["a", "b", "./a"], "expected each rank's file once, got it 2 times"),
    ],
)
def test_the_order_of_files(given, expected):
    if isinstance(expected, list):
        assert in_rank_order(given) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            in_rank_order(given)


def test_a_file_may_hold_the_layers_config(tmp_path, capsys):
    module = layer(width=[1, 2, 3, 4])
    torch.save({"model": module.state_dict(), "config": module.config}, tmp_path / "whole.pt")
    assert main(["split", str(tmp_path / "whole.pt"), "2", str(tmp_path / "{rank}.pt")]) == 0
    assert main(["merge", str(tmp_path / "again.pt"), str(tmp_path / "0.pt"), str(tmp_path / "1.pt")]) == 0
    again = read_file(tmp_path / "again.pt")
    assert again["config"] == module.config
    assert same(dict(again["model"]), dict(module.state_dict()))


@pytest.mark.parametrize("router", ["cosine", Hash(table=[0, 1, 3]), TopK(noise_std=2.0)])
def test_a_config_comes_back_with_its_router(router, tmp_path):
    losses = {} if isinstance(router, Hash) else {"z": 0.1}
    config = MoEConfig(hidden_size=8, ffn_hidden_size=8, num_experts=4, top_k=1, router=router, losses=losses)
    torch.save({"config": config}, tmp_path / "config.pt")
    again = read_file(tmp_path / "config.pt")["config"]
    assert again == config
    assert MoE(again).config.coefficients == tuple(losses.items())


def test_an_old_file_is_read_too(tmp_path):
    state = dict(layer().state_dict())
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(read_file(tmp_path / "old.pt"), state)


def test_what_was_read_stays_when_the_file_is_written_anew(tmp_path):
    """A training goes on with tensors of a file that it, or another program, then writes over in place."""
    state, path = {"a": torch.arange(4096.0), "b": [torch.ones(3)]}, tmp_path / "state.pt"
    torch.save(state, path)
    read = read_file(path)
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert same(read, state)
