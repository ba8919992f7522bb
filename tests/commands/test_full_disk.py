"""A full disk ends a command with an error that names the file, and what was written before is intact."""

from __future__ import annotations

import errno
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndet.checkpoints import WholeCheckpointIO
from aligndet.cli import main
from aligndet.commands.propose import propose
from aligndet.proposals.storage import read_proposals, read_shard, write_shard


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, kept in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> None:
    """Writes until nothing more fits."""
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**22))


def fill_before_second(function: Callable[..., Any], disk: Path) -> Callable[..., Any]:
    """The function, but when it is called for the second time there is no space left."""
    calls = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            fill(disk)
        return function(*args, **kwargs)

    return call


def test_propose(disk: Path, sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = disk / "proposals"
    with monkeypatch.context() as patch:
        patch.setattr("aligndet.commands.propose.write_shard", fill_before_second(write_shard, disk))
        with pytest.raises(OSError, match=r"No space left on device: '.*part-00001\.parquet'"):
            propose(sample / "val", output=output, workers=1, shard_size=2)
    assert len(read_shard(output / "part-00000.parquet")) == 2
    assert not list(output.glob(".*.partial*"))
    (disk / "filler").unlink()
    propose(sample / "val", output=output, workers=1, shard_size=2)
    assert len(read_proposals(output)) == 4


def test_a_checkpoint(disk: Path) -> None:
    path = disk / "checkpoints" / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"step": 1, "weights": torch.ones(10)}, path)
    fill(disk)
    with pytest.raises(OSError, match=r"last\.ckpt") as caught:
        WholeCheckpointIO().save_checkpoint({"step": 2, "weights": torch.ones(1_000_000)}, path)
    assert caught.value.errno == errno.ENOSPC
    assert torch.load(path, weights_only=True)["step"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.slow
def test_pretrain(
    disk: Path,
    sample: Path,
    proposals: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = disk / "run"
    command = [
        *("pretrain", str(sample / "train"), f"--proposals={proposals}", f"--output={output}"),
        *("--trunk=resnet18", "--trunk-weights=none", "--fpn-channels=64", "--min-size=[64,96]"),
        *("--max-size=128", "--batch-size=2", "--steps=4", "--checkpoint-every=2", "--workers=0"),
        "--accelerator=cpu",
    ]
    with monkeypatch.context() as patch:
        save = WholeCheckpointIO.save_checkpoint
        patch.setattr(WholeCheckpointIO, "save_checkpoint", fill_before_second(save, disk))
        assert main(command) == 2
    assert re.search(r"No space left on device: '.*last\.ckpt'", capsys.readouterr().err)
    assert torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    (disk / "filler").unlink()
    assert main([*command, "--resume"]) == 0
    assert (output / "pretrained" / "model.safetensors").is_file()
