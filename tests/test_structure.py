"""Who may import whom, read from the sources; what `import dmoe` does to the process: nothing; where tests lie."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import dmoe

ROOT = Path(__file__).resolve().parent.parent

# Room -> rooms it may import from, besides itself. One line for each row of the design.
MAY_IMPORT: dict[str, set[str]] = {
    "activations": set(),
    "kernels": {"activations", "strides"},
    "activation_functions": {"activations", "known_activations"},
    "config": {"activation_functions", "activations", "sizes", "capacity", "config_checks", "router_family"},
    "config_checks": {"activation_functions", "config", "router_family"},
    "capacity": set(),
    "router_family": {"config"},
    "initial": set(),
    "sizes": set(),
    "buffers": set(),
    "strides": set(),
    "outputs": set(),
    "sums": set(),
    "losses": {"sums"},
    "metrics": {"routing", "parallel", "sums"},
    "inputs": {"config"},
    "auxiliary": {"config", "losses", "ops", "outputs", "routing", "parallel"},
    "ops": {"activations", "kernels", "sizes", "strides", "sums"},
    "plan": {"ops", "config"},
    "routing": {
        "ops",
        "plan",
        "config",
        "buffers",
        "capacity",
        "expert_states",
        "initial",
        "losses",
        "parallel",
        "router_family",
        "sizes",
    },
    "expert_slice": set(),
    "expert_states": set(),
    "expert_targets": set(),
    "quantized_weight": {"ops", "strides"},
    "expert_weights": {"ops", "quantized_weight"},
    "adapters": {"ops", "expert_slice", "expert_weights"},
    "adapter_factors": {"ops", "adapters", "expert_weights", "strides"},
    "expert_inputs": {
        "activation_functions",
        "activations",
        "ops",
        "plan",
        "config",
        "adapters",
        "expert_weights",
        "strides",
    },
    "functional": {
        "activation_functions",
        "activations",
        "adapter_factors",
        "quantized_weight",
        "ops",
        "plan",
        "config",
        "adapters",
        "expert_inputs",
        "expert_weights",
        "outputs",
        "strides",
    },
    "expert_init": {"expert_slice", "expert_weights", "initial"},
    "experts": {
        "activation_functions",
        "ops",
        "plan",
        "config",
        "expert_init",
        "expert_slice",
        "expert_states",
        "expert_weights",
        "parallel",  # experts that are lent
        "functional",
    },
    "other_experts": {"expert_slice", "expert_weights", "experts"},
    "quant": {"config", "expert_slice", "expert_targets", "experts", "ops", "other_experts", "quantized_weight"},
    "shared_expert": {"ops", "plan", "config", "experts"},
    "parallel": {"activation_functions", "ops", "plan", "config", "expert_slice", "expert_weights"},
    "direct": {"config", "experts", "metrics", "ops", "parallel", "routing"},
    "layer": {
        "direct",
        "ops",
        "plan",
        "config",
        "buffers",
        "inputs",
        "auxiliary",
        "sums",
        "metrics",
        "routing",
        "experts",
        "shared_expert",
        "parallel",
    },
    "optim": {"expert_slice"},
    "metric_sums": {"metrics"},
    "model_tools": {"layer", "config", "parallel", "metrics", "metric_sums"},
    "monitoring": {"experts", "layer", "metric_sums", "metrics", "model_tools", "ops", "parallel", "routing"},
    "report": {"monitoring"},
    "record_file": set(),
    "routing_record": {"record_file"},
    "replay": {"layer", "model_tools", "routing_record"},
    "lora": {
        "ops",
        "adapters",
        "checkpoint",
        "expert_init",
        "expert_slice",
        "expert_targets",
        "experts",
        "layer",
        "model_tools",
        "other_experts",
        "parallel",
        "routing",
    },
    "config_json": {"activation_functions", "config", "router_family"},
    "models": {
        "activations",
        "checkpoint",
        "config",
        "config_json",
        "known_activations",
        "layer",
        "residual",
    },
    "generate": {"checkpoint", "models"},
    "checkpoint": {
        "activations",
        "config",
        "config_json",
        "layer",
        "parallel",
        "presets",
        "router_family",
        "routing",
    },
    "known_activations": {"activations"},
    "dense_ffn": {"activations", "known_activations"},
    "find_ffn": {"layer", "dense_ffn"},
    "dense_copies": set(),
    "upcycle": {"layer", "config", "dense_copies", "dense_ffn", "expert_init", "experts"},
    "replace": {"layer", "config", "dense_ffn", "find_ffn", "residual", "upcycle"},
    "residual": {"config"},
    "presets": {"activations", "config", "routing", "router_family"},
    # A command inside a room, with a row for each of its files: nothing that the layer needs may import as much.
    "routing.show": {"config", "presets", "router_family", "routing"},
    "routing.view": {"auxiliary", "config", "metrics", "routing"},
    "routing.terminal": {"routing"},
    "routing.picture": {"routing"},
    "routing.logits_file": set(),
    "info": {"ops"},
    "certify": {"activations", "kernels", "ops"},
    "tune": {"activations", "kernels", "ops", "plan", "functional", "expert_weights"},
    "compat": {
        "activations",
        "layer",
        "config",
        "ops",
        "plan",
        "losses",
        "metrics",
        "parallel",
        "dense_ffn",
        "expert_slice",
        "expert_weights",
        "experts",
        "functional",
        "known_activations",
        "outputs",
        "residual",
        "routing",
        "model_tools",
        "upcycle",
    },
}
# Packages from outside, besides the standard library.
OUTSIDE: dict[str, set[str]] = {room: {"torch"} for room in MAY_IMPORT} | {
    "kernels": {"torch", "triton"},
    "ops": {"torch", "stk"},
    "compat": {"torch", "stk"},
    "checkpoint": {"torch", "tqdm", "numpy", "safetensors", "huggingface_hub"},
    "lora": {"torch", "safetensors"},
    "certify": {"torch", "tqdm"},
    "tune": {"torch", "tqdm"},
    "generate": {"torch", "tokenizers", "tqdm"},
    "monitoring": {"torch", "wandb"},
    "report": {"torch", "matplotlib", "tokenizers"},
    "routing.picture": {"torch", "matplotlib"},
}
# Folder of tests -> what they test. What several files share lies in tests/support, the only folder on the path.
TESTED = {
    "ops": "dmoe/ops",
    "kernels": "dmoe/kernels",
    "layer": "dmoe/layer.py",
    "lora": "dmoe/lora",
    "presets": "dmoe/presets",
    "routing": "dmoe/routing",
    "parallel": "dmoe/parallel",
    "checkpoint": "dmoe/checkpoint",
    "models": "dmoe/models",
    "compat": "dmoe/compat",
    "quant": "dmoe/quant",
    "monitoring": "dmoe/monitoring",
    "gpu": "dmoe",
    "megatron": "integrations/megatron",
    "fairseq": "integrations/fairseq_moe",
    "transformers": "integrations/transformers",
    "lightning": "integrations/lightning",
    "accelerate": "integrations/accelerate",
    "torchtitan": "integrations/torchtitan",
    "deepspeed": "integrations/deepspeed",
    "examples": "examples",
    "benchmarks": "benchmarks",
}
OF_THE_WHOLE = {"test_info.py", "test_install.py", "test_machine.py", "test_structure.py"}  # in tests/ itself


class Import(NamedTuple):
    """One imported module, names taken from it (empty for ``import x``), where."""

    module: str
    names: tuple[str, ...]
    line: int


def imports_of(source: str, package: str = "") -> list[Import]:
    """Every import in a source, wherever it stands, with relative ones made absolute."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, (), node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*base, *([module] if module else [])])
            found.append(Import(module, tuple(alias.name for alias in node.names), node.lineno))
    return found


