"""Transformers' Trainer with experts on several ranks, and its callback."""

from __future__ import annotations

import pytest
import torch
from parallel_layer_cases import close
from training_cases import on_ranks

pytestmark = pytest.mark.xdist_group("pair")


@pytest.fixture
def job(pair):
    return on_ranks(pair, "rank_jobs_trainer")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from hub_cases import write_checkpoint

    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, "qwen3_moe", router_aux_loss_coef=0.0)
    return str(folder)


@pytest.fixture(scope="module")
def expected(model_folder):
    """Transformers' own model in one process, float64."""
    from rank_jobs_trainer import by_hand
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64, experts_implementation="eager")
    values, losses = by_hand(model.train(), lambda _: 0.0)
    return model, values, losses


def saved(folder):
    """A folder's model as plain Transformers reads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).state_dict()


@pytest.mark.parametrize(("grid", "ranks"), [((2, 1), 2), ((1, 2), 2), ((1, 1), 1)])
def test_steps_equal_one_process(job, tmp_path, model_folder, expected, grid, ranks):
    """Clipped, accumulated, saved in the middle; and from there on another number of ranks."""
    from rank_jobs_trainer import state_of

    _, values, losses = expected
    half = {"save_strategy": "steps", "save_steps": 3}
    for _, losses_there in job(ranks, "fit", model_folder, grid, str(tmp_path), None, None, half):
        assert losses_there == pytest.approx(losses.tolist(), abs=1e-4)  # Trainer rounds to four digits
    for name, value in saved(tmp_path / "checkpoint-6").items():
        close(name, value, values[name], 1e-5)  # Transformers' router computes its softmax in float32
    files, step = state_of(tmp_path / "checkpoint-3")
    assert step == 3
    assert {"config.json", "optimizer", "scheduler.pt", "training_args.bin"} < set(files)
    again, ranks_then = ((1, 1), 1) if ranks == 2 else ((2, 1), 2)
    further = tmp_path / "further"
    checkpoint = str(tmp_path / "checkpoint-3")
    whole_steps = half | {"save_steps": 6}
    job(ranks_then, "fit", model_folder, again, str(further), None, checkpoint, whole_steps)
    whole_run = saved(tmp_path / "checkpoint-6")
    for name, value in saved(further / "checkpoint-6").items():
        close(name, value, whole_run[name], 1e-12)


def test_attached_losses_follow_accumulation(job, tmp_path, model_folder):
    """The loop cannot add dmoe's losses; attached, and scaled by the callback, they are those of one process."""
    from rank_jobs_trainer import by_hand

    import dmoe
    import dmoe.integrations.transformers as on_transformers

    options = {"load_balancing_coefficient": 0.1}
    model = on_transformers.parallelize(model_folder, dtype=torch.float64, progress=False, **options).train()
    values, _ = by_hand(model, dmoe.aux_loss)
    options |= {"aux_loss": "attached"}
    for values_there, _ in job(2, "fit", model_folder, (2, 1), str(tmp_path), options):
        for name, value in values.items():
            close(name, values_there[name], value, 1e-9)


def test_callback_logs_what_reduce_metrics_says(job, tmp_path, model_folder):
    """In the Trainer's history and TensorBoard's file; one all-reduce in each step that is logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results = job(2, "watch", model_folder, str(tmp_path))
    for seen, history, _, _ in results:
        assert [count for _, _, count in seen] == [0, 1] * 3
        logged = {each["step"]: each for each in history if any(name.startswith("moe/") for name in each)}
        assert list(logged) == [2, 4, 6]
        for record, metrics, _ in seen[1::2]:
            for name, layer in record.layers.items():
                assert layer.tokens_per_expert == tuple(metrics[name].tokens_per_expert.tolist())
                assert layer.load == tuple(metrics[name].load.tolist())
                for field in ("entropy", "dropped_share", "dead_experts"):
                    there = float(getattr(metrics[name], field))
                    assert getattr(layer, field) == logged[record.step][f"moe/{name}/{field}"] == there
    (seen, _, _, shown), (_, _, silent, nothing) = results
    layers = list(seen[1][0].layers)
    assert shown == [{"moe/load": (24, 48, 3), "train/global_step": step} for step in (2, 4, 6)]
    assert (silent, nothing) == ([], [])
    events = EventAccumulator(str(tmp_path)).Reload()
    written = events.Scalars(f"train/moe/{layers[0]}/entropy")
    assert [event.value for event in written] == pytest.approx(
        [seen[n][0].layers[layers[0]].entropy for n in (1, 3, 5)]
    )
    assert [event.step for event in events.Images("moe/load")] == [2, 4, 6]


def test_what_is_refused(job, tmp_path, model_folder):
    from dmoe.integrations.transformers import MoECallback

    for told in job(2, "refusals", model_folder, str(tmp_path)):
        assert "ParallelTrainer: model: expected a model that parallelize returned" in told["another"]
        assert "expected load_best_model_at_end=False, got True" in told["best"]
    with pytest.raises(TypeError, match=r"MoECallback: trainer: expected the Trainer whose logs are meant.*got int"):
        MoECallback(3)
