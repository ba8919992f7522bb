"""Two processes do what one does that takes their batches one after the other."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands.test_kill import FEW_QUERIES, finish

SMALL = [
    *(
        "--trunk=resnet18",
        "--trunk-weights=none",
        "--fpn-channels=64",
        "--min-size=[64,96]",
        "--max-size=128",
    ),
    *("--batch-size=2", "--steps=4", "--workers=0", "--warmup-steps=1", "--accelerator=cpu", "--log-every=1"),
]


def curve(run: Path) -> list[float]:
    with (run / "logs" / "csv" / "metrics.csv").open() as file:
        return [float(row["loss/total"]) for row in csv.DictReader(file) if row["loss/total"]]


@pytest.mark.parametrize(
    "detector",
    ["fcos", *(pytest.param(name, marks=pytest.mark.slow) for name in ("htc", "detr", "rt_detr_v2"))],
)
def test_two_processes(detector: str, sample: Path, proposals: Path, tmp_path: Path) -> None:
    command = [
        "pretrain",
        str(sample / "train"),
        f"--proposals={proposals}",
        f"--detector={detector}",
        *(SMALL + FEW_QUERIES if "detr" in detector else SMALL),
    ]
    # the contrast and the detector's normalisation are over a process's own boxes: what equals two processes
    # is two batches for one step of the optimizer, not one batch of twice the size
    finish(*command, f"--output={tmp_path / 'one'}", "--accumulate=2")
    finish(*command, f"--output={tmp_path / 'two'}", "--devices=2", "--strategy=ddp")
    one, two = (load_file(tmp_path / run / "pretrained" / "model.safetensors") for run in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
    assert len(curve(tmp_path / "two")) == 4


@pytest.mark.parametrize("method", ["simsiam", pytest.param("moco", marks=pytest.mark.slow)])
def test_two_processes_pretrain_a_trunk(method: str, sample: Path, tmp_path: Path) -> None:
    command = [
        *("pretrain-backbone", str(sample / "train"), f"--method={method}", "--trunk=resnet18"),
        *("--crop-size=32", "--batch-size=4", "--queue=32", "--steps=3", "--workers=0", "--log-every=1"),
        *("--accelerator=cpu", "--checkpoint-every=2", f"--labels={sample / 'train.json'}"),
    ]
    finish(*command, f"--output={tmp_path / 'two'}", "--devices=2", "--strategy=ddp")
    two = load_file(tmp_path / "two" / "trunk" / "model.safetensors")
    assert all(value.isfinite().all() for value in two.values())
    assert len(curve(tmp_path / "two")) == 3
    if (
        method == "simsiam"
    ):  # MoCo shuffles images between the processes, so its batch norms see other batches
        finish(*command, f"--output={tmp_path / 'one'}", "--accumulate=2")
        one = load_file(tmp_path / "one" / "trunk" / "model.safetensors")
        for name, value in one.items():
            if "running" not in name and "num_batches" not in name:  # one process counts twice the batches
                torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
