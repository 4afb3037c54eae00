"""Programs on meta tensors take CUDA's way, and launch shapes of a file hold inside their context alone."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("triton")

import dmoe
from dmoe.kernels import configs
from dmoe.kernels import offline as kernels_offline
from dmoe.ops.offline import launch_shapes, offline


def test_a_layer_on_meta_launches_what_it_would_on_a_gpu(monkeypatch):
    """Under the interpreter nothing can be compiled; which kernels it asks for can be seen all the same."""
    names = []

    class Compiling:
        def __init__(self, arch):
            self.launching = kernels_offline.instead_of_launching(
                lambda kernel, grid, *arguments, **options: names.append(kernel.__name__)
            )

        def __enter__(self):
            return self.launching.__enter__()

        def __exit__(self, *error):
            return self.launching.__exit__(*error)

    monkeypatch.setattr("dmoe.ops.offline.compiling", Compiling)
    sizes = {"hidden_size": 32, "ffn_hidden_size": 16, "num_experts": 4, "top_k": 2}
    with offline(90):
        layer = dmoe.MoE(**sizes, load_balancing_coefficient=0.0, device="meta", dtype=torch.bfloat16)
        x = torch.empty(64, 32, device="meta", dtype=torch.bfloat16, requires_grad=True)
        layer(x).float().sum().backward()
    assert {"router_top_k_kernel", "up_kernel", "rows_kernel", "combine_kernel", "weight_grad_kernel"} <= set(names)
    before = len(names)
    layer(x)  # outside, meta is only shapes again
    assert len(names) == before


def test_launch_shapes_of_a_file_hold_inside_alone(tmp_path):
    wanted = ("down", 90, 2, 128, 256, 1536)
    built_in = configs.choose(*wanted)
    other = replace(built_in, num_stages=built_in.num_stages + 1)
    path = tmp_path / "table.json"
    path.write_text(json.dumps({configs.key(*wanted): asdict(other)}))
    for _ in range(2):
        with launch_shapes(path):
            assert configs.choose(*wanted) == other
        assert configs.choose(*wanted) == built_in
    wrong = tmp_path / "wrong.json"
    wrong.write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"), launch_shapes(wrong):
        pass