def offences(room: str, source: str, package: str) -> list[str]:
    """What a file of a room imports and may not."""
    wrong = []
    for module, names, line in imports_of(source, package):
        top, _, rest = module.partition(".")
        if top == "dmoe":
            rooms = {rest.partition(".")[0]} if rest else set(names) or {"the package itself"}
            wrong += [f"line {line}: {room} imports {target}" for target in rooms - MAY_IMPORT[room] - {room}]
        elif top not in sys.stdlib_module_names and top not in OUTSIDE[room]:
            wrong.append(f"line {line}: {room} imports {module}")
    return wrong


def public_offences(source: str, package: str = "") -> list[str]:
    """Uses of dmoe that are not in its public names."""
    wrong = []
    for module, names, line in imports_of(source, package):
        top, _, rest = module.partition(".")
        if top != "dmoe" or rest.startswith("integrations"):
            continue
        if rest:  # a public submodule, or one name of it
            head, private = (
                rest.partition(".")[0],
                [name for name in (*rest.split("."), *names) if name.startswith("_")],
            )
            if head not in dmoe.__all__ or private:
                wrong.append(f"line {line}: imports {module} {' '.join(names)}")
        else:
            wrong += [f"line {line}: imports {name}" for name in names if name not in (*dmoe.__all__, "integrations")]
    for node in ast.walk(ast.parse(source)):
        of_dmoe = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dmoe"
        if of_dmoe and node.attr not in (*dmoe.__all__, "integrations") and not node.attr.startswith("__"):
            wrong.append(f"line {node.lineno}: uses dmoe.{node.attr}")
    return wrong


