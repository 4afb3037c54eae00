"""A module for each layout of a checkpoint: how it is known, read and written.

``known.py`` lists those with a :class:`dmoe.checkpoint.formats.base.Format`; the others are parts of these.
"""
