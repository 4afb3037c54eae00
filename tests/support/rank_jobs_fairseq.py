"""Jobs of a :class:`rank_pool.RankPool` that run fairseq's programs, in processes that form a gloo group already."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
from unittest.mock import patch

import fairseq_jobs
import fairseq_tools
import torch
import torch.distributed as dist
from rank_jobs_together import stages

MODEL = """
    --cpu --task language_modeling --tokens-per-sample 16 --sample-break-mode none --arch transformer_lm_gpt
    --share-decoder-input-output-embed --decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 24
    --decoder-attention-heads 2 --moe-freq 2 --moe-expert-count 4 --moe-gating-use-fp32 --moe-dropless
    --moe-second-expert-policy all --criterion moe_cross_entropy --moe-gate-loss-wt 0.01
    --moe-gate-loss-combine-method sum --dropout 0 --attention-dropout 0
    --optimizer adam --adam-betas (0.9,_0.98) --lr 0.0005 --batch-size 4 --max-update 20 --clip-norm 0.3
    --disable-validation --log-format json --log-interval 1 --num-workers 0 --seed 5
"""


def words(text):
    return [word.replace("_", " ") if word.startswith("(") else word for word in text.split()]


def flags(base=MODEL, **changes):
    """A command's words with values changed, added (``no_save=True``) or left out (``x=None``)."""
    given = words(base)
    for name, value in changes.items():
        spelled = "--" + name.replace("_", "-")
        while spelled in given:
            at = given.index(spelled)
            ends = at + 1 == len(given) or given[at + 1].startswith("--")
            given[at : at + (1 if ends else 2)] = []
        if value is True:
            given.append(spelled)
        elif value is not None:
            given += [spelled, str(value)]
    return given


def prepare(group, folder):
    """Binarised text in ``folder/bin``; some of its words are to be joined to the next, as subwords are."""
    fairseq_jobs.write_text(folder)
    for path in (os.path.join(folder, f"{name}.txt") for name in ("train", "valid")):
        with open(path) as file:
            text = file.read()
        with open(path, "w") as file:
            file.write(text.replace(" the ", " the@@ "))
    done = fairseq_jobs.binarise(folder, "--thresholdsrc", 12, "--workers", 1)
    assert done.status == 0, done.err


@contextlib.contextmanager
def _as_rank(group, argv):
    """What torchrun and fairseq's start would have set up, for a rank of this group."""
    fairseq_jobs.fairseq_moe()
    from fairseq.distributed import utils as distributed_utils

    ranks = dist.get_world_size(group)
    level, known = logging.getLogger().level, getattr(distributed_utils.get_global_group, "_global_group", None)
    distributed_utils.get_global_group._global_group = group
    env = {"WORLD_SIZE": str(ranks), "RANK": str(dist.get_rank(group))}
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # embeddings' backward on the CPU has none for half
    logging.getLogger().setLevel(logging.WARNING)
    try:
        with patch.dict(os.environ, env), patch.object(sys, "argv", ["fairseq_moe", *argv]):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        distributed_utils.get_global_group._global_group = known
        logging.getLogger().setLevel(level)


def config(group, tool, argv):
    """The config of a command line, as on this rank."""
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    parser = {"train": options.get_training_parser, "eval_lm": options.get_eval_lm_parser}[tool]()
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, input_args=[str(a) for a in argv]))
    cfg.distributed_training.distributed_world_size = dist.get_world_size(group)
    cfg.distributed_training.distributed_rank = dist.get_rank(group)
    cfg.distributed_training.distributed_no_spawn = True
    return cfg


