"""From tensors by name to a model: types, one tensor at a time, nothing missing, nothing left over."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from gpt_cases import FORWARD, found_in_files, reference_model, small_config, small_model

import dmoe
from dmoe import MoEConfig, models
from dmoe.models import build, load, load_with_extras
from dmoe.routing import Cosine, Hash

KINDS = [
    pytest.param({}, id="gpt2"),
    pytest.param({"positions": "rotary", "norm": "rms", "norm_eps": None, "tied_head": False}, id="rotary"),
]


class Stored:
    """A tensor in a file, which says when it is read."""

    def __init__(self, name, tensor, reads):
        self.name, self.tensor, self.reads = name, tensor, reads

    shape = property(lambda self: self.tensor.shape)
    dtype = property(lambda self: self.tensor.dtype)

    def read(self):
        self.reads.append(self.name)
        return self.tensor.clone()


@pytest.fixture
def stored(monkeypatch):
    """Makes a checkpoint of a model, which load(path) then reads; returns the names in the order of reading."""

    def store(model, extras=None):
        reads = []
        tensors = {name: Stored(name, tensor, reads) for name, tensor in model.state_dict().items()}
        found = found_in_files(model, extras, tensors)
        monkeypatch.setattr(dmoe.checkpoint, "read_model", lambda path: found)
        return SimpleNamespace(reads=reads, tensors=tensors)

    return store


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back(stored, kind):
    model = small_model(**kind)
    place = stored(model, {"end_id": 7})
    again, extras = load_with_extras("folder", dtype=torch.float64)
    assert extras == {"end_id": 7}
    assert again.config == model.config
    assert not again.training
    assert place.reads == list(model.state_dict())
    ids = torch.randint(30, (2, 9))
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids))
    # What the optimizers and ranks look at is there, and it can train.
    marked = [name for name, parameter in again.named_parameters() if dmoe.is_expert_param(parameter)]
    assert marked == [name for name, parameter in model.named_parameters() if dmoe.is_expert_param(parameter)] != []
    again.train()
    (again(ids).sum() + dmoe.aux_loss(again)).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types_are_as_wanted_and_routers_stay_float32(stored, dtype):
    stored(small_model(dtype=torch.float64))
    model = load("folder", dtype=dtype)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".router." in name else dtype), name
    with torch.no_grad():
        assert torch.isfinite(model(torch.randint(30, (2, 9)))).all()
    if dtype == torch.float32:
        assert all(p.dtype == dtype for p in load("folder").parameters())


H = {"hidden_size": 16, "ffn_hidden_size": 12, "num_experts": 4}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(MoEConfig(**H, router=Cosine(dim=8)), id="cosine"),
        pytest.param(MoEConfig(**H, selection_bias=True, score_function="sigmoid", router_bias=True), id="bias"),
        pytest.param(MoEConfig(**H, top_k=1, router=Hash(vocab_size=30)), id="hash"),
        pytest.param(MoEConfig(**H, router="expert_choice", causal=False), id="expert choice"),
        pytest.param(MoEConfig(**H, shared_ffn_hidden_size=8, shared_expert_gate=True, bias="output"), id="shared"),
        pytest.param(MoEConfig(**{**H, "ffn_hidden_size": [4, 8, 12, 16]}), id="widths"),
    ],
)
def test_layers_of_all_kinds_come_back(stored, layer, dtype):
    model = small_model(moe={1: layer}, residual={}, dtype=dtype)
    stored(model)
    again = load("folder", dtype=dtype)
    ids = torch.randint(30, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(again(ids), model(ids), atol=0.1 if dtype.itemsize < 4 else 0, rtol=0)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name].to(value.dtype), value), name


def test_what_is_missing_or_besides_is_named_before_anything_is_read(stored):
    place = stored(small_model())
    place.tensors["more"] = place.tensors["norm.bias"]
    with pytest.raises(ValueError, match=r"load: expected the tensors .*, got more besides$"):
        load("folder")
    del place.tensors["more"]
    gone = place.tensors.pop("blocks.1.ffn.router.weight")
    with pytest.raises(ValueError, match=r"load: expected the tensors .*, got no blocks\.1\.ffn\.router\.weight$"):
        load("folder")
    place.tensors["blocks.1.ffn.gate"] = gone
    message = r"got no blocks\.1\.ffn\.router\.weight and blocks\.1\.ffn\.gate besides"
    with pytest.raises(ValueError, match=message):
        load("folder")
    for name in [name for name in place.tensors if "blocks.0" in name]:
        del place.tensors[name]
    with pytest.raises(ValueError, match=r"got no blocks\.0\.\S+, \S+, \S+ and 10 more and "):
        load("folder")
    assert not place.reads


def test_another_shape_is_told_before_anything_is_read(stored):
    place = stored(small_model())
    place.tensors["positions.weight"].tensor = torch.zeros(21, 16)
    with pytest.raises(ValueError, match=r"load: positions.weight: expected \(20, 16\), got \(21, 16\)"):
        load("folder")
    assert not place.reads


def test_building_does_not_touch_the_random_numbers():
    tensors = small_model().state_dict()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build(small_config(), tensors)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_in_half_precision_is_what_it_says():
    model = reference_model(FORWARD[0], torch.float16)
    exact = reference_model(FORWARD[0], torch.float64)
    for (name, narrow), wide in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(narrow.double(), wide), name
    found = models.generate(model, FORWARD[0]["prompts"], models.GenerationOptions(output_len=4))
    assert found.ids.shape == (3, 15)
