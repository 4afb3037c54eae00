"""Files of adapters: what is read of every release's, and every layout's, is the update that its formula says."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dmoe.lora.adapter_file import apart, joined
from dmoe.lora.command import convert, main
from dmoe.lora.peft_read import read_adapter
from dmoe.lora.peft_write import LAYOUTS

EXPERTS = "model.layers.0.mlp.experts"
BOTH = ("gate_up_proj", "down_proj")


def sizes(name, hidden, width):
    """(out, in) of one expert's matrix."""
    return (2 * width, hidden) if name == "gate_up_proj" else (hidden, width)


def wrapper_files(folder, version, experts, hidden, width, ranks, targets=BOTH, transposed=False, base=None, **fields):
    """An adapter as this release of PEFT names and shapes it, and what it adds to each expert's ``(out, in)``.

    0.18: ``A (r E, x)``, ``B (y, r E)`` of a parameter ``(E, x, y)``, whatever x and y are, and the sum
    ``o r e, e r i -> e i o`` (peft/tuners/lora/layer.py, ``ParamWrapper.get_delta_weight``). From 0.19 on, of a
    parameter that no ``is_transposed`` marks: ``A (r E, y)``, ``B (x, r E)``, ``o r e, e r i -> e o i``.
    """
    torch.manual_seed(0)
    config = {
        "peft_type": "LORA",
        "peft_version": version,
        "r": ranks[0],
        "lora_alpha": 6,
        "bias": "none",
        "target_modules": [],
        "target_parameters": [f"mlp.experts.{name}" for name in targets],
        "rank_pattern": {"experts.down_proj": ranks[1]},
        "base_model_name_or_path": base,
        **fields,
    }
    tensors, deltas = {}, {}
    for depth, name in enumerate(reversed(targets)):
        rank = ranks[1] if name == "down_proj" else ranks[0]
        out, inputs = sizes(name, hidden, width)
        x, y = (inputs, out) if transposed else (out, inputs)  # the parameter is (E, x, y)
        first, second = (x, y) if transposed or version.startswith("0.18") else (y, x)
        turned = version.startswith("0.18") and not transposed  # A is for results
        a, b = torch.randn(rank * experts, first), torch.randn(second, rank * experts)
        alpha = config.get("alpha_pattern", {}).get(f"experts.{name}", 6)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        of_experts = []
        for e in range(experts):
            delta = torch.zeros(second, first, dtype=torch.float64)
            for r in range(rank):
                delta += torch.outer(b[:, r * experts + e].double(), a[e * rank + r].double())
            of_experts.append(scale * (delta.T if turned else delta))
        deltas[name] = of_experts
        path = f"base_model.model.{EXPERTS}{'.base_layer' * depth}"
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    write(folder, config, tensors)
    return deltas


def write(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )


def one_by_one_files(folder, names, experts=3, hidden=6, width=4, rank=2, shared=False, **fields):
    """Experts that are linear layers, and what each adds, by kind: gate, up and down."""
    torch.manual_seed(1)
    tensors, deltas = {}, {}
    for kind, name in zip(("gate", "up", "down"), names, strict=True):
        for e in range(experts):
            out, inputs = (hidden, width) if kind == "down" else (width, hidden)
            a, b = torch.randn(rank, inputs), torch.randn(out, rank)
            if shared and kind == "up":
                a = tensors[f"base_model.model.{EXPERTS}.{e}.{names[0]}.lora_A.weight"]
            path = f"base_model.model.{EXPERTS}.{e}.{name}"
            tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
            deltas.setdefault(kind, []).append(8 / rank * b.double() @ a.double())
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": list(names), **fields}
    write(folder, config, tensors)
    return deltas


def deltas_of(folder, base=None):
    """What a folder is read as: each expert's, by the parameter's name, and of linear layers."""
    found = read_adapter(folder, base)
    assert list(found.experts) in ([], [EXPERTS])
    read = {}
    for name, update in found.experts.get(EXPERTS, {}).items():
        a, b = update.expanded().a.read().double(), update.expanded().b.read().double()
        read[name] = [update.scale * b[e] @ a[e] for e in range(update.num_experts)]
    linear = {name: u.scale * u.b.read().double() @ u.a.read().double() for name, u in found.linear.items()}
    return read, linear


def assert_deltas(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, of_experts in expected.items():
        assert len(found[name]) == len(of_experts)
        for mine, theirs in zip(found[name], of_experts, strict=True):
            assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1), name


