"""The tile a launch takes: the fixed one of `tiles.py`, or the one `tune.py` found where XLOSS_TILES=tuned asks for it.

Tuned tiles live in one JSON file per GPU name, `tiles-<gpu>.json` in XLOSS_CACHE_DIR (default: `xloss` in
XDG_CACHE_HOME or ~/.cache), keyed by kernel, dtypes and powers of two of the vocabulary and hidden size; never by the
number of tokens. A process reads the file once, and nothing but `tune.py` writes it: the same input keeps giving the
same bits on a machine until it is tuned again. Another tile sums in another order, hence gives other last bits, which
is why this is not the default.

A file that is missing, damaged or made by another Triton is passed over with a RuntimeWarning that names it.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from xloss_kernels import tiles

FORMAT = 1
Tile = TypeVar("Tile", tiles.RowTile, tiles.HeadTile)


def row(op: str, device: torch.device, num_vocab: int, *dtypes: torch.dtype, num_warps: int = 8) -> tiles.RowTile:
    """RowTile of kernel `op` for rows of `num_vocab` logits read or written as `dtypes`."""
    found = None
    if wanted():
        found = _lookup(row_key(op, num_vocab, *dtypes), device, row_candidates(num_vocab, *dtypes))
    return found or tiles.row_tile(num_vocab, *dtypes, num_warps=num_warps)


def head(op: str, device: torch.device, dtype: torch.dtype, num_vocab: int, hidden_size: int) -> tiles.HeadTile:
    """HeadTile of kernel `op` for operands of `dtype`."""
    found, arch = None, tiles.arch_of(device)
    if wanted():
        found = _lookup(head_key(op, dtype, num_vocab, hidden_size), device, tiles.head_candidates(dtype, arch))
    return found or tiles.head_tile(dtype, arch)


def wanted() -> bool:
    """Whether XLOSS_TILES asks for tuned tiles."""
    choice = os.environ.get("XLOSS_TILES", "fixed")
    if choice not in ("fixed", "tuned"):
        raise ValueError(f"XLOSS_TILES must be fixed (the default) or tuned; got {choice!r}")
    return choice == "tuned"


# ---------------------------------------------------------------- keys


def row_key(op: str, num_vocab: int, *dtypes: torch.dtype) -> str:
    """Entry of a row kernel: vocabularies up to the next power of two share it."""
    return f"{op} {_names(dtypes)} V{_bucket(num_vocab)}"


def head_key(op: str, dtype: torch.dtype, num_vocab: int, hidden_size: int) -> str:
    """Entry of a head kernel."""
    return f"{op} {_names((dtype,))} V{_bucket(num_vocab)} H{_bucket(hidden_size)}"


def row_candidates(num_vocab: int, *dtypes: torch.dtype) -> list[tiles.RowTile]:
    """What may stand in such an entry: the candidates for its largest vocabulary."""
    return tiles.row_candidates(_bucket(num_vocab), *dtypes)


def _bucket(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return "+".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


# ---------------------------------------------------------------- the file


def gpu_name(device: torch.device) -> str:
    """What a file is for: the GPU's name, or the device's type where it is none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def path_for(gpu: str) -> Path:
    """The file of a GPU."""
    folder = os.environ.get("XLOSS_CACHE_DIR")
    if folder is None:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "xloss")
    return Path(folder) / f"tiles-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def save(gpu: str, found: Mapping[str, tiles.RowTile | tiles.HeadTile]) -> Path:
    """Add entries to the file of a GPU, replacing what it had for them; all at once, so that no reader sees half."""
    path = path_for(gpu)
    entries = load(path, gpu) if path.exists() else {}
    entries |= {key: asdict(tile) for key, tile in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}.tmp")
    content = {"format": FORMAT, "gpu": gpu, "triton": _triton(), "tiles": dict(sorted(entries.items()))}
    fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)
    forget()
    return path


def load(path: Path, gpu: str) -> dict[str, dict[str, Any]]:
    """Entries of a file; none, with a warning, where it is not a file this process can go by."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, made_for = content["tiles"], (content["format"], content["gpu"], content["triton"])
        if not (isinstance(found, dict) and all(isinstance(entry, dict) for entry in found.values())):
            raise TypeError("its tiles are no table")
    except FileNotFoundError:
        return _pass_over(path, "is missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return _pass_over(path, f"cannot be read ({type(error).__name__}: {error})")
    if made_for != (FORMAT, gpu, _triton()):
        return _pass_over(path, f"was made for format {made_for[0]}, {made_for[1]}, triton {made_for[2]}")
    return found


def forget() -> None:
    """Let this process read the files anew."""
    _table.cache_clear()
    _warn_once.cache_clear()


@cache
def _table(path: Path, gpu: str) -> dict[str, dict[str, Any]]:
    return load(path, gpu)


def _lookup(key: str, device: torch.device, candidates: Sequence[Tile]) -> Tile | None:
    gpu = gpu_name(device)
    path = path_for(gpu)
    entry = _table(path, gpu).get(key)
    if entry is None:
        return None
    for tile in candidates:
        if asdict(tile) == entry:
            return tile
    _warn_once(f"{path} holds {entry} for '{key}', which is no candidate; the fixed tile is used")
    return None


def _pass_over(path: Path, what: str) -> dict[str, dict[str, Any]]:
    _warn_once(f"{path} {what}; the fixed tiles are used. `python -m xloss_kernels.tune` makes it")
    return {}


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _triton() -> str:
    import triton

    return str(triton.__version__)
