from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import yaml

from aligndet import cli
from aligndet.commands.compare import compare


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    _, parser = cli.parser_of(command)
    unexplained = [a.dest for a in parser._actions if not a.help]
    assert not unexplained
    assert f"aligndet {command}" in text
    assert "<class" not in text
    assert not [name for name in re.findall(r"--\w+", text) if "_" in name and name != "--print_config"]


def test_the_first_page_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in cli.COMMANDS)
    assert cli.main(["--version"]) == 0


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from aligndet.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_log_file_gets_few_bars(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aligndet", "sample-data", str(tmp_path / "data"), "--size=64"]
    command += ["--train-images=100", "--val-images=1"]
    errors = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert errors.count("train:") <= 3  # at the beginning, the end, and every ten seconds


def test_options_as_people_write_them(tmp_path: Path) -> None:
    assert cli.run("sample-data", [str(tmp_path / "a"), "--train-images", "1", "--val_images=1", "--size=64"])
    with pytest.raises(ValueError, match="not empty"):
        cli.run("sample-data", [str(tmp_path / "a"), "--train-images=1", "--val-images=1", "--size=64"])
    cli.run(
        "sample-data", [str(tmp_path / "a"), "--overwrite", "--train-images=1", "--val-images=1", "--size=64"]
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--init", "neck,head"], {"init": ("neck", "head")}),
        (["--init=neck"], {"init": ("neck",)}),
        (["--init", "[neck, head]"], {"init": ("neck", "head")}),
        (["--min-size", "640,800", "--resume"], {"min_size": (640, 800), "resume": True}),
        (["--resume=false", "--overwrite", "true"], {"resume": False, "overwrite": True}),
        (["--learning-rate", "1e-4", "--clip=null"], {"learning_rate": 1e-4, "clip": None}),
    ],
)
def test_values(arguments: list[str], expected: dict[str, Any]) -> None:
    function, parser = cli.parser_of("finetune")
    values = parser.parse_args(cli._as_options(function, ["train.json", "--output=x", *arguments]))
    assert {name: values[name] for name in expected} == expected


def test_config_file_and_override(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sample-data", str(tmp_path / "a"), "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["train_images"] == 160
    config |= {"train_images": 2, "val_images": 1, "size": 64}
    config["train-images"] = config.pop("train_images")  # as it is written on the command line
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cli.run("sample-data", ["--config", str(tmp_path / "config.yaml"), "--train-images=3"])
    assert len(list((tmp_path / "a" / "train").glob("*.jpg"))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["propose", "nowhere", "--output=x"], "nowhere: no such folder"),
        (["evaluate", "nothing", "x.json"], "nothing: holds no weights"),
        (["export", "nothing", "--output=x", "--num-classes=3"], "nothing: holds no weights"),
        (["dance"], "unknown command 'dance'"),
        (["propose"], "required: images, output"),
        (["propose", "x", "--output=x", "--colour=red"], "unrecognized arguments: --colour=red"),
        (["propose", "x", "--output=x", "--shard-size=many"], "--shard-size: Expected a int"),
        (["propose", "x", "--output=x", "--config=nowhere.yaml"], "nowhere.yaml"),
        (["finetune", "x.json", "--output=x", "--schedule=9x"], "--schedule: Expected"),
        (["finetune", "x.json", "--output=x", "--init"], "expected one argument"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_what_a_loader_says_is_one_line(
    sample: Path, proposals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for path in (sample / "train").glob("*.jpg"):
        (tmp_path / "images" / path.name).write_bytes(b"\xff\xd8\xff")
    settings = ["--trunk=resnet18", "--trunk-weights=none", "--fpn-channels=64", "--steps=1", "--workers=1"]
    arguments = [f"--proposals={proposals}", f"--output={tmp_path / 'run'}", "--accelerator=cpu", "--strict"]
    assert cli.main(["pretrain", str(tmp_path / "images"), *arguments, *settings]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"aligndet pretrain: \S+\.jpg: .{5,60}", line), line


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALIGNDET_DEBUG", "1")
    with pytest.raises(ValueError, match="no such folder"):
        cli.main(["propose", str(tmp_path / "nowhere"), f"--output={tmp_path / 'x'}"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train_imagez: 3\n", "'train_imagez' is no option"),
        ("sample-data:\n  train-imagez: 3\n", "'train_imagez' is no option"),
        ("train_images: [\n", "no YAML"),
        ("output: 2024-02-30\n", "no YAML"),
        ("a: &a {b: *a}\n", "no YAML"),
        ("- 3\n", "holds no options"),
        ("", "holds no options"),
    ],
)
def test_a_mistake_in_a_config_file_names_the_file(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(content)
    assert cli.main(["sample-data", str(tmp_path / "a"), f"--config={tmp_path / 'config.yaml'}"]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "config.yaml" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("in_training", [False, True])
def test_an_interrupt_is_one_line(
    in_training: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if in_training:
                sys.exit(1)  # as Lightning does
            raise

    monkeypatch.setattr(cli, "run", interrupted)
    assert cli.main(["pretrain"]) == 130
    assert capsys.readouterr().err == "aligndet: interrupted\n"


@pytest.mark.slow
def test_an_interrupted_training_says_so(sample: Path, proposals: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aligndet", "pretrain", str(sample / "train")]
    command += [f"--proposals={proposals}", f"--output={tmp_path / 'run'}", "--trunk=resnet18"]
    command += ["--trunk-weights=none", "--fpn-channels=64", "--min-size=64,64", "--max-size=64"]
    command += ["--steps=100000", "--batch-size=2", "--workers=0", "--checkpoint-every=1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.endswith("aligndet: interrupted\n")


def test_a_list_without_an_options_name() -> None:
    function, parser = cli.parser_of("report")
    arguments = ["a, b", "--output", "page.html", "c", "--score=0.5", "d"]
    values = parser.parse_args(cli._as_options(function, arguments))
    assert [str(path) for path in values.runs] == ["a, b", "c", "d"]
    assert (str(values.output), values.score) == ("page.html", 0.5)


def test_settings_of_several_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text("finetuning: {batch_size: 8, options: {size: 1, rest: 2}}")
    given: list[dict[str, Any]] = []
    command = create_autospec(compare, side_effect=lambda *_, **values: given.append(values["finetuning"]))
    _, parser = cli.parser_of("compare")
    monkeypatch.setattr(cli, "parser_of", lambda _: (command, parser))
    before = ["compare", "a.json", "--val-annotations=b", f"--output={tmp_path}"]
    deep = ["--finetuning.options.size", "128", "--finetuning.fcos.batch-size=4"]
    deep += ["--finetuning.fcos.options.freeze=true", "--finetuning.retinanet.trunk_weights", "none"]
    assert cli.main([*before, "--config", str(tmp_path / "run.yaml"), *deep]) == 0
    assert given == [
        {
            "options": {"size": 128, "rest": 2},
            "batch_size": 8,
            "fcos": {"batch_size": 4, "options": {"freeze": True}},
            "retinanet": {"trunk_weights": "none"},
        }
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--finetuning.options.size"], "write the value behind an equals sign"),
        (["--trunk.options.size=3"], "--trunk has no settings of its own"),
        (["--finetuning.options.size=3", "--print_config"], "write it into the file by hand"),
    ],
)
def test_mistakes_in_settings_of_several_levels(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", "a.json", "--val-annotations=b", "--output=c", *options]) == 2
    assert message in capsys.readouterr().err
