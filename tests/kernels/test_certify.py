"""Kernels that are broken on purpose are refused, and the layer goes on without them; sound ones are trusted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import broken_kernels
import pytest
import torch
from helpers import interpreted
from patience import MOMENT, PATIENCE

import dmoe.certify
from dmoe import MoE
from dmoe.certify import far
from dmoe.certify.checks import certify
from dmoe.certify.standard import call
from dmoe.info import report
from dmoe.ops import _library, _trust, _verdicts, fp8_ref, weight_formats

pytest.importorskip("triton")
from dmoe.kernels import _launch, moe_mlp, moe_mlp_rows, offline  # noqa: F401  # needs Triton

NAMES = ("moe_mlp", "moe_mlp_inference", "moe_mlp_lean", "moe_mlp_backward", "moe_mlp_backward_into")
BROKEN = {
    "sign": r"the worst row is off by 2\.0e\+00 of its norm",
    "tail": "the worst row is off by",
    "shape": "backward: gradient of .* the worst row is off by nan",
    "exception": "RuntimeError: out of resource: shared memory",
    "hang": "it did not end within",
    "crash": "it ended the process that ran it, with signal SIGSEGV",
    "luck": "two runs gave different bits",
}


@pytest.fixture(autouse=True)
def _as_users_have_it(monkeypatch):
    monkeypatch.delenv("DMOE_CERTIFY", raising=False)


@pytest.fixture
def certifier(tmp_path, monkeypatch):
    """Operations on the CPU run what a GPU would; who certifies is ``python broken_kernels.py HOW``."""
    monkeypatch.setenv("DMOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_verdicts, "LIMIT", PATIENCE)
    monkeypatch.setattr(_verdicts, "START", PATIENCE)
    library = torch.library.Library("dmoe", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in NAMES:
            library.impl(name, _trust.guards[name], "CPU", allow_override=True)
    _trust.forget()

    def broken(how):
        monkeypatch.setattr(_verdicts, "SERVER", [sys.executable, broken_kernels.__file__, how, "--serve"])
        if how == "hang":
            monkeypatch.setattr(_verdicts, "LIMIT", MOMENT)

    yield broken
    library._destroy()
    _verdicts.close()
    _trust.forget()


def step(layer, x, grad):
    """y and all gradients of a training step."""
    y = layer(x)
    leaves = [x, *layer.parameters()]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def layers():
    torch.manual_seed(0)
    config = {"hidden_size": 16, "ffn_hidden_size": 16, "num_experts": 6, "top_k": 2}
    ours, plain = (MoE(**config, load_balancing_coefficient=0.0, backend=backend) for backend in (None, "reference"))
    plain.load_state_dict(ours.state_dict())
    return ours, plain, torch.randn(40, 16, requires_grad=True), torch.randn(40, 16)


@interpreted
@pytest.mark.parametrize("how", BROKEN)
def test_what_is_broken_is_refused_and_the_layer_is_right(certifier, how, monkeypatch):
    certifier(how)
    ours, plain, x, grad = layers()
    refused = {"shape": ["moe_mlp_backward"], "tail": ["moe_mlp"]}.get(how, ["moe_mlp", "moe_mlp_backward"])
    if how == "luck":  # in whichever half the doubled bit shows first
        refused = None
    with pytest.warns(RuntimeWarning, match=f"its kernels are not used on cpu: .*{BROKEN[how]}") as caught:
        results = step(ours, x, grad)
    assert len([each for each in caught if "its kernels are not used" in str(each.message)]) == 1
    if refused is not None:
        assert sorted(_trust.refused) == refused
    for ours_, theirs in zip(results, step(plain, x, grad), strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="dmoe: ")
        step(ours, x, grad)  # it has been said

    # Who comes later reads the verdict, and asks nobody.
    _trust.forget()
    monkeypatch.setattr(_verdicts, "ask", None)
    with pytest.warns(RuntimeWarning, match="its kernels are not used"):
        step(ours, x, grad)
    facts = report()["kernels"]
    assert facts["refused"] == _trust.refused
    assert facts["certificates"].endswith(".json")


@interpreted
def test_what_is_sound_is_trusted_and_runs(certifier):
    certifier("sound")
    ours, plain, x, grad = layers()
    launched = []
    original = _launch.launch

    def noted(kernel, *rest, **options):
        launched.append(kernel.__name__)
        original(kernel, *rest, **options)

    with offline.instead_of_launching(noted), warnings.catch_warnings():
        warnings.filterwarnings("error", message="dmoe: ")
        results = step(ours, x, grad)
        count = len(launched)
        step(ours, torch.randn(23, 16, requires_grad=True), torch.randn(23, 16))  # another number of tokens: known
    assert launched[:3] == ["up_kernel", "rows_kernel", "combine_kernel"]
    assert len(launched) == 2 * count == 16
    for ours_, theirs in zip(results, step(plain, x, grad), strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-5)


def test_who_trusts_everything_asks_nobody(certifier, monkeypatch):
    monkeypatch.setenv("DMOE_CERTIFY", "0")
    monkeypatch.setattr(_verdicts, "certified", None)
    ours, _, x, grad = layers()
    step(ours, x, grad)
    monkeypatch.setenv("DMOE_CERTIFY", "2")
    with pytest.raises(ValueError, match=r"DMOE_CERTIFY: expected 0, 1 or full, got '2'"):
        ours(x)


def test_no_process_to_be_had_is_no_verdict_for_tomorrow(certifier, monkeypatch, tmp_path):
    monkeypatch.setattr(_verdicts, "SERVER", [str(tmp_path / "nothing")])
    ours, plain, x, grad = layers()
    with pytest.warns(RuntimeWarning, match="not used on cpu: certifying did not start: .*No such file"):
        results = step(ours, x, grad)
    torch.testing.assert_close(results, step(plain, x, grad), rtol=1e-4, atol=1e-5)
    assert not _verdicts.read(_verdicts.path_of(torch.device("cpu")))


def test_nothing_is_certified_on_a_cpu(monkeypatch):
    """The CPU's own operations stand before no guard."""
    monkeypatch.setattr(_verdicts, "certified", None)
    ours, _, x, grad = layers()
    step(ours, x, grad)