PACKAGE = sorted(path for path in (ROOT / "dmoe").rglob("*.py") if path != ROOT / "dmoe" / "__init__.py")
USERS = sorted(path for folder in ("integrations", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(path: Path) -> str:
    """A file of the package: its own row of the table where it has one, else its room."""
    parts = path.relative_to(ROOT / "dmoe").with_suffix("").parts
    return ".".join(parts) if ".".join(parts) in MAY_IMPORT else parts[0]


@pytest.mark.parametrize("path", PACKAGE, ids=_id)
def test_who_imports_whom(path):
    room = room_of(path)
    assert room in MAY_IMPORT, f"{_id(path)}: a room that the table does not name"
    package = ".".join(path.relative_to(ROOT).parent.parts)
    assert not offences(room, path.read_text(), package)


@pytest.mark.parametrize("path", USERS, ids=_id)
def test_who_uses_dmoe_from_outside_uses_public_names(path):
    assert not public_offences(path.read_text())


def test_only_a_command_imports_its_own_files():
    own = {f"dmoe.{room}" for room in MAY_IMPORT if "." in room}
    for path in PACKAGE:
        if "." not in room_of(path):
            found = {f"{module}.{name}" for module, names, _ in imports_of(path.read_text()) for name in ("", *names)}
            assert not own & {name.rstrip(".") for name in found}, _id(path)


def test_the_package_holds_its_public_names_and_nothing_else():
    source = (ROOT / "dmoe" / "__init__.py").read_text()
    assert {module.partition(".")[0] for module, _, _ in imports_of(source, "dmoe")} <= {"__future__", "dmoe"}
    assert dmoe.__all__ == sorted(dmoe.__all__)
    assert all(hasattr(dmoe, name) for name in dmoe.__all__)
    kinds = {type(node) for node in ast.parse(source).body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}


@pytest.mark.parametrize(
    ("room", "source", "wrong"),
    [
        ("plan", "from dmoe.ops.sort import sort", 0),
        ("ops", "def f():\n    from dmoe.kernels.sort import kernel", 0),
        ("ops", "from ._library import define", 0),
        ("kernels", "import triton.language as tl", 0),
        ("ops", "def f():\n    from dmoe.plan import RoutingPlan", 1),
        ("ops", "import triton", 1),
        ("ops", "from ..plan import RoutingPlan", 1),
        ("ops", "from dmoe import plan", 1),
        ("config", "import dmoe", 1),
        ("losses", "import numpy", 1),
        ("experts", "from dmoe.routing import Router", 1),
        ("routing.show", "from dmoe.routing.view import look", 0),
        ("routing.terminal", "from dmoe.metrics import routing_entropy", 1),
    ],
)
def test_the_table_is_enforced(room, source, wrong):
    assert len(offences(room, source, f"dmoe.{room}")) == wrong


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("import dmoe\ndmoe.MoE\ndmoe.ops.sort\nfrom dmoe import MoE\nfrom dmoe.functional import moe_mlp", 0),
        ("from dmoe.ops._library import define", 1),
        ("from dmoe.experts import Experts", 1),
        ("from dmoe import layer", 1),
        ("import dmoe\ndmoe.layer.MoE", 1),
    ],
)
def test_public_names_are_enforced(source, wrong):
    assert len(public_offences(source)) == wrong


_PATCHES_NOTHING = """
import os, random, sys, warnings
import torch, torch.nn.functional, torch.library, torch.utils.checkpoint, torch.distributed
from types import ModuleType

NOTES = ("last_type", "last_value", "last_traceback", "__warningregistry__")  # which Python itself makes

def state():
    places = [torch, torch.nn, torch.nn.functional, torch.autograd, torch.library, torch.utils.checkpoint, torch.ops]
    places += [torch.distributed, torch.cuda, torch.Tensor, torch.nn.Module, torch.nn.Parameter, torch.nn.Linear]
    places += [torch.autograd.Function, torch.optim.Optimizer, warnings, random, sys]
    held = {}
    for place in places:
        for name, value in vars(place).items():
            if not isinstance(value, ModuleType) and name not in NOTES:
                held[f"{place!r}.{name}"] = value
    held |= {"env": dict(os.environ), "path": list(sys.path), "filters": list(warnings.filters)}
    held |= {"threads": torch.get_num_threads(), "dtype": torch.get_default_dtype(), "hook": sys.excepthook}
    held |= {"seed": torch.get_rng_state().tolist(), "precision": torch.get_float32_matmul_precision()}
    return held

before = state()
import dmoe
after = state()
same = {name for name in before.keys() & after if before[name] is after[name] or before[name] == after[name]}
changed = [name for name in after if name not in same]
changed += [name for name in before if name not in after]
assert not [name for name in changed if "torch.ops" not in name and "_Ops" not in name], changed
assert "triton" not in sys.modules, "importing dmoe imported triton"
assert not torch.cuda.is_initialized()
print("clean")
"""


