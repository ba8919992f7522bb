"""What README and docs say works."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aligndet import cli
from aligndet.commands.export import export
from aligndet.detectors.build import build_pretrainable
from aligndet.detectors.weights import pretrained_state, save_weights

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# the tables' commands have places to fill in: tests/commands/test_recipes.py
PAGES = [page.read_text("utf-8") for page in sorted((ROOT / "docs").glob("*.md")) if page.stem != "recipes"]
COMMANDS = re.findall(r"^    aligndet (.+?)(?:  +#.*)?$", "\n".join([README, *PAGES]), re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str) -> None:
    command, *arguments = shlex.split(line)
    function, parser = cli.parser_of(command)
    parser.parse_args(cli._as_options(function, arguments))


def test_there_are_commands_to_test() -> None:
    assert len(COMMANDS) >= 12


@pytest.mark.slow
def test_the_docs_build(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    commands = (tmp_path / "site" / "commands" / "index.html").read_text("utf-8")
    assert all(f"aligndet {name}" in commands for name in cli.COMMANDS)
    detector = (tmp_path / "site" / "detector" / "index.html").read_text("utf-8")
    assert "ColoursPretraining" in detector  # out of the tests


def test_an_export_loads_with_torchvision_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = {"detector": "fcos", "trunk": "resnet50", "fpn_channels": 256}
    adapter = build_pretrainable("fcos", trunk="resnet50")
    save_weights(
        tmp_path / "pretrained" / "pretrained", pretrained_state(adapter), {"architecture": architecture}
    )
    monkeypatch.chdir(tmp_path)
    export(Path("pretrained"), output=Path("exported"), num_classes=12)
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "load_state_dict" in b)
    assert "aligndet" not in block
    names: dict[str, torch.nn.Module] = {}
    exec(block, names)
    ours, theirs = adapter.detector.state_dict(), names["detector"].state_dict()
    torch.testing.assert_close(
        theirs["head.regression_head.conv.0.weight"], ours["head.regression_head.conv.0.weight"]
    )
    with pytest.raises(ValueError, match="holds weights already"):
        export(Path("pretrained"), output=Path("exported"), num_classes=12)
