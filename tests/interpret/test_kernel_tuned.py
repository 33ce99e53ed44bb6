"""Tuned tiles: found on tensors of the tuner's own, kept in a file that survives the process, used where asked for.

Contract: nothing is looked up or timed unless XLOSS_TILES=tuned; the entry does not depend on the number of tokens; a
file that is missing, damaged, of another GPU or Triton, or names a tile that is no candidate gives the fixed tile and
a warning that names the file; entries of other heads survive; no live tensor can be handed to the tuner.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.interpret import kernel_inputs as inputs
from xloss_kernels import row_stats as row_stats_module
from xloss_kernels import tiles, tune, tuned
from xloss_kernels.dlogits import dlogits
from xloss_kernels.head_backward import head_dlogits
from xloss_kernels.head_forward import head_forward
from xloss_kernels.policy_rows import PolicySpec, policy_rows
from xloss_kernels.row_stats import row_stats

VOCAB, HIDDEN, TOKENS = 70, 16, 3
CPU = torch.device("cpu")
KERNELS = {"row_stats", "dlogits", "policy_rows", "head_forward", "head_dlogits"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XLOSS_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("XLOSS_TILES", raising=False)
    tuned.forget()
    yield tmp_path
    tuned.forget()


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLOSS_TILES", "tuned")


def last_is_best() -> Callable[[Callable[[], object]], float]:
    """A timer that runs each candidate once and likes the latest."""
    clock = iter(range(10**6, 0, -1))

    def timer(run: Callable[[], object]) -> float:
        run()
        return float(next(clock))

    return timer


def tuned_now() -> dict[str, object]:
    return tune.tune(VOCAB, HIDDEN, torch.float16, device="cpu", num_tokens=TOKENS, timer=last_is_best())


def tile_of(num_vocab: int = VOCAB) -> tiles.RowTile:
    return tuned.row("row_stats", CPU, num_vocab, torch.float32)


def test_every_kernel_is_tuned_and_written(folder: Path) -> None:
    notes: list[str] = []
    options = {"device": "cpu", "num_tokens": TOKENS, "timer": last_is_best(), "tell": notes.append}
    found = tune.tune(VOCAB, HIDDEN, torch.float16, **options)
    assert {key.split()[0] for key in found} == KERNELS
    assert found["row_stats float32 V128"] == tuned.row_candidates(VOCAB, torch.float32)[-1]
    assert found["head_forward float16 V128 H16"] == tiles.head_candidates(torch.float16, 80)[-1]
    content = json.loads((folder / "tiles-cpu.json").read_text())
    assert content["gpu"] == "cpu" and set(content["tiles"]) == set(found)
    assert len(notes) == len(KERNELS) + 1 and "tiles-cpu.json" in notes[-1]


def test_the_tuner_takes_sizes_and_no_tensors() -> None:
    assert "Tensor" not in str(inspect.signature(tune.tune))


def test_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned_now()
    monkeypatch.setattr(tuned, "load", lambda *_: pytest.fail("the file was read"))
    assert tile_of() == tiles.row_tile(VOCAB, torch.float32)
    row_stats(inputs.logits("plain", 3, VOCAB), torch.tensor([0, 1, 2]))


def test_launchers_take_the_tuned_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launcher asks under the key that the tuner writes, and gets what it wrote."""
    found, seen = tuned_now(), {}
    monkeypatch.setenv("XLOSS_TILES", "tuned")
    for kind in ("row", "head"):
        real = getattr(tuned, kind)

        def spy(op: str, *args: object, real: Callable[..., object] = real, **kwargs: object) -> object:
            return seen.setdefault(op, real(op, *args, **kwargs))

        monkeypatch.setattr(tuned, kind, spy)
    raw, labels, vector = inputs.logits("plain", 3, VOCAB), torch.tensor([0, 1, 2]), torch.ones(3)
    hidden, weight = torch.randn(3, HIDDEN).half(), torch.randn(VOCAB, HIDDEN).half()
    known = row_stats(raw, labels)
    policy_rows(raw.clone(), labels, PolicySpec("ce"))
    dlogits(raw.clone(), labels, known.lse, d_logprobs=vector)
    head_forward(hidden, weight, labels)
    head_dlogits(hidden, weight, labels, known.lse, d_logprobs=vector)
    assert seen == {key.split()[0]: tile for key, tile in found.items()}
    assert seen["row_stats"] != tiles.row_tile(VOCAB, torch.float32)


@pytest.mark.usefixtures("asked_for")
def test_another_tile_is_as_right() -> None:
    tuned_now()
    raw, labels = inputs.logits("plain", 5, VOCAB), inputs.labels(5, VOCAB)
    ours = row_stats(raw, labels, entropy=True)
    fixed = row_stats(raw, labels, entropy=True, tile=tiles.row_tile(VOCAB, torch.float32))
    torch.testing.assert_close(ours.entropy, fixed.entropy)


