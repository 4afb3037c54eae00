"""A module for each layout of a checkpoint: how it is known, read and written.

Every module has a :class:`dmoe.checkpoint.formats.base.Format`; ``known.py`` lists them.
"""