@settings(deadline=None, max_examples=40)
@given(
    version=st.sampled_from(["0.18.1", "0.19.1", "0.21.2"]),
    experts=st.integers(1, 4),
    hidden=st.integers(1, 6),
    width=st.integers(1, 4),
    ranks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    transposed=st.booleans(),
    rslora=st.booleans(),
    data=st.data(),
)
def test_every_release_is_read(version, experts, hidden, width, ranks, transposed, rslora, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    base = folder / "base"
    base.mkdir()
    model_type = "gpt_oss" if transposed else "qwen3_moe"
    (base / "config.json").write_text(json.dumps({"model_type": model_type}))
    targets = data.draw(st.sampled_from([BOTH, BOTH[:1], BOTH[1:]]))
    fields = {"use_rslora": rslora, "alpha_pattern": {r"experts.down_proj": 3}, "base": str(base)}
    expected = wrapper_files(folder, version, experts, hidden, width, ranks, targets, transposed, **fields)
    assert_deltas(deltas_of(folder)[0], expected)
    for layout in LAYOUTS:
        if transposed and layout in ("peft-experts", "sglang"):
            continue
        for release in ((0, 18), (0, 19)) if layout == "peft" else ((0, 19),):
            target = folder / f"{layout}{release[1]}"
            convert(folder, target, layout, version=release)
            found = deltas_of(target)[0]
            if "up_proj" in found:  # of one half, by name alone
                found["gate_up_proj"] = [torch.cat([torch.zeros_like(d), d]) for d in found.pop("up_proj")]
            assert_deltas(found, expected, 2e-5)


def test_names_and_shapes_are_those_of_the_releases(tmp_path):
    """As PEFT 0.18.1, 0.19.1 and 0.21.2 wrote them for E = 4, H = 32, F = 24, r = 4."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "qwen3_moe"}')
    golden = {
        "0.18.1": {
            "base_layer.lora_A": (16, 48),
            "base_layer.lora_B": (32, 16),
            "lora_A": (16, 32),
            "lora_B": (24, 16),
        },
        "0.19.1": {
            "base_layer.lora_A": (16, 32),
            "base_layer.lora_B": (48, 16),
            "lora_A": (16, 24),
            "lora_B": (32, 16),
        },
    }
    golden["0.21.2"] = golden["0.19.1"]
    for version, shapes in golden.items():
        made = tmp_path / version
        wrapper_files(made, version, 4, 32, 24, (4, 4), base=str(base))
        again = tmp_path / f"{version}-again"
        release = tuple(int(part) for part in version.split(".")[:2])
        convert(made, again, "peft", version=release)
        for folder in (made, again):
            found = load_file(folder / "adapter_model.safetensors")
            expected = {f"base_model.model.{EXPERTS}.{name}.weight": shape for name, shape in shapes.items()}
            assert {name: tuple(tensor.shape) for name, tensor in found.items()} == expected
        before, after = (load_file(folder / "adapter_model.safetensors") for folder in (made, again))
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
@pytest.mark.parametrize("shared", [False, True])
def test_experts_one_by_one(names, shared, tmp_path):
    deltas = one_by_one_files(tmp_path / "a", names, shared=shared)
    expected = {
        "gate_up_proj": [torch.cat(pair) for pair in zip(deltas["gate"], deltas["up"], strict=True)],
        "down_proj": deltas["down"],
    }
    assert_deltas(deltas_of(tmp_path / "a")[0], expected)
    update = read_adapter(tmp_path / "a").experts[EXPERTS]["gate_up_proj"]
    assert update.rank == (2 if shared else 4)  # one A for both, or one of each
    convert(tmp_path / "a", tmp_path / "b", "peft")
    assert_deltas(deltas_of(tmp_path / "b")[0], expected)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral" if names[0] == "w1" else "qwen3_moe"}))
    convert(tmp_path / "b", tmp_path / "c", "peft-experts", base=tmp_path)
    first, last = (load_file(tmp_path / each / "adapter_model.safetensors") for each in "ac")
    assert first.keys() == last.keys()
    if not shared:  # the very factors, and not those of twice the rank
        assert all(torch.equal(first[name], last[name]) for name in first)


def test_one_half_alone(tmp_path):
    one_by_one_files(tmp_path / "a", ("gate_proj", "up_proj", "down_proj"))
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    write(tmp_path / "b", config, {name: t for name, t in tensors.items() if "gate_proj" in name})
    both, half = (deltas_of(tmp_path / each)[0]["gate_up_proj"] for each in "ab")
    for whole, alone in zip(both, half, strict=True):
        torch.testing.assert_close(alone, torch.cat([whole[:4], torch.zeros(4, 6)]).double())


def test_halves_of_other_scales_and_ranks(tmp_path):
    """``alpha_pattern`` and ``rank_pattern`` of one kind of projection."""
    torch.manual_seed(2)
    ranks, scales, tensors = {"gate_proj": 1, "up_proj": 3, "down_proj": 2}, {}, {}
    for name, rank in ranks.items():
        for e in range(2):
            path = f"{EXPERTS}.{e}.{name}"
            shape = (5, 3) if name == "down_proj" else (3, 5)
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, shape[1])
            tensors[f"{path}.lora_B.weight"] = torch.randn(shape[0], rank)
        scales[name] = (7 if name == "up_proj" else 4) / rank
    config = {"r": 2, "lora_alpha": 4, "rank_pattern": {"gate_proj": 1, "up_proj": 3}, "alpha_pattern": {"up_proj": 7}}
    write(tmp_path / "a", config, tensors)

    def delta(e, name):
        a, b = (tensors[f"{EXPERTS}.{e}.{name}.lora_{side}.weight"].double() for side in "AB")
        return scales[name] * b @ a

    expected = {
        "gate_up_proj": [torch.cat([delta(e, "gate_proj"), delta(e, "up_proj")]) for e in range(2)],
        "down_proj": [delta(e, "down_proj") for e in range(2)],
    }
    assert_deltas(deltas_of(tmp_path / "a")[0], expected)
    for layout in LAYOUTS:
        convert(tmp_path / "a", tmp_path / layout, layout)
        assert_deltas(deltas_of(tmp_path / layout)[0], expected)
        said = json.loads((tmp_path / layout / "adapter_config.json").read_text())
        assert (said["rank_pattern"] == {}) is (layout != "peft")  # servers know no patterns


def test_other_layers_come_along(tmp_path):
    deltas = wrapper_files(tmp_path / "a", "0.21.2", 2, 6, 4, (2, 2))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    a, b = torch.randn(5, 6), torch.randn(7, 5)
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    config["rank_pattern"]["q_proj"] = 5
    write(tmp_path / "b", config, tensors)
    for layout in LAYOUTS:
        convert(tmp_path / "b", tmp_path / layout, layout)
        found, linear = deltas_of(tmp_path / layout)
        assert_deltas(found, deltas)
        assert list(linear) == ["model.layers.0.self_attn.q_proj"]
        torch.testing.assert_close(linear["model.layers.0.self_attn.q_proj"], 6 / 5 * b.double() @ a.double())


def test_factors_of_all_experts_may_be_shared(tmp_path):
    torch.manual_seed(0)
    a, b = torch.randn(1, 2, 6), torch.randn(3, 8, 2)
    path = f"base_model.model.{EXPERTS}.gate_up_proj"
    write(tmp_path / "a", {"r": 2, "lora_alpha": 2}, {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b})
    assert_deltas(deltas_of(tmp_path / "a")[0], {"gate_up_proj": [b[e].double() @ a[0].double() for e in range(3)]})
    convert(tmp_path / "a", tmp_path / "b", "sglang")
    assert len(load_file(tmp_path / "b" / "adapter_model.safetensors")) == 12


def test_joined_and_apart_undo_each_other(tmp_path):
    one_by_one_files(tmp_path / "a", ("w1", "w3", "w2"))
    update = read_adapter(tmp_path / "a").experts[EXPERTS]["gate_up_proj"]
    again = joined(*apart(update), "here")
    assert torch.equal(again.a.read(), update.a.read())
    assert torch.equal(again.b.read(), update.b.read())


def damaged(files, config):
    """What may be wrong, and the part of the sentence that says so."""
    a, b = f"base_model.model.{EXPERTS}.lora_A.weight", f"base_model.model.{EXPERTS}.lora_B.weight"
    inner = f"base_model.model.{EXPERTS}.base_layer.lora_A.weight"
    other = "base_model.model.lm_head"
    without = {name: tensor for name, tensor in files.items() if name != b}
    yield without, config, rf"{EXPERTS}: expected both factors, got no lora_B.weight"
    yield {n: t for n, t in files.items() if "base_layer" not in n}, config, rf"{EXPERTS}: expected a wrapper for each"
    yield {**files, a: files[a][:-1]}, config, r"expected lora_A \(E r, in\) and lora_B \(out, r E\) of r = 2"
    yield {**files, inner: files[inner][:, :-1]}, config, r"expected factors of projections \(E, 2 F, H\)"
    yield files, {**config, "r": 3}, r"of r = 3, as adapter_config.json says"
    yield {**files, "lm_head.weight": files[a]}, config, r"lm_head.weight: expected a name that ends with"
    yield {**files, f"{other}.lora_A.weight": files[a]}, config, r"lm_head: expected both factors"
    yield (
        {**files, a: files[a].to(torch.int32)},
        config,
        r"expected a factor of floating-point numbers, got torch.int32",
    )
    yield files, {**config, "use_dora": True}, r"adapter_config.json: use_dora: expected False"
    yield files, {**config, "modules_to_save": ["lm_head"]}, r"modules_to_save: expected None"
    yield files, {**config, "peft_type": "LOHA"}, r"peft_type: expected LORA, got 'LOHA'"
    yield files, {**config, "bias": "all"}, r"bias: expected 'none'"
    for rank in ("2", 0.5, 0, True, float("nan"), float("inf"), 10**400):
        yield files, {**config, "r": rank}, r"json: r: expected a whole number of at least 1, got"
        yield files, {**config, "rank_pattern": {"x": rank}}, r"rank_pattern: expected names, each with a whole number"
    for alpha in ("2", -1, float("nan"), float("inf"), 10**400):
        yield files, {**config, "lora_alpha": alpha}, r"lora_alpha: expected a positive number, got"
        yield files, {**config, "alpha_pattern": {"x": alpha}}, r"alpha_pattern: expected names, each with a positive"
    for pattern in ("(", "a{99999999999999}", "(([a-z._0-9]+)+)+!", ".*" * 9, "x" * 999):
        yield files, {**config, "rank_pattern": {pattern: 2}}, r"rank_pattern: expected names or simple regular expr"
    for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq"):
        yield files, {**config, "init_lora_weights": start}, r"init_lora_weights: expected a start that leaves the base"
    yield files, {**config, "use_rslora": "false"}, r"use_rslora: expected true or false, got 'false'"
    yield files, {**config, "target_parameters": "gate"}, r"target_parameters: expected a list of names"
    yield files, {**config, "target_parameters": ["experts.gate_up_proj_bias"]}, r"expected projections of experts"
    linear = {f"{other}.lora_A.weight": torch.ones(3, 4), f"{other}.lora_B.weight": torch.ones(4, 3)}
    yield linear, config, r"lm_head: expected rank 2, as adapter_config.json says, got factors of rank 3"
    linear = {f"{other}.lora_A.weight": torch.ones(2, 4), f"{other}.lora_B.weight": torch.ones(4, 3)}
    yield linear, config, r"lm_head: expected lora_A and lora_B \(r, in\) and \(out, r\), got \(2, 4\) and \(4, 3\)"
    apart = {f"{EXPERTS}.{e}.w2.lora_{s}.weight": torch.ones(2, 2) for e in (0, 2) for s in "AB"}
    yield apart, config, r"expected down projections of experts 0 to 2, got none of expert 1"
    far = {f"{EXPERTS}.{10**9}.w2.lora_{s}.weight": torch.ones(2, 2) for s in "AB"}
    yield far, config, r"expected at most 65536 experts"


def test_what_is_wrong_is_said_and_nothing_written(tmp_path, capsys):
    wrapper_files(tmp_path / "good", "0.21.2", 2, 6, 4, (2, 2))
    config = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    files = load_file(tmp_path / "good" / "adapter_model.safetensors")
    for number, (tensors, said, message) in enumerate(damaged(files, {**config, "rank_pattern": {}})):
        write(tmp_path / str(number), said, tensors)
        with pytest.raises(ValueError, match=message):
            read_adapter(tmp_path / str(number))
        before = sorted(tmp_path.iterdir())
        assert main(["convert", str(tmp_path / str(number)), str(tmp_path / "out"), "--to", "peft"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert sorted(tmp_path.iterdir()) == before
    for missing in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "good" / missing).rename(tmp_path / missing)
        with pytest.raises(FileNotFoundError, match=r"expected an adapter's|expected adapter_model"):
            read_adapter(tmp_path / "good")
        (tmp_path / missing).rename(tmp_path / "good" / missing)


def test_one_projection_of_018_needs_the_model(tmp_path):
    wrapper_files(tmp_path / "a", "0.18.1", 2, 6, 4, (2, 2), BOTH[1:])
    with pytest.raises(ValueError, match=r"base_model_name_or_path: expected it to tell which factor of model"):
        read_adapter(tmp_path / "a")


def test_a_pickle_is_read_and_not_executed(tmp_path):
    expected = wrapper_files(tmp_path, "0.21.2", 2, 6, 4, (2, 2))
    file = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "adapter_model.bin")
    file.unlink()
    assert_deltas(deltas_of(tmp_path)[0], expected)


def test_stacked_models_have_no_names_for_experts(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt_oss"}')
    expected = wrapper_files(tmp_path / "a", "0.21.2", 2, 6, 4, (2, 2), transposed=True, base=str(tmp_path))
    for layout in ("peft-experts", "sglang"):
        with pytest.raises(ValueError, match="expected a model whose experts have names of their own"):
            convert(tmp_path / "a", tmp_path / layout, layout)
    convert(tmp_path / "a", tmp_path / "vllm", "vllm")
    assert any("experts.base_layer.lora_A" in name for name in load_file(tmp_path / "vllm/adapter_model.safetensors"))
    assert_deltas(deltas_of(tmp_path / "vllm")[0], expected)