def test_calls_of_a_kind_share_a_verdict():
    """Numbers of tokens and experts decide nothing; dtype, features, layout, alignment and options do."""
    call = _subject()
    assert _subject(tokens=99, experts=11).key == call.key
    for change in (
        {"hidden": 24},
        {"dtype": torch.float16},
        {"transposed": True},
        {"activation": "relu"},
        {"shift": 1},
    ):
        assert _subject(**change).key != call.key, change


def _subject(tokens=8, experts=4, hidden=16, dtype=torch.float32, transposed=False, activation="silu", shift=0):
    x = torch.empty(tokens * hidden + 16, dtype=dtype)[shift : shift + tokens * hidden].view(tokens, hidden)
    down = torch.empty(experts, hidden, 8, dtype=dtype)
    down = torch.empty(experts, 8, hidden, dtype=dtype).mT if transposed else down
    return _trust.Subject("moe_mlp", (x, down, torch.empty(experts + 1, dtype=torch.int32), activation))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": {"refused": 1}}'])
def test_a_file_that_is_something_else_holds_no_verdicts(tmp_path, text):
    path = tmp_path / "certified.json"
    path.write_text(text)
    assert _verdicts.read(path) == {}


def test_verdicts_are_of_one_machine_and_its_versions(monkeypatch):
    machine = _verdicts.machine(torch.device("cpu"))
    assert f"torch {torch.__version__}" in machine
    before = _verdicts.path_of(torch.device("cpu"))
    monkeypatch.setattr(_verdicts, "machine", lambda device: machine + " another driver")
    assert _verdicts.path_of(torch.device("cpu")) != before


