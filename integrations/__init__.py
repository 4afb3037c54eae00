"""Argument translation for training frameworks, one subpackage each; importable as ``dmoe.integrations.<name>``."""