def test_importing_dmoe_patches_nothing_and_loads_no_triton():
    done = subprocess.run(
        [sys.executable, "-c", _PATCHES_NOTHING],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "clean", done.stderr


def misplaced(path: Path) -> list[str]:
    """What is wrong with where a file of tests/ lies, given relative to that folder."""
    *folders, name = path.parts
    in_mirror = len(folders) == 1 and folders[0] in TESTED
    if name == "conftest.py" and (in_mirror or not folders):
        return []
    if not name.startswith("test_"):
        return [] if folders == ["support"] else [f"{path}: expected in support/"]
    if in_mirror or (not folders and name in OF_THE_WHOLE):
        return []
    return [f"{path}: expected in one of {', '.join(TESTED)}"]


def imported_tests(source: str) -> list[str]:
    """Test modules that a source imports, in programs that it holds as strings too."""
    return re.findall(r"^\s*(?:from|import) +(test_\w+|conftest)\b", source, re.MULTILINE)


def limits_of_its_own(source: str) -> list[str]:
    """Where a source sleeps, or waits for a number of seconds that it has chosen itself."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in ("wait", "join") and node.args:
            given["timeout"] = node.args[-1]
        chosen = [
            key
            for key in ("timeout", "limit", "deadline", "seconds", "minutes")
            if isinstance(value := given.get(key), ast.Constant) and isinstance(value.value, int | float)
        ]
        if chosen or name == "sleep":
            wrong.append(f"line {node.lineno}: {name} {' '.join(chosen)}")
    return wrong


TESTS = sorted((ROOT / "tests").rglob("*.py"))


def test_tests_lie_in_folders_that_mirror_what_they_test():
    assert not [wrong for path in TESTS for wrong in misplaced(path.relative_to(ROOT / "tests"))]
    assert not [(folder, target) for folder, target in TESTED.items() if not (ROOT / target).exists()]
    names = [path.name for path in TESTS if path.name != "conftest.py"]
    twice = [name for name in names if names.count(name) > 1]
    assert not twice, "importing by name would find either"


@pytest.mark.xdist_group("held together")
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="there are no workers")
def test_what_shares_processes_stays_in_one_worker(request):
    """pytest-xdist writes a test's group behind its name; where it cannot, each worker starts every set of ranks."""
    if request.config.getoption("loadgroup"):
        assert request.node.nodeid.endswith("@held together")


def test_no_test_module_imports_another():
    assert not {_id(path): found for path in TESTS if (found := imported_tests(path.read_text()))}


def test_what_tests_wait_for_is_an_event():
    """A number of seconds that is enough here is too few on a busy machine: tests/support/patience.py holds them."""
    assert not {_id(path): found for path in TESTS if (found := limits_of_its_own(path.read_text()))}


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("pool.run(job, timeout=PATIENCE)\n', '.join(names)\nprocess.wait()\nsettings(deadline=None)", 0),
        ("time.sleep(wanted)", 1),
        ("from time import sleep\nsleep(2)", 1),
        ("subprocess.run(command, timeout=240)", 1),
        ("datetime.timedelta(seconds=60)", 1),
        ("process.join(1.5)\nprocess.wait(timeout=3)", 2),
        ("pool.run(job, limit=20)", 1),
    ],
)
def test_limits_are_found(source, wrong):
    assert len(limits_of_its_own(source)) == wrong


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("ops/test_sort.py", 0),
        ("support/helpers.py", 0),
        ("conftest.py", 0),
        ("ops/conftest.py", 0),
        ("elsewhere/conftest.py", 1),
        ("test_install.py", 0),
        ("test_sort.py", 1),
        ("support/test_helpers.py", 1),
        ("ops/deep/test_sort.py", 1),
        ("elsewhere/test_sort.py", 1),
        ("ops/cases.py", 1),
    ],
)
def test_places_are_enforced(path, wrong):
    assert len(misplaced(Path(path))) == wrong


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import helpers\nfrom test_layer import Reference", ["test_layer"]),
        ('PROGRAM = """\nimport test_layer\n"""', ["test_layer"]),
        ("def f():\n    from conftest import ranks", ["conftest"]),
        ("from dmoe import test\nimport tests_of\nfrom testing import test_layer", []),
    ],
)
def test_imports_between_tests_are_found(source, found):
    assert imported_tests(source) == found