def test_launch_shapes_that_were_measured_are_certified_as_such():
    from dmoe.kernels import configs

    name = _verdicts.name_of(_subject())
    configs.replace_measured({"down/hopper/2/128/64/32": configs.Config(32, 128, 2, 2)})
    try:
        assert _verdicts.name_of(_subject()) != name
    finally:
        configs.replace_measured({})
    assert _verdicts.name_of(_subject()) == name


def test_operations_of_csrc_wait_for_their_verdict(monkeypatch):
    """What stands before them asks once, then it is gone; refused, the reference serves."""
    monkeypatch.setattr(_library, "_on_probation", [])
    monkeypatch.setattr(_library, "probation", {})
    asked = []
    reference = lambda values, num_bins: torch.full((num_bins,), -7, dtype=torch.int32)  # noqa: E731
    for verdict, expected in ((False, [-7, -7]), (True, [1, 2])):
        monkeypatch.setattr(_library, "trusts_compiled", lambda arguments, v=verdict: asked.append(1) or v)
        _library._put_on_probation("histogram", reference, "CPU")
        try:
            for _ in range(2):
                assert torch.ops.dmoe.histogram(torch.tensor([1, 0, 1]), 2).tolist() == expected
        finally:
            while _library._on_probation:
                _library._on_probation.pop()._destroy()
    assert len(asked) == 2 + 1


@interpreted
@pytest.mark.parametrize("part", ["moe_mlp", "moe_mlp_backward"])
def test_far_away_gives_the_same_bits_or_is_told(part):
    """A number of a row that wraps around, as an int32 product of row and width does, is found."""
    asked = [_verdicts._described(value) for value in call(16, 16, torch.float32, residual=part == "moe_mlp")]
    cpu = torch.device("cpu")
    assert far.difference(part, asked, cpu, 16, 5000) == ""
    original = _launch.launch

    def wrapped(kernel, grid, *arguments, **options):
        if kernel.__name__ == "combine_kernel":
            place = kernel.arg_names.index("token_rows")
            arguments = (*arguments[:place], arguments[place] % 200, *arguments[place + 1 :])
        original(kernel, grid, *arguments, **options)

    with offline.instead_of_launching(wrapped):
        assert "beyond 2**31 numbers it differs" in far.difference(part, asked, cpu, 16, 5000)


def _calls():
    """By operation, arguments that its kernels serve."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    offsets = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
    codes, scales, zeros = weight_formats.encode(normal(3, 20, 64), "int4", (1, 32), True)
    thin = normal(9, 5), normal(3, 20, 5)
    rows, weight = normal(9, 64), normal(3, 20, 64)
    a_codes, w_codes = fp8_ref.quantize_rows_ref(rows), fp8_ref.quantize_blocks_ref(weight)
    return {
        "grouped_gemm_sum": (rows, weight, *thin, offsets, True),
        "quantized_gemm": (rows, codes, scales, zeros, "int4", [1, 32], offsets, True, *thin),
        "fp8_quantize_rows": (rows, torch.arange(-1, 9, dtype=torch.int32), torch.rand(10)),
        "fp8_quantize_blocks": (weight, True),
        "fp8_gemm": (*a_codes, *w_codes[:2], offsets, True, torch.float32),
    }


@interpreted
@pytest.mark.parametrize("name", _calls())
def test_what_a_call_tells_is_certified_and_what_is_broken_refused(name):
    """Thin products, quantised weights and fp8: a kernel with one number wrong, or one bit of a code, is found."""
    (subject,) = _trust.guards[name].subjects(*_calls()[name])
    assert not [v for v in subject.arguments if isinstance(v, torch.Tensor) and v.dtype in (torch.uint8, torch.int8)]
    described = [_verdicts._described(value) for value in subject.arguments]
    cpu, original = torch.device("cpu"), _launch.launch
    assert certify(subject.part, described, subject.extra, cpu) == ""

    def wrong(kernel, grid, *arguments, **options):
        original(kernel, grid, *arguments, **options)
        names = kernel.arg_names
        result = arguments[names.index("out" if "out" in names else "codes")].view(-1)
        result[7] = result[7] ^ 1 if result.dtype == torch.uint8 else 100.0

    with offline.instead_of_launching(wrong):
        reason = certify(subject.part, described, subject.extra, cpu)
    assert ("the worst row is off by" if "gemm" in name else "integers are wrong") in reason


COMPILE = """
import json, sys, torch
from dmoe.certify import serve, standard
from dmoe.kernels import offline
from dmoe.ops import _verdicts
compiled = []
original = offline.compiling
def noting(*arguments, **options):
    context = original(*arguments, **options)
    class Noting:
        def __enter__(self):
            self.launched = context.__enter__()
        def __exit__(self, *error):
            compiled.extend((name, kernel.hash) for name, kernel in self.launched)
            assert error[0] is None, error
            return context.__exit__(*error)
    return Noting()
