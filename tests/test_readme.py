"""What README and docs say works."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from argparse import ArgumentParser
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import run
from torchvision.models import detection

from aligndet import cli
from aligndet.commands.export import export
from aligndet.detectors.build import build_pretrainable
from aligndet.detectors.weights import pretrained_state, save_weights

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# the tables' commands have places to fill in: tests/commands/test_recipes.py
PAGES = [page.read_text("utf-8") for page in sorted((ROOT / "docs").glob("*.md")) if page.stem != "recipes"]
STARTED = r"^    (?:(?:srun|torchrun) .*?)?aligndet (.+?)(?:  +#.*)?$"
COMMANDS = re.findall(STARTED, "\n".join([README, *PAGES]), re.MULTILINE)
SCALE = (ROOT / "docs" / "scale.md").read_text("utf-8")
_parser_of = cache(cli.parser_of)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str) -> None:
    command, *arguments = shlex.split(line)
    function, parser = _parser_of(command)
    parser.parse_args(cli._as_options(function, arguments))


def of_benchmarks(page: str) -> Iterator[str]:
    """Command lines of benchmarks, and with each row of a table of options the last one before it."""
    for section in page.split("\n## "):
        command = ""
        for found in re.finditer(r"`(python\s+benchmarks/[^`]+|--[^`]+)`", section):
            code = " ".join(found[1].split())
            if code.startswith("python"):
                command = code
                yield command
            elif section[: found.start()].rpartition("\n\n")[2].partition("\n")[0].endswith("options |"):
                yield f"{command} {code}"


BENCHMARKS = [line for page in (README, *PAGES) for line in of_benchmarks(page)]


@pytest.mark.parametrize("line", BENCHMARKS)
def test_commands_of_benchmarks_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = ArgumentParser.parse_args

    def parse_and_stop(parser: ArgumentParser) -> None:
        parse(parser)
        raise InterruptedError

    _, script, *arguments = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(InterruptedError):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_the_command_of_torchrun_is_its_own() -> None:
    (line,) = re.findall(r"^    torchrun (.+)$", SCALE, re.MULTILINE)
    given = run.get_args_parser().parse_args(shlex.split(line))
    assert (given.training_script, given.module) == ("aligndet", True)
    command, *arguments = given.training_script_args
    function, parser = cli.parser_of(command)
    asked = parser.parse_args(cli._as_options(function, arguments))
    assert (str(asked.nodes), str(asked.devices)) == (given.nnodes, given.nproc_per_node)


@pytest.mark.skipif(shutil.which("timeout") is None, reason="macOS has no timeout")
@pytest.mark.parametrize(
    ("task", "code", "requeued"), [("exit 0", 0, False), ("exit 1", 1, False), ("exec sleep 9", 124, True)]
)
def test_slurms_script_goes_on_when_its_time_is_over(
    task: str, code: int, requeued: bool, tmp_path: Path
) -> None:
    script = re.search(r"^    #!/bin/bash\n(?:    .*\n)+", SCALE, re.MULTILINE)
    assert script is not None
    text = textwrap.dedent(script[0])
    asked = dict(re.findall(r"^#SBATCH --(\S+)=(\S+)$", text, re.MULTILINE))
    for option, name in (
        ("--nodes", "nodes"),
        ("--devices", "ntasks-per-node"),
        ("--devices", "gpus-per-node"),
    ):
        assert f" {option} {asked[name]} " in text
    (tmp_path / "job").write_text(text.replace("23h", "1" if requeued else "60"))
    for name, body in (("srun", task), ("scontrol", "echo $@ > requeued")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "job"], cwd=tmp_path, env=variables)
    assert done.returncode == code
    assert (tmp_path / "requeued").is_file() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_there_are_commands_to_test() -> None:
    assert len(COMMANDS) >= 12
    assert len(BENCHMARKS) >= 25


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


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn"])
def test_two_stage_exports_load_with_torchvision_alone(name: str, tmp_path: Path) -> None:
    adapter = build_pretrainable(name, trunk="resnet50")
    architecture = {"detector": name, "trunk": "resnet50", "fpn_channels": 256, "fpn_norm": "none"}
    save_weights(tmp_path / "run" / "pretrained", pretrained_state(adapter), {"architecture": architecture})
    export(tmp_path / "run", output=tmp_path / "exported", num_classes=12)
    detector = getattr(detection, f"{name.replace('_', '')}_resnet50_fpn")(
        weights=None, weights_backbone=None, num_classes=12 + 1
    )
    weights = load_file(tmp_path / "exported" / "model.safetensors")
    detector.load_state_dict(weights, strict=True)
    ours = adapter.detector.state_dict()
    for layer in ("rpn.head.bbox_pred", "roi_heads.box_head.fc6", "backbone.fpn.inner_blocks.0.0"):
        assert torch.equal(detector.state_dict()[f"{layer}.weight"], ours[f"{layer}.weight"])
