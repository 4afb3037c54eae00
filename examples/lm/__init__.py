"""The parts of ``examples/train_lm.py``: settings, text, model, training, checkpoints and the report."""
