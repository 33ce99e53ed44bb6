"""The real packages that adapters are tested against: absent ones skip a module, and fail where they are promised."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings

import pytest


def find_missing(*names: str) -> list[str]:
    """Those of ``names`` that are not installed; with ``XLOSS_INTEGRATIONS=1`` that is a failure."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing and os.environ.get("XLOSS_INTEGRATIONS") == "1":
        pytest.fail(f"XLOSS_INTEGRATIONS=1 promises {', '.join(missing)}, which cannot be imported", pytrace=False)
    return missing


def need(*names: str) -> None:
    """Import ``names``, or skip the calling module where one is missing, or fail as ``find_missing`` does."""
    missing = find_missing(*names)
    if missing:
        pytest.skip(f"needs {', '.join(missing)}", allow_module_level=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what others warn of while they are imported is theirs
        for name in names:
            importlib.import_module(name)
