"""Weights in files."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import torch

from xloss.errors import OptionError


def save(folder: Path | None, name: str, state: dict[str, Any], overwrite: bool, user_metadata: dict[str, str]) -> str:
    """Write ``state`` to ``folder/name.pt`` and return its path.

    Raises ``OptionError`` without a folder, for a name that leaves it, and for a file that is there already.
    """
    if folder is None:
        raise OptionError("saving needs TrainingClient(..., checkpoint_dir=...)")
    path = folder.resolve() / f"{name}.pt"
    if path.parent != folder.resolve():
        raise OptionError(f"name must be a file's name; got {name!r}")
    if path.exists() and not overwrite:
        raise OptionError(f"{path} exists; choose another name, or overwrite=True")
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({**state, "user_metadata": user_metadata}, path)
    return str(path)


def load(path: str, device: torch.device) -> dict[str, Any]:
    """What ``save`` wrote. Raises ``OptionError`` where there is no such file."""
    found: dict[str, Any] = torch.load(_there(path), map_location=device, weights_only=True)
    return found


def new_run(folder: Path) -> Path:
    """A folder that no other run has, ``folder/run-<number>``, made."""
    for number in count():
        run = folder / f"run-{number}"
        try:
            run.mkdir(parents=True)
        except FileExistsError:
            continue
        return run
    raise AssertionError


def metadata(path: str) -> dict[str, str]:
    """``user_metadata`` of a checkpoint."""
    return dict(load(path, torch.device("cpu"))["user_metadata"])


def delete(path: str) -> None:
    """Delete a checkpoint. Raises ``OptionError`` where there is none."""
    _there(path).unlink()


def _there(path: str) -> Path:
    if not Path(path).is_file():
        raise OptionError(f"there is no checkpoint {path}")
    return Path(path)


def origin(path: str) -> tuple[str, int | None]:
    """Base model and LoRA rank of the model that was saved."""
    found = load(path, torch.device("cpu"))
    return found["base_model"], found["lora_rank"]
