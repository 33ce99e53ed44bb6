"""Golden cases of Liger's chunked GRPO losses, xloss on trial.

Contract: every loss type and option of `LigerFusedLinearGRPOLoss` has its numbers in xloss, loss and both gradients, in
float64 (eager and chunked) and float32. `DIFFERENT` lists what differs on purpose.
"""

from __future__ import annotations

import pytest

from tests.golden import records
from tests.golden.policy_step import every_run, run_step
from tests.golden.records import Entry, case_id
from tests.golden.test_trl import NAMES, luspo_with_padding, run_steps, step_of, vespo_with_padding

CASES: list[Entry] = records.entries("liger", *(f"trl_{name}" for name in NAMES))
DIFFERENT: dict[str, str] = {
    "liger-grpo_luspo-P1-015": "Liger's luspo at token level averages over padding too",
    "liger-grpo_luspo_kl_seq-P2-017": "Liger's luspo averages the KL over padding too",
    "liger-grpo_vespo_is-P2-028": "Liger's vespo multiplies rollout weights at padding into the sequence's",
}


@every_run
@pytest.mark.parametrize("entry", [e for e in CASES if e["id"] not in DIFFERENT], ids=case_id)
def test_liger(entry: Entry, run: str) -> None:
    precision, found, _ = run_step(step_of(entry), run)
    assert records.mismatches(entry, found, precision) == []


@every_run
@pytest.mark.parametrize("entry", [e for e in CASES if e["id"] in DIFFERENT], ids=case_id)
def test_different(entry: Entry, run: str) -> None:
    """Where the difference is made up for, our numbers are Liger's."""
    explained = {"trl_luspo": luspo_with_padding, "trl_vespo": vespo_with_padding}
    precision, found = run_steps(explained[entry["loss_name"]](entry), run)
    assert records.mismatches(entry, found, precision) == []


@pytest.mark.parametrize("entry", [e for e in CASES if e["id"] in DIFFERENT], ids=case_id)
def test_different_they_are(entry: Entry) -> None:
    precision, found, _ = run_step(step_of(entry), "eager-f64")
    assert records.mismatches(entry, found, precision) != []
