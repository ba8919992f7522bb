from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from aligndet import cli


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


def test_the_first_page_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in cli.COMMANDS)
    assert cli.main(["--version"]) == 0


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from aligndet.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_options_as_people_write_them(tmp_path: Path) -> None:
    assert cli.run("sample-data", [str(tmp_path / "a"), "--train-images", "1", "--val_images=1", "--size=64"])
    with pytest.raises(ValueError, match="not empty"):
        cli.run("sample-data", [str(tmp_path / "a"), "--train-images=1", "--val-images=1", "--size=64"])
    cli.run(
        "sample-data", [str(tmp_path / "a"), "--overwrite", "--train-images=1", "--val-images=1", "--size=64"]
    )


def test_config_file_and_override(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sample-data", str(tmp_path / "a"), "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["train_images"] == 160
    config |= {"train_images": 2, "val_images": 1, "size": 64}
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


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALIGNDET_DEBUG", "1")
    with pytest.raises(ValueError, match="no such folder"):
        cli.main(["propose", str(tmp_path / "nowhere"), f"--output={tmp_path / 'x'}"])