offline.compiling = noting
for name, subject in standard.standard_subjects().items():
    if name in sys.argv[1:]:
        arguments = [_verdicts._described(value) for value in subject.arguments]
        job = {"part": subject.part, "arguments": arguments, "extra": subject.extra, "launch_shapes": {}}
        for index in range(2):
            serve.compile_share(job, 90, index, 2)
print(json.dumps(sorted(set(map(tuple, compiled)))))
"""


def test_what_a_layer_certifies_is_compiled_from_shapes_alone():
    """In shares, for a GPU that is not here; so many kernels a first use compiles, as the package's text says."""
    size = "H=256 F=192, 128 rows"
    names = [f"moe_mlp{half} bfloat16, gated, {size}" for half in ("", "_backward")]
    names += [f"router_logits{half} bfloat16, 128 experts, weight torch.float32" for half in ("", "_backward")]
    names += [f"router_top_k{half} softmax" for half in ("", "_backward")]
    done = _run([sys.executable, "-c", COMPILE, *names], {"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = json.loads(done.stdout)
    kernels = {name for name, _ in compiled}
    assert {"up_kernel", "rows_kernel", "combine_kernel", "hidden_grad_kernel", "weight_grad_kernel"} <= kernels
    assert {"router_top_k_kernel", "router_top_k_backward_kernel"} <= kernels
    told = int(re.search(r"at most (\d+) kernels for a layer that\s+trains", dmoe.certify.__doc__)[1])
    assert len(compiled) == told


@interpreted
def test_the_command_names_what_it_refuses(tmp_path):
    """On a subset, under the interpreter; the report is renewed after each subject."""
    environment = {"DMOE_CACHE_DIR": str(tmp_path)}
    for how, status in (("sound", 0), ("exception", 1)):
        command = [sys.executable, broken_kernels.__file__, how, "--device", "cpu", "--only", "grouped_gemm float32"]
        done = _run([*command, "--json", str(tmp_path / f"{how}.json")], environment)
        assert done.returncode == status, done.stdout + done.stderr
        report = json.loads((tmp_path / f"{how}.json").read_text())
        reasons = [verdict["refused"] for verdict in report["verdicts"].values()]
        assert len(reasons) == 2
        assert all(("out of resource" in reason) == bool(status) for reason in reasons)
    out_of_time = _run(
        [sys.executable, "-m", "dmoe.certify", "--device", "cpu", "--only", "tile", "--seconds", "0"], environment
    )
    assert "0 of 2 refused, 2 left out on cpu" in out_of_time.stdout
    listed = _run([sys.executable, "-m", "dmoe.certify", "--list"], environment)
    assert "moe_mlp bfloat16, gated, H=256 F=192, 128 rows" in listed.stdout.splitlines()
    refused = _run([sys.executable, "-m", "dmoe.certify"], {**environment, "TRITON_INTERPRET": "0"})
    assert refused.returncode == 2
    assert "expected a CUDA device, and this machine has none" in refused.stderr


def _run(command, environment):
    import os

    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=PATIENCE,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
