"""Jobs that torchtitan_ranks.py runs on all ranks of a stage: torchtitan's own Trainer, and single layers."""

from __future__ import annotations

import itertools
import os
import sys

import torch
import torch.distributed as dist
from doc_blocks import run_page
from torch.distributed.tensor import DTensor
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models.common.moe import RoutedExperts
from torchtitan_layers import bad_input, layers, published, selective, states  # noqa: F401 - jobs as well
from torchtitan_model import trainer_config
from torchtitan_plain import train_plainly

from dmoe.integrations.torchtitan import DmoeRoutedExperts, use
from dmoe.integrations.torchtitan.__main__ import main as launch

_RUNS = itertools.count()  # a folder for each run, the same on all ranks


def whole(state):
    """A state with every tensor in one piece, on all ranks."""
    return {name: t.full_tensor().clone() if isinstance(t, DTensor) else t.clone() for name, t in state.items()}


def train(folder, name="qwen3", *, ours=True, run=None, options=None, **config):
    """What a run of the Trainer logged, and its state afterwards; it begins at the model's seed."""
    files = {"initial_load_path": str(folder / f"{name}.seed"), "last_save_model_only": False, "interval": 1000}
    files |= config.pop("files", {})
    config = trainer_config(name, folder / (run or f"{os.environ['STAGE']}-{next(_RUNS)}"), files=files, **config)
    if ours:
        use(config, **(options or {}))
    trainer = config.build()
    logged = []
    trainer.metrics_processor.log = lambda step, loss, highest, norm, **others: logged.append((step, loss, norm))
    trainer.train()
    model = trainer.model_parts[0]
    routed = [type(module) for module in model.modules() if hasattr(module, "inner_experts")]
    assert set(routed) == {DmoeRoutedExperts if ours else RoutedExperts}
    answer = {
        "steps": [step for step, _, _ in logged],
        "losses": [loss for _, loss, _ in logged],
        "norms": [norm for _, _, norm in logged],
        "state": whole(model.state_dict()),
    }
    trainer.close()
    dist.barrier()
    return answer


def seeds(folder):
    """Both models' first states, saved as torchtitan's seed checkpoints by its own layer, and as plain tensors."""
    found = {}
    for name in ("qwen3", "deepseek_v3"):
        files = {"create_seed_checkpoint": True, "folder": f"{name}.seed", "last_save_model_only": False}
        trainer = trainer_config(name, folder, files=files).build()
        trainer.checkpointer.save(curr_step=0, last_step=True)
        trainer.close()
        (folder / f"{name}.seed" / "step-0").rename(folder / f"{name}.inner")
        (folder / f"{name}.seed").rmdir()
        (folder / f"{name}.inner").rename(folder / f"{name}.seed")
        found[name] = whole(trainer.model_parts[0].state_dict())
    return found


def plain(folder):
    return {name: train_plainly(name, state) for name, state in torch.load(folder / "seeds.pt").items()}


def one_rank(folder):
    """Four micro-batches a step."""
    return {name: train(folder, name) for name in ("qwen3", "deepseek_v3")}


def fsdp(folder):
    return train(folder)


def ep(folder):
    """Saved on the way, and at the end as Hugging Face has it."""
    last = {"last_save_in_hf": True, "last_save_model_only": True}
    return {
        "qwen3": train(folder, run="saved", expert_parallel=2, files={"interval": 3} | last),
        "deepseek_v3": train(folder, "deepseek_v3", expert_parallel=2),
    }


def tp(folder):
    """Experts cut along F."""
    return train(folder, tensor_parallel=2)


def tp_ep(folder):
    """The tokens of a sequence are spread over the ranks of "tp", which are those of "ep", too."""
    return train(folder, "deepseek_v3", tensor_parallel=2, expert_parallel=2)


def full_dtensor(folder):
    return train(folder, expert_parallel=2, spmd_backend="full_dtensor")


def full_ac(folder):
    return train(folder, expert_parallel=2, checkpointing=FullAC.Config())


def selective_ac(folder):
    options = {"recompute_pre_activation": True}
    return train(folder, "deepseek_v3", expert_parallel=2, checkpointing=SelectiveAC.Config(), options=options)


def their_exchange(folder):
    return train(folder, expert_parallel=2, options={"exchange": "torchtitan"})


def wire(folder):
    """Tokens as one byte per number."""
    return train(folder, expert_parallel=2, options={"wire_dtype": "fp8"})


def compiled(folder):
    return train(folder, expert_parallel=2, compiled=True)


def ep_fsdp(folder):
    """Two ranks hold the same experts."""
    return train(folder, local=1, expert_parallel=2)


def hsdp(folder):
    return train(folder, local=1, expert_parallel=2, data_parallel_replicate=2, data_parallel_shard=2)


def resumed_on_four(folder):
    return _resumed(folder, local=1, expert_parallel=4)


def resumed_on_one(folder):
    return _resumed(folder)


def _resumed(folder, **config):
    """On from the third step that two ranks saved."""
    files = {"initial_load_path": str(folder / "saved" / "checkpoint" / "step-3"), "initial_load_model_only": False}
    return train(folder, files=files, **config)


def exchanged(folder):
    """States that the other layer reads: what dmoe's saved, in both formats, and what torchtitan's saved, in dmoe's."""
    found, saved = {}, folder / "saved" / "checkpoint"
    for way, files in {
        "theirs_reads": {"initial_load_path": str(saved / "step-3")},
        "from_hugging_face": {"initial_load_path": str(saved / "step-6"), "initial_load_in_hf": True},
    }.items():
        config = trainer_config("qwen3", folder / way, files=files)
        trainer = (config if way == "theirs_reads" else use(config)).build()
        trainer.checkpointer.load()
        found[way] = whole(trainer.model_parts[0].state_dict())
        trainer.close()
    return found


def page(folder):
    """docs/torchtitan.md: its code runs."""
    return sorted(run_page("torchtitan.md")["ours"])


def example(folder):
    """The launcher on the example's config; it ends by leaving the group."""
    logged = []
    MetricsProcessor.log = lambda self, step, loss, highest, norm, **others: logged.append((step, loss))
    sizes = {"training.steps": 2, "training.seq_len": 16, "training.local_batch_size": 1}
    options = sizes | {
        "parallelism.expert_parallel_degree": 2,
        "dump_folder": folder / "example",
        "metrics.log_freq": 1,
    }
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    sys.argv = ["train", "--module", "examples.torchtitan.qwen3_moe", "--config", "small", *given]
    launch()
    return logged


# Ranks, and what they do one after the other.
STAGES = (
    (1, ("seeds", "plain", "one_rank", "layers", "states", "selective", "bad_input", "published", "page")),
    (2, ("fsdp", "ep", "tp", "tp_ep", "full_dtensor")),
    (2, ("full_ac", "selective_ac", "their_exchange", "wire", "compiled", "example")),
    (4, ("ep_fsdp", "hsdp", "resumed_on_four")),
    (1, ("resumed_on_one", "exchanged")),
)
