"""A run that is killed in the middle ends, resumed, in the same weights or proposals as one left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from aligndet.proposals.storage import read_proposals

SMALL = [
    *(
        "--trunk=resnet18",
        "--trunk-weights=none",
        "--fpn-channels=64",
        "--min-size=[64,96]",
        "--max-size=128",
    ),
    *(
        "--batch-size=2",
        "--steps=9",
        "--checkpoint-every=2",
        "--workers=1",
        "--warmup-steps=2",
        "--log-every=1",
        "--accelerator=cpu",
    ),
]
FEW_QUERIES = ["--options.num_queries=20", "--options.objectness=true"]


def start(*arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "aligndet", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # so that the kill reaches the loader's processes as well
    )


def finish(*arguments: str) -> None:
    process = start(*arguments)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors.decode()


def kill_when(ready: Callable[[], bool], *arguments: str) -> None:
    process = start(*arguments)
    for _ in range(2400):
        if ready() or process.poll() is not None:
            break
        time.sleep(0.05)
    assert process.poll() is None, "the run ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def assert_same_weights(left: Path, right: Path) -> None:
    ours, theirs = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("retinanet", "faster_rcnn", "mask_rcnn", "cascade_rcnn", "detr", "rt_detr_v2")
]


@pytest.mark.parametrize("detector", ["fcos", *SLOW])
def test_pretrain(detector: str, sample: Path, proposals: Path, tmp_path: Path) -> None:
    command = [
        "pretrain",
        str(sample / "train"),
        f"--proposals={proposals}",
        f"--detector={detector}",
        *(SMALL + FEW_QUERIES if "detr" in detector else SMALL),
    ]
    finish(*command, f"--output={tmp_path / 'whole'}")
    killed = tmp_path / "killed"
    kill_when((killed / "checkpoints" / "last.ckpt").is_file, *command, f"--output={killed}")
    assert not (killed / "pretrained").exists()
    finish(*command, f"--output={killed}", "--resume")
    assert_same_weights(tmp_path / "whole" / "pretrained", killed / "pretrained")


@pytest.mark.parametrize("method", ["simsiam", pytest.param("moco", marks=pytest.mark.slow)])
def test_pretrain_backbone(method: str, sample: Path, tmp_path: Path) -> None:
    command = [
        *("pretrain-backbone", str(sample / "train"), f"--method={method}", "--trunk=resnet18"),
        *("--crop-size=32", "--batch-size=4", "--queue=24", "--steps=25", "--checkpoint-every=5"),
        *(
            f"--workers={int(method == 'moco')}",
            "--accelerator=cpu",
            f"--labels={sample / 'train.json'}",
            "--validate-every=4",
        ),
    ]
    finish(*command, f"--output={tmp_path / 'whole'}")
    killed = tmp_path / "killed"
    kill_when((killed / "checkpoints" / "last.ckpt").is_file, *command, f"--output={killed}")
    assert not (killed / "trunk").exists()
    finish(*command, f"--output={killed}", "--resume")
    assert_same_weights(tmp_path / "whole" / "trunk", killed / "trunk")


def test_finetune(sample: Path, tmp_path: Path) -> None:
    command = ["finetune", str(sample / "train.json"), f"--val-annotations={sample / 'val.json'}", *SMALL]
    finish(*command, f"--output={tmp_path / 'whole'}")
    killed = tmp_path / "killed"
    kill_when((killed / "checkpoints" / "last.ckpt").is_file, *command, f"--output={killed}")
    assert not (killed / "model").exists()
    finish(*command, f"--output={killed}", "--resume")
    assert_same_weights(tmp_path / "whole" / "model", killed / "model")
    tables = sorted((killed / "logs").glob("csv*/metrics.csv"))
    assert len(tables) == 2  # what was logged before the kill is still there
    assert all(len(table.read_text().splitlines()) > 1 for table in tables)


def test_propose(sample: Path, tmp_path: Path) -> None:
    command = ["propose", str(sample / "train"), "--shard-size=2", "--workers=1"]
    finish(*command, f"--output={tmp_path / 'whole'}")
    killed = tmp_path / "killed"
    kill_when((killed / "part-00001.parquet").is_file, *command, f"--output={killed}")
    with pytest.raises(ValueError, match="not complete"):
        read_proposals(killed)
    finish(*command, f"--output={killed}")
    ours, theirs = read_proposals(tmp_path / "whole"), read_proposals(killed)
    assert ours.file_names == theirs.file_names
    np.testing.assert_array_equal(ours.boxes, theirs.boxes)
    np.testing.assert_array_equal(ours.offsets, theirs.offsets)


def random_kills(command: list[str], output: Path, seed: int, seconds: float, *resume: str) -> int:
    """Kills a run at random moments until it ends by itself; returns how often it was killed."""
    rng, kills = np.random.default_rng(seed), 0
    while True:
        process = start(*command, f"--output={output}", *(resume if (output / "run.json").is_file() else ()))
        try:
            # longer from time to time: a run has to get past its first checkpoint to get on at all
            _, errors = process.communicate(timeout=rng.uniform(0, seconds) * 1.5**kills)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, errors.decode()
        return kills


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["propose", "pretrain", "pretrain-backbone", "finetune", "compare"])
def test_random_moments(name: str, seed: int, sample: Path, proposals: Path, tmp_path: Path) -> None:
    images, labels = (
        str(sample / "train"),
        [str(sample / "train.json"), f"--val-annotations={sample / 'val.json'}"],
    )
    small = ["--batch_size=2", "--checkpoint_every=2", "--workers=0", "--warmup_steps=1", "--accelerator=cpu"]
    small += ["--min_size=[64,96]", "--max_size=128"]
    commands = {
        "propose": [images, "--shard-size=2", "--workers=1"],
        "pretrain": [images, f"--proposals={proposals}", *SMALL],
        "pretrain-backbone": [
            *(images, "--trunk=resnet18", "--crop-size=32", "--batch-size=4", "--steps=15"),
            *("--checkpoint-every=3", "--workers=0", "--accelerator=cpu"),
        ],
        "finetune": [*labels, *SMALL],
        "compare": [
            *(*labels, f"--proposals={proposals}", "--fractions=[1.0]", "--seeds=[0]", "--steps=[4]"),
            *("--trunk=resnet18", "--trunk-weights=none", "--fpn-channels=64", "--pretraining.steps=4"),
            *(
                option.replace("--", f"--{stage}.")
                for stage in ("pretraining", "finetuning")
                for option in small
            ),
        ],
    }
    command = [name, *commands[name]]
    begun = time.monotonic()
    finish(*command, f"--output={tmp_path / 'whole'}")
    resume = [] if name in ("propose", "compare") else ["--resume"]
    random_kills(command, tmp_path / "killed", seed, time.monotonic() - begun, *resume)
    whole = sorted((tmp_path / "whole").rglob("model.safetensors"))
    for path in whole:
        assert_same_weights(path.parent, tmp_path / "killed" / path.parent.relative_to(tmp_path / "whole"))
    if name == "propose":
        ours, theirs = read_proposals(tmp_path / "whole"), read_proposals(tmp_path / "killed")
        assert ours.file_names == theirs.file_names
        np.testing.assert_array_equal(ours.boxes, theirs.boxes)
    else:
        assert whole
