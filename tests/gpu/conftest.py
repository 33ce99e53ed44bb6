"""The GPU lane: `pytest -m gpu tests/gpu` where there is a CUDA device; it is skipped, with the reason, where not.

`TRITON_INTERPRET=1 pytest tests/gpu` runs the same test bodies on a CPU, small, in float32 and float16.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.lane import INTERPRETED

HERE = Path(__file__).parent

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = not (INTERPRETED or torch.cuda.is_available())
    for item in items:
        if HERE not in Path(item.fspath).parents:
            continue
        if INTERPRETED:
            item.add_marker(pytest.mark.interpret)
            # lanes a `where` throws away: -inf minus -inf, exp of a huge number
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"))
        else:
            item.add_marker(pytest.mark.gpu)
        if missing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device (TRITON_INTERPRET=1 runs it on a CPU)"))


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its kin hand out NaN, without torch's deterministic mode: that would run other CUDA kernels."""

    def poisoned(make: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor: torch.Tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    assert torch.empty(3).isnan().all()
