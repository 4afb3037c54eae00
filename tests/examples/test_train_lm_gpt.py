"""The example's model is `dmoe.models.MoEGPT`: what it trained is loaded and goes on as any other."""

from __future__ import annotations

import pytest
import torch
from lm.model import ByteLM, gpt_config
from lm.settings import Settings

from dmoe.models import GenerationOptions, MoEGPTConfig, build, generate

SMALL = {"layers": 2, "hidden": 32, "heads": 2, "ffn": 16, "experts": 4, "seq_len": 24}


@pytest.mark.parametrize(
    "more", [{}, {"experts": (2, 6), "residual": True}, {"preset": "hash_layer"}, {"preset": "switch"}], ids=str
)
@pytest.mark.parametrize("dense", [False, True])
def test_its_weights_and_its_config_are_the_model(more, dense):
    torch.manual_seed(0)
    settings = Settings(**{**SMALL, **more})
    trained = ByteLM(settings, dense=dense).eval()
    config = MoEGPTConfig.from_json(gpt_config(settings, dense=dense).to_json())
    assert config == trained.config
    model = build(config, trained.state_dict())
    tokens = torch.randint(256, (3, 24))
    with torch.no_grad():
        assert torch.equal(model(tokens), trained(tokens))
    options = GenerationOptions(output_len=6)
    found = generate(model, [b"def ", b"class B"], options)
    assert found.ids[:, :4].tolist() == [list(b"def "), list(b"clas")]
    assert torch.equal(generate(trained, [b"def ", b"class B"], options).ids, found.ids)