def train(group, argv, poison=None, only_load=False):
    """Run ``train`` to its end: parameters by their names in checkpoints, norms and loss scales of all steps, warnings.

    ``poison``: ``(rank, step)``: there, an expert's gradient becomes infinite. ``only_load``: stop before any step.
    """
    with _as_rank(group, argv), _warnings() as said:
        import fairseq_cli.train as program
        from fairseq import checkpoint_utils

        vars(checkpoint_utils.save_checkpoint).pop("best", None)  # of an earlier training in this process
        cfg = config(group, "train", argv)
        seen = {"norms": [], "scales": [], "losses": [], "steps": 0, "said": said}

        class Watched(program.Trainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                seen["trainer"] = self

            def clip_grad_norm(self, clip_norm):
                seen["steps"] += 1
                if poison == (dist.get_rank(group), seen["steps"]):
                    experts = [p for p in self._model.parameters() if getattr(p, "expert", False)]
                    experts[0].grad.view(-1)[0] = float("inf")
                norm = super().clip_grad_norm(clip_norm)
                seen["norms"].append(float(norm))
                return norm

            def train_step(self, samples, raise_oom=False):
                logged = super().train_step(samples, raise_oom)
                if logged is not None:
                    seen["losses"].append(float(logged["loss"]))
                seen["scales"].append(getattr(getattr(self.optimizer, "scaler", None), "loss_scale", None))
                return logged

        stock_validate = program.validate

        def validate(*args):
            seen["valid"] = stock_validate(*args)
            return seen["valid"]

        loop = (lambda *args: ([None], True)) if only_load else program.train
        with patch.multiple(program, Trainer=Watched, train=loop, validate=validate):
            program.main(cfg)
        trainer = seen.pop("trainer")
        trainer.consolidate_optimizer()
        model = trainer.state_dict()["model"]
        seen["model"] = {name: None if value is None else value.detach().clone() for name, value in model.items()}
        seen["updates"] = trainer.get_num_updates()
        seen["files"] = sorted(os.listdir(cfg.checkpoint.save_dir)) if os.path.isdir(cfg.checkpoint.save_dir) else []
        seen["marks"] = sum(getattr(p, "expert", False) for p in trainer._model.parameters())
        return seen


@contextlib.contextmanager
def _warnings():
    """What this package's loggers warn of."""
    said, logger = [], logging.getLogger("dmoe")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def killed(group, argv, where, stage, times):
    """Train, and end rank ``where`` with SIGKILL when it comes to a stage of saving for the so-manieth time."""
    left = times if dist.get_rank(group) == where else 0

    def at(reached):
        nonlocal left
        left -= reached == stage
        if left == 0 and reached == stage:
            os.kill(os.getpid(), signal.SIGKILL)

    with stages(at):
        return train(group, argv)


def full(group, argv, where, times):
    """Train, and let rank ``where`` find the disk full in the middle of a file, the so-manieth; what each rank says."""
    left = times if dist.get_rank(group) == where else 0

    def at(reached):
        nonlocal left
        left -= reached == "half a file"
        if left == 0 and reached == "half a file":
            raise OSError(errno.ENOSPC, "No space left on device")

    with stages(at):
        return failure(group, "train", argv)


def replaced(group, path, part):
    """What loading says where another checkpoint has taken the place of the one that was found."""
    fairseq_jobs.fairseq_moe()
    from dmoe.integrations.fairseq_moe import finding, parts
    from dmoe.integrations.fairseq_moe.flags import FlagError

    files = finding.find(path)
    state = torch.load(part, weights_only=False)
    state["saved"]["set"] = "another"
    torch.save(state, part)
    try:
        parts.take(torch.load(files.main, weights_only=False), files, 0, 1)
    except FlagError as error:
        return str(error)
    return "loaded"


def prepare_pairs(group, folder):
    """Sentences and the same backwards, in ``folder/pairs``."""
    return fairseq_tools.write_pairs(folder)


def not_a_number(group, argv):
    """``train`` whose experts hand back NaN gradients: the exception that ends it, and what fairseq found out then."""
    with _as_rank(group, argv):
        import fairseq_cli.train as program

        from dmoe.integrations.fairseq_moe.layer import MoELayer

        stock, found, said = MoELayer.forward, logging.getLogger("fairseq.nan_detector"), []

        def forward(self, x, *rest):
            y, loss = stock(self, x, *rest)
            y.register_hook(lambda gradient: gradient * float("nan"))
            return y, loss

        def keep(record):
            said.append(record.getMessage())
            return True

        found.addFilter(keep)
        found.setLevel(logging.INFO)
        try:
            with patch.object(MoELayer, "forward", forward):
                program.main(config(group, "train", argv))
        except FloatingPointError as error:
            return str(error), said
        finally:
            found.removeFilter(keep)
            found.setLevel(logging.NOTSET)
    return "no failure", said


def failure(group, tool, argv):
    """What a tool that fails says in the end, as its user sees it: the launcher's last word, or the exception's."""
    from importlib import import_module

    with _as_rank(group, argv):
        from dmoe.integrations.fairseq_moe.flags import FlagError

        try:
            import_module(f"fairseq_cli.{tool}").main(config(group, tool, argv))
        except (FlagError, SystemExit) as error:
            return str(error)
    return "no failure"


def evaluate(group, argv):
    """Run ``eval_lm``: its results, lines it logged, and the calls that each rank's model got."""
    with _as_rank(group, argv):
        import fairseq_cli.eval_lm as program

        from dmoe.integrations.fairseq_moe.layer import MoELayer

        cfg, calls, stock = config(group, "eval_lm", argv), [], MoELayer.forward

        def forward(self, x, *rest):
            calls.append(tuple(x.shape))
            return stock(self, x, *rest)

        with patch.object(MoELayer, "forward", forward):
            results = program.main(cfg)
        return {name: float(value) for name, value in results.items()}, calls
