"""Runs whose processes do not belong together are refused before anything is written."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer

from aligndet import cli
from aligndet.launch import SameStart, check_launch, environment, leave_as_usual, leave_at_once

SLURM = {"NTASKS": "2", "NTASKS_PER_NODE": "1", "NNODES": "2", "PROCID": "0", "NODEID": "0", "LOCALID": "0"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "run", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


@pytest.fixture
def started_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As srun and torchrun tell it to a process: the first of two, each on a machine of its own."""
    variables = {f"SLURM_{k}": v for k, v in SLURM.items()} if request.param == "Slurm" else TORCHRUN
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return str(request.param)


both = pytest.mark.parametrize("started_by", ["Slurm", "torchrun"], indirect=True)


@both
@pytest.mark.parametrize("asked", [[], ["--nodes=2", "--devices=2"]])
@pytest.mark.parametrize("command", ["pretrain", "finetune", "pretrain-backbone"])
def test_as_many_processes_as_devices(
    command: str, asked: list[str], started_by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proposals = ["--proposals=none"] if command == "pretrain" else []
    code = cli.main([command, "nothing", *proposals, f"--output={tmp_path / 'run'}", *asked])
    assert code == 2
    message = capsys.readouterr().err
    assert f"{started_by} has started 2" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


@both
def test_lightning_takes_the_environment(started_by: str, tmp_path: Path) -> None:
    plugin = environment()
    assert plugin is not None
    trainer = Trainer(
        devices=1, num_nodes=2, accelerator="cpu", plugins=[plugin], logger=False, default_root_dir=tmp_path
    )
    kind = SLURMEnvironment if started_by == "Slurm" else TorchElasticEnvironment
    assert type(trainer.strategy.cluster_environment) is kind  # type: ignore[attr-defined]
    assert trainer.world_size == 2
    assert not getattr(plugin, "auto_requeue", False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--nodes=2"], "--nodes 2: start the command on each machine with torchrun"),
        (
            ["--strategy=ddp_spawn"],
            "--strategy ddp_spawn: copies of this process would all see the same images",
        ),
        (["--strategy=deepspeed"], "--strategy deepspeed: there are auto, ddp and fsdp"),
        (["--strategy=fsdp", "--channels-last"], "fsdp splits parameters, which --channels-last needs whole"),
        (["--strategy=fsdp", "--compile"], "fsdp splits parameters, which --compile needs whole"),
    ],
)
def test_what_cannot_run(
    settings: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pretrain", "nothing", "--proposals=none", f"--output={tmp_path / 'run'}", *settings]
    assert cli.main(command) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_an_interactive_session_has_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    check_launch(1, 1, "auto")
    with pytest.raises(ValueError, match="devices=2: each needs a process of its own"):
        check_launch(2, 1, "auto")


@pytest.mark.parametrize(
    ("theirs", "message"),
    [((4, "12 images"), "different steps \\[0, 4\\]"), ((0, "9 images"), "same data, .* has 12 images")],
)
def test_processes_start_alike(theirs: tuple[int, str], message: str) -> None:
    def trainer(step: int, data: str) -> Any:
        def gather(own: torch.Tensor) -> torch.Tensor:
            return torch.stack([own, torch.tensor([step, crc32(data.encode())])])

        return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu"), all_gather=gather))

    start = SameStart(Path("run"), step=0, data="12 images")
    start.setup(trainer(0, "12 images"), None, "fit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        start.setup(trainer(*theirs), None, "fit")  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_a_process_that_fails_on_gpus_takes_no_leave(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[Any] = []
    monkeypatch.setattr("atexit.register", lambda *call: registered.append(call))
    leave_at_once(2)
    assert not registered  # one process
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: backend)
    leave_at_once(2)
    if backend == "gloo":
        assert not registered
        return
    ((leave, status),) = registered
    monkeypatch.setattr("os._exit", lambda status: registered.append(status))
    leave(status)
    assert registered[1] == 2
    monkeypatch.setattr("atexit.unregister", lambda leave: registered.remove((leave, 2)))
    leave_as_usual()
    assert registered == [2]
