"""``xloss losses``.

Contract: it lists every loss and preset, filtered or not, fits 80 columns, and shows one with formula, parameters,
source, plan and curve; --json prints JSON alone; --plot writes a PNG; a wrong name is exit status 2 with the nearest
one; options of the nested command come from the same places as all others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from xloss import presets
from xloss.cli import app
from xloss.losses.catalog import catalog


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def run(arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        app.meta(arguments.split())
    return int(stop.value.code or 0)


def printed(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert run(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def parsed(arguments: str, capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(printed(arguments, capsys))


def test_lists_everything(capsys: pytest.CaptureFixture[str]) -> None:
    words = set(printed("losses", capsys).replace(",", " ").split())
    assert set(catalog()) | set(presets()) <= words


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = parsed("losses --json", capsys)
    assert {e["name"] for e in found["losses"]} == set(catalog())
    assert {p["name"] for p in found["presets"]} == set(presets())
    (dapo,) = (p for p in found["presets"] if p["name"] == "dapo")
    assert (dapo["loss"], dapo["family"], dapo["config"]) == ("ppo", "policy", "GRPOLossConfig")
    assert dapo["fields"]["policy_loss_cfg"]["cliprange_high"] == 0.28


def test_filters(capsys: pytest.CaptureFixture[str]) -> None:
    found = parsed("losses --family preference --json", capsys)
    assert {e["family"] for e in found["losses"]} == {p["family"] for p in found["presets"]} == {"preference"}
    assert {"trl/dpo", "kto"} <= {p["name"] for p in found["presets"]}
    found = parsed("losses --framework tinker --json", capsys)
    assert found["losses"] == []
    assert {p["name"] for p in found["presets"]} == {n for n in presets() if n.startswith("tinker/")}
    shown = printed("losses --framework trl --family distillation", capsys)
    assert "trl/gkd" in shown and "trl/grpo" not in shown
    shown = printed("losses --family value", capsys)
    assert "huber" in shown and "preset" not in shown


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    "arguments",
    [
        "losses",
        "losses --family policy",
        "losses --framework verl",
        "losses show dapo",
        "losses show nemo/gspo",
        "losses show mpo",
        "losses show gkd",
        "losses show vapo",
        "losses show simpo",
    ],
)
def test_fits(
    arguments: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = printed(arguments, capsys)
    assert max(map(len, shown.splitlines())) <= columns
    assert "…" not in shown, "cut off"


def test_shows_a_loss(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed("losses show cispo", capsys)
    entry = catalog()["cispo"]
    for part in (entry.formula, entry.source, "one-pass", "clip_high_threshold", "unified_mask", "preset('cispo')"):
        assert part in shown
    assert "tinker/cispo" in shown  # who else uses it
    assert "A = +1" in shown and "gradient: d loss / d logprob" in shown


def test_shows_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed("losses show trl/dr_grpo", capsys)
    assert "preset('trl/dr_grpo', norm_length=...)" in shown and "loss_type='dr_grpo'" in shown
    assert "policy_loss_cfg.log_ratio_clamp" in shown
    (line,) = (line for line in shown.splitlines() if line.split()[:1] == ["norm_length"])
    assert line.split() == ["norm_length", "required"]
    shown = printed("losses show opsm", capsys)
    assert "two-pass: opsm_delta" in shown


def test_show_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = parsed("losses show tinker/ppo --json", capsys)
    assert (found["name"], found["preset"]["name"], found["picture"]) == ("ppo", "tinker/ppo", None)
    assert {p["name"] for p in found["parameters"]} >= {"clip_low_threshold", "dual_clip_c"}
    at = found["curve"]["x"].index(1.5)
    assert found["curve"]["grads"]["A = +1"][at] == 0.0
    assert found["curve"]["grads"]["A = -1"][at] == pytest.approx(1.5)


def test_a_loss_without_a_curve_says_so(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed("losses show clip_cov --plot", capsys)
    assert "No curve: ClipCovConfig compares tokens with each other" in shown and "Written" not in shown
    assert not (empty_folder / "xloss-losses").exists()
    assert "no function of one number" in parsed("losses show oreal --json", capsys)["no_curve"]


@pytest.mark.parametrize("name", ["dapo", "trl/gspo", "dpo", "kto", "dft", "gkd", "huber"])
def test_plot(name: str, empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(f"losses show {name} --plot --out pictures", capsys)
    file = empty_folder / "pictures" / f"{name.replace('/', '-')}.png"
    assert f"Written to pictures/{file.name}" in shown
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("losses show dapo --plot") == 2
    assert "pip install 'xloss[plots]'" in capsys.readouterr().err


def test_plot_where_nothing_can_be_written(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (empty_folder / "taken").write_text("")
    assert run("losses show dapo --plot --out taken") == 2
    assert "--out taken" in capsys.readouterr().err


OWN = '''
"""A loss of a user."""
from typing import ClassVar, Literal
from xloss import PolicyLossConfig
from xloss.policy import surrogate

class MyLossConfig(PolicyLossConfig):
    """Mine alone."""
    loss_type: Literal["mine_in_cli"] = "mine_in_cli"
    formula: ClassVar[str] = "-scale r A"
    source: ClassVar[str] = "my notebook"
    scale: float = 3.0

    def per_token(self, batch):
        return self.scale * surrogate.importance_sampling(batch.logprobs, batch.old_logprobs, batch.advantages)
'''


def test_a_loss_of_ones_own(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found in the current folder, as with ``python -m``."""
    (empty_folder / "my_losses_for_cli.py").write_text(OWN)
    path = list(sys.path)
    shown = printed("losses show my_losses_for_cli.MyLossConfig --plot", capsys)
    sys.modules.pop("my_losses_for_cli")
    assert sys.path == path
    for part in ("-scale r A", "my notebook", "Mine alone.", "loss_type='my_losses_for_cli.MyLossConfig'", "-4.5"):
        assert part in shown
    assert (empty_folder / "xloss-losses" / "my_losses_for_cli.MyLossConfig.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("losses show dapoo", "Did you mean 'dapo'? xloss losses lists all."),
        ("losses show tlr/grpo", "Did you mean 'trl/grpo'?"),
        ("losses show nowhere.MyLoss", "'nowhere.MyLoss' looks like an import path"),
        ("losses show", "NAME requires an argument"),
        ("losses shwo dapo", "Did you mean 'show'?"),
        ("losses dapo", "show NAME"),
        ("losses --famly policy", "Did you mean --family?"),
        ("losses --family polcy", 'Did you mean "policy"?'),
        ("losses --framework tlr", "Did you mean 'trl'?"),
        ("losses show dapo --plto", "Did you mean --plot?"),
        ("lossses", 'Did you mean "losses"?'),
    ],
)
def test_typos(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err


def test_options_from_elsewhere(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (empty_folder / "pyproject.toml").write_text('[tool.xloss.losses]\nfamily = "value"\n')
    (empty_folder / "c.toml").write_text('[losses.show]\nplot = true\nout = "from-config"\n')
    assert "huber" in printed("losses", capsys)
    assert "Written to from-config" in printed("losses show huber --config c.toml", capsys)
    monkeypatch.setenv("XLOSS_LOSSES_SHOW_OUT", "from-env")
    assert "Written to from-env" in printed("losses show huber --config c.toml", capsys)
    assert "huber" in printed("losses --config c.toml", capsys)
    monkeypatch.setenv("XLOSS_LOSSES_FAMILY", "supervised")
    shown = printed("losses", capsys)
    assert "huber" not in shown and "focal" in shown


@pytest.mark.parametrize(
    ("config", "variable", "message"),
    [
        ("[losses.show]\nplto = true\n", "", "Unknown option 'plto' of [losses.show]"),
        ("[losses.shwo]\nplot = true\n", "", "Did you mean show?"),
        ("[losses]\nshow = true\n", "", "[losses.show] in c.toml must be a table"),
        ("", "XLOSS_LOSSES_SHOW_PLTO", "Did you mean XLOSS_LOSSES_SHOW_PLOT?"),
    ],
)
def test_typos_elsewhere(
    config: str,
    variable: str,
    message: str,
    empty_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (empty_folder / "c.toml").write_text(config)
    if variable:
        monkeypatch.setenv(variable, "1")
    assert run("losses show dapo --config c.toml") == 2
    assert message in capsys.readouterr().err
