"""What is said where torchtitan is absent, or another release: without it."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
import torchtitan_paths as paths


def _versions():
    """The file alone: its package asks at once."""
    source = paths.ROOT / "integrations/torchtitan/versions.py"
    spec = importlib.util.spec_from_file_location("torchtitan_versions", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


versions = _versions()


def found(monkeypatch, release):
    def version(name):
        assert name == "torchtitan"
        if release is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return release

    monkeypatch.setattr(versions, "version", version)


@pytest.mark.parametrize("release", ["0.3.0", "0.3.1.post1"])
def test_a_supported_release(monkeypatch, release):
    found(monkeypatch, release)
    versions.check_version()


def test_none(monkeypatch):
    found(monkeypatch, None)
    with pytest.raises(ImportError, match=r"expected torchtitan 0.3, found none; install it with: pip install"):
        versions.check_version()


@pytest.mark.parametrize("release", ["0.2.0", "0.4.0", "1.0"])
def test_another_one_is_refused_and_can_be_tried(monkeypatch, release):
    found(monkeypatch, release)
    with pytest.raises(ImportError, match=f"expected torchtitan 0.3, found {release}; .*{versions.TRY}=1"):
        versions.check_version()
    monkeypatch.setenv(versions.TRY, "1")
    with pytest.warns(UserWarning, match="has not been tried"):
        versions.check_version()
