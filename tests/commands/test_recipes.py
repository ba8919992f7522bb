"""The paper's settings: every recipe builds and learns, every command of the page about them parses."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

import aligndet
from aligndet import cli
from aligndet.commands.compare import _settings
from aligndet.commands.finetune import finetune
from aligndet.commands.pretrain import pretrain
from aligndet.commands.recipes import _texts, section_of

RECIPES: dict[str, dict[str, Any]] = {name: yaml.safe_load(text) for name, text in _texts().items()}
TINY = ["--trunk-weights=none", "--min-size=64,64", "--max-size=96", "--batch-size=2"]
TINY += ["--steps=1", "--workers=0", "--accelerator=cpu", "--precision=32"]
POSITIONAL = {
    "pretrain": ["images", "--proposals=p"],
    "finetune": ["train.json"],
    "compare": ["train.json", "--val-annotations=val.json"],
}


_parser_of = cache(cli.parser_of)  # to parse is short work beside building one


def _parsed(command: str, arguments: list[str]) -> dict[str, Any]:
    function, parser = _parser_of(command)
    return parser.parse_args(cli._as_options(function, arguments)).as_dict()


def test_the_defaults_are_the_papers() -> None:
    defaults = {name: parameter.default for name, parameter in signature(pretrain).parameters.items()}
    papers = {
        **{"epochs": 12.0, "min_size": (640, 800), "max_size": 1333, "max_proposals": 50},
        **{"temperature": 0.5, "contrast_weight": 1.0, "box_weight": 1.0},
    }
    assert papers.items() <= defaults.items()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_section_is_for_its_command(name: str) -> None:
    assert {"pretrain", "finetune", "scratch"} <= set(RECIPES[name])
    for section, settings in RECIPES[name].items():
        command = "finetune" if section == "scratch" else section
        values = _parsed(command, [*POSITIONAL[command], "--output=o", f"--config=recipe:{name}:{section}"])
        defaults = _parsed(command, [*POSITIONAL[command], "--output=o"])
        plain = json.loads(json.dumps(values, default=str))
        assert {key: plain[key] for key in settings} == settings
        named = {"detector", "detectors"}
        same = [key for key in settings if key not in named and values[key] == defaults[key]]
        assert not same, f"{name}: {section}: {same} are the defaults anyway"
    compared = RECIPES[name].get("compare", {})
    _settings("pretraining", pretrain, compared.get("pretraining"), name, set())
    _settings("finetuning", finetune, compared.get("finetuning"), name, {"learning_rate", "steps"})


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "fcos" else pytest.mark.slow) for name in RECIPES],
)
def test_one_step_of_each_stage(name: str, sample: Path, proposals: Path, tmp_path: Path) -> None:
    recipe = f"--config=recipe:{name}"
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    # a composite doubles the stages of a trunk, which MobileNet has not
    trunk = "resnet18" if "trunk" in RECIPES[name]["pretrain"] else "mobilenetv3_small_050"
    if RECIPES[name]["pretrain"]["detector"] == "detr":
        proposals = Path(shutil.copytree(proposals, tmp_path / "clustered"))
        small: dict[str, Any] = {"trunk": trunk, "trunk_weights": "none", "min_size": 64, "max_size": 96}
        aligndet.cluster(sample / "train", proposals=proposals, clusters=4, **small)
    images = [str(sample / "train"), f"--proposals={proposals}"]
    cli.run("pretrain", [*images, f"--output={run}", recipe, *TINY, f"--trunk={trunk}", "--fpn-channels=64"])
    cli.run(
        "finetune", [str(sample / "train.json"), f"--output={tuned}", f"--init-from={run}", recipe, *TINY]
    )
    detector, manifest = aligndet.load_detector(tuned)
    assert manifest["architecture"]["detector"] == RECIPES[name]["pretrain"]["detector"]
    assert "pre-trained" in manifest["initialised_from"]["modules"].values()
    settings = json.loads((tuned / "run.json").read_text())["settings"]
    assert {k: settings[k] for k in ("lr_schedule", "learning_rate") if k in RECIPES[name]["finetune"]} == {
        k: v for k, v in RECIPES[name]["finetune"].items() if k in ("lr_schedule", "learning_rate")
    }
    assert all(torch.isfinite(p).all() for p in detector.parameters())


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_trunks_exist(name: str) -> None:
    trunk = RECIPES[name]["pretrain"].get("trunk", "resnet50")
    assert trunk == "resnet50" or timm.is_model(trunk)


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{name} +\S", listed, re.MULTILINE) for name in RECIPES)
    assert cli.main(["recipes", "--show", "fcos"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == RECIPES["fcos"]


def test_a_file_with_sections(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("pretrain: {batch_size: 3}\nfinetune: {batch_size: 5}\nother: {batch_size: 7}\n")
    for source, expected in ((str(path), 5), (f"{path}:other", 7), (f"{path}:pretrain", 3)):
        assert section_of(source, "finetune") == {"batch_size": expected}
    path.write_text(path.read_text() + "pretrain-backbone: {batch_size: 9}\n")
    assert section_of(str(path), "pretrain_backbone") == {"batch_size": 9}
    flat = tmp_path / "flat:1.yaml"
    flat.write_text("batch-size: 3\n")
    assert section_of(str(flat), "compare") == {"batch_size": 3}
    flat.write_text("compare:\n  finetuning: {batch-size: 3}\nfinetune:\n")
    assert section_of(str(flat), "compare") == {"finetuning": {"batch_size": 3}}
    assert section_of(str(flat), "finetune") == {}
    values = _parsed("finetune", ["t.json", "--output=o", f"--config={path}", "--batch-size=6"])
    assert values["batch_size"] == 6  # the command line comes first
    with pytest.raises(
        ValueError, match=r"mine\.yaml:nothing: no section 'nothing'; there are: pretrain, fin"
    ):
        section_of(f"{path}:nothing", "finetune")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("recipe:yolo", "no recipe 'yolo'; there are: cbnet_htc, detr"),
        ("recipe:fcos:tune", "no section 'tune'; there are: pretrain, finetune, scratch, compare"),
    ],
)
def test_a_recipe_that_is_not_there(source: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["finetune", "train.json", "--output=o", "--config", source]) == 2
    assert message in capsys.readouterr().err


PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text("utf-8")


def _cells() -> list[str]:
    """Every command of the page, with what its table says in the place of ROW, COLUMN and PRETRAIN."""
    commands: list[str] = []
    templates: list[str] = []
    columns: list[str] = []
    for line in PAGE.splitlines():
        spans = re.findall(r"`([^`]+)`", line)
        if line.startswith("#"):
            templates = []
        elif line.startswith("    aligndet "):
            # a template holds until one for the same place follows
            places = _places(line)
            templates = [t for t in templates if _places(t) != places] + [line.strip()] * bool(places)
            commands += [] if places else [line.strip()]
        elif line.startswith("|") and "COLUMN" in line:
            columns = spans
        elif line.startswith("|") and spans:
            fields = dict(zip(("ROW", "PRETRAIN"), spans, strict=False))
            for template in templates:
                if _places(template) - {"COLUMN"} <= set(fields):
                    for column in columns if "COLUMN" in template else [""]:
                        filled = template.replace("COLUMN", column).replace("ROW", fields["ROW"])
                        commands.append(filled.replace("PRETRAIN", fields.get("PRETRAIN", "")))
    return commands


def _places(template: str) -> set[str]:
    return set(template.split()) & {"ROW", "COLUMN", "PRETRAIN"}


CELLS = _cells()


def test_the_page_has_all_tables() -> None:
    cells = {2: 100, 3: 16, 4: 8, 5: 19, 6: 4, 7: 6, 8: 3, 9: 5, 10: 4, 11: 2}
    assert [int(n) for n in re.findall(r"^## Table (\d+)", PAGE, re.MULTILINE)] == list(cells)
    assert sum(" finetune " in cell for cell in CELLS) == sum(cells.values())
    assert all(f"recipe:{name}" in PAGE for name in RECIPES)


@pytest.mark.parametrize("line", sorted({re.sub(r"train_\d+pct", "train_1pct", cell) for cell in CELLS}))
def test_the_commands_of_the_page_parse(line: str) -> None:
    _, command, *arguments = shlex.split(line)
    _parsed(command, arguments)