@pytest.mark.usefixtures("asked_for")
def test_a_bucket_is_shared_and_others_are_not() -> None:
    tuned_now()
    best = tuned.row_candidates(VOCAB, torch.float32)[-1]
    assert tile_of(65) == tile_of(128) == best != tile_of(129)
    assert tile_of(129) == tiles.row_tile(129, torch.float32)
    assert list(inspect.signature(tuned.row).parameters) == ["op", "device", "num_vocab", "dtypes", "num_warps"]


def test_it_survives_the_process(folder: Path) -> None:
    best = tuned_now()["row_stats float32 V128"]
    code = "import torch; from xloss_kernels import tuned; "
    code += f"print(tuned.row('row_stats', torch.device('cpu'), {VOCAB}, torch.float32))"
    where = {"PYTHONPATH": str(Path(row_stats_module.__file__).parents[1]), "XLOSS_CACHE_DIR": str(folder)}
    for choice, wanted in (("tuned", best), ("fixed", tiles.row_tile(VOCAB, torch.float32))):
        env = os.environ | where | {"XLOSS_TILES": choice}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        assert done.stdout.strip() == str(wanted)


@pytest.mark.usefixtures("asked_for")
@pytest.mark.parametrize(
    "text,said",
    [
        (None, "is missing"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format": 1, "gpu": "cpu", "triton": "x", "tiles": [1]}', "cannot be read"),
        ('{"format": 1, "gpu": "cpu", "triton": "0.1", "tiles": {}}', "triton 0.1"),
        ('{"format": 1, "gpu": "NVIDIA T4", "triton": "0.1", "tiles": {}}', "NVIDIA T4"),
    ],
)
def test_a_file_to_pass_over(text: str | None, said: str, folder: Path) -> None:
    path = folder / "tiles-cpu.json"
    if text is not None:
        path.write_text(text)
    with pytest.warns(RuntimeWarning, match=said) as caught:
        assert tile_of() == tiles.row_tile(VOCAB, torch.float32)
    assert str(path) in str(caught[0].message) and "xloss_kernels.tune" in str(caught[0].message)
    tile_of()  # said once: another warning would be an error here


@pytest.mark.usefixtures("asked_for")
def test_a_tile_that_is_no_candidate(folder: Path) -> None:
    tuned_now()
    path = folder / "tiles-cpu.json"
    content = json.loads(path.read_text())
    content["tiles"]["row_stats float32 V128"]["lanes"] = 12345
    path.write_text(json.dumps(content))
    tuned.forget()
    with pytest.warns(RuntimeWarning, match="12345"):
        assert tile_of() == tiles.row_tile(VOCAB, torch.float32)


def test_tuning_again_keeps_other_heads_and_replaces_a_damaged_file(folder: Path) -> None:
    tuned_now()
    tune.tune(300, HIDDEN, torch.float32, device="cpu", num_tokens=TOKENS, timer=last_is_best())
    path = folder / "tiles-cpu.json"
    kept = json.loads(path.read_text())["tiles"]
    assert {"row_stats float32 V128", "row_stats float32 V512"} <= set(kept)
    path.write_text("{")
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        tuned.save("cpu", {"row_stats float32 V128": tiles.row_tile(VOCAB, torch.float32)})
    assert list(json.loads(path.read_text())["tiles"]) == ["row_stats float32 V128"]
    assert [p.name for p in folder.iterdir()] == ["tiles-cpu.json"], "nothing half-written stays"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_tuned_tile_leaves_the_partials_their_size(arch: int, dtype: torch.dtype) -> None:
    """What a plan says about memory holds for every tile."""
    assert {tile.split for tile in tiles.head_candidates(dtype, arch)} == {1024}


def test_a_misspelt_choice_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLOSS_TILES", "tune")
    with pytest.raises(ValueError, match=r"XLOSS_TILES must be fixed \(the default\) or tuned; got 'tune'"):
        tile_of()


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLOSS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert tuned.path_for("NVIDIA H200") == Path("/cache/xloss/tiles-nvidia-h200.json")


@pytest.mark.parametrize("words,said", [(["--vocab", "0", "--hidden", "8"], "at least 1"), ([], "--vocab")])
def test_the_command_names_what_is_wrong(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tune.main(words)
    assert caught.value.code == 2 and said in capsys.readouterr().err


def test_the_command_needs_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for remove in (False, True):
        if remove:
            monkeypatch.setattr(tune, "find_spec", lambda name: None)
        with pytest.raises(SystemExit):
            tune.main(["--vocab", "100", "--hidden", "8"])
        assert ("triton is not installed" if remove else "needs a CUDA device") in capsys.readouterr().err
