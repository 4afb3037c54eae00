"""fairseq's Mixture-of-Experts commands on the released, unmodified fairseq 0.12.2, with dmoe's layer inside.

The command line of fairseq's ``moe`` branch stays; only the program in front of it changes::

    python -m dmoe.integrations.fairseq_moe train DATA --task language_modeling --arch transformer_lm_gpt \\
        --moe-freq 2 --moe-expert-count 8 --moe-dropless --criterion moe_cross_entropy ...

Also ``eval_lm``, ``preprocess``, ``generate``, ``interactive``, ``validate``, and ``count`` (parameters of a training
command, without allocating them). Read ``layer.py`` first; ``flags.py`` has every option with its meaning.

``--user-dir`` may point at this folder; fairseq's own programs need that, the launcher does not. From Python::

    from dmoe.integrations import fairseq_moe
    fairseq_moe.compat.apply()   # Python >= 3.11, torch >= 2.6
    fairseq_moe.register()
"""

from __future__ import annotations

from dmoe.integrations.fairseq_moe import compat

__all__ = ["compat", "register"]

compat.check_installed()


def register() -> None:
    """Teach fairseq the flags, models and criterion of this package; a second call does nothing.

    ``transformer_lm`` and ``transformer`` are registered again under their own names, so that every ``--arch`` of
    theirs stays; without ``--moe-freq`` they build what they always did.
    """
    from dmoe.integrations.fairseq_moe import (
        checkpoints,
        commands,
        criterion,
        evaluation,
        models,
        nan_detector,
        overrides,
        trainer,
    )

    models.register()
    criterion.register()
    checkpoints.register()
    commands.register()
    overrides.register()
    trainer.register()
    nan_detector.register()
    evaluation.register()


if __name__ != "dmoe.integrations.fairseq_moe":  # --user-dir: fairseq imports the folder under the folder's name
    from dmoe.integrations import fairseq_moe

    fairseq_moe.register()
