"""A run that is killed in the middle ends, resumed, in the same weights or proposals as one left alone."""

from __future__ import annotations

import csv
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file

from aligndet.cli import main
from aligndet.proposals.storage import read_proposals
from tests.data.test_sources import served

SMALL = [
    *("--trunk=resnet18", "--trunk-weights=none", "--fpn-channels=64", "--min-size=[64,96]"),
    *("--max-size=128", "--batch-size=2", "--steps=6", "--checkpoint-every=2", "--workers=1"),
    *("--warmup-steps=2", "--log-every=1", "--accelerator=cpu"),
]
FEW_QUERIES = ["--options.num_queries=20", "--options.objectness=true"]


def small(detector: str) -> list[str]:
    """Options of a detector that is trained in seconds."""
    own = ["--trunk=test_vit", "--options.group_detr=2"] if detector == "rf_detr" else []
    return [*SMALL, *(FEW_QUERIES if "detr" in detector else []), *own]


_FORKS = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def imports() -> None:
    """Puts imports behind the process that forks come from; one that there is has others behind it."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    _FORKS.set_forkserver_preload([__name__, "aligndet.commands.propose", "aligndet.commands.compare"])
    forkserver.ensure_running()


def run_command(arguments: list[str], errors: Path, environment: dict[str, str]) -> None:
    """What a fork does: a command, in a group of processes of its own, so that a kill reaches all of them."""
    os.setsid()
    os.environ.update(environment)
    # read when Lightning is imported
    rank_zero_only.rank = int(environment.get("RANK", 0))  # type: ignore[attr-defined]
    with errors.open("w") as file, Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        sys.exit(main(arguments))


def fork(command: list[str], output: Path, **environment: str) -> BaseProcess:
    """Starts a command that has its imports behind it; many runs are short work then."""
    rank = environment.get("RANK", "")  # of processes that share an output
    errors = output.with_suffix(f".errors{rank}")
    arguments = [*command, f"--output={output}"]
    process = _FORKS.Process(target=run_command, args=(arguments, errors, environment))
    process.start()
    return process


def assert_succeeded(process: BaseProcess, output: Path, rank: str = "") -> None:
    assert process.exitcode == 0, output.with_suffix(f".errors{rank}").read_text()


def finish_fork(command: list[str], output: Path) -> None:
    process = fork(command, output)
    process.join(240)
    end(process)
    assert_succeeded(process, output)


def end(process: BaseProcess) -> None:
    """One that is still there would be waited for at the end of all tests."""
    if process.is_alive():
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()


def kill_when(ready: Callable[[], bool], command: list[str], output: Path) -> None:
    process = fork(command, output)
    for _ in range(2400):
        if ready() or not process.is_alive():
            break
        time.sleep(0.05)
    assert process.exitcode is None, "the run ended before it could be killed"
    end(process)
    assert ready(), "the run took too long to get where it is killed"


def assert_same_weights(left: Path, right: Path) -> None:
    ours, theirs = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def assert_went_on(run: Path) -> None:
    """A run that starts anew ends in the same weights as well."""
    first, second = sorted((run / "logs").glob("csv*/metrics.csv"))  # what was logged before is still there
    done = int(second.parent.name.removeprefix("csv_from_"))
    assert done > 0
    tables = (csv.DictReader(table.read_text().splitlines()) for table in (first, second))
    steps = [[int(row["step"]) for row in table] for table in tables]
    assert steps[0]
    assert min(steps[1]) >= done


def assert_resumes(command: list[str], folder: Path, result: str) -> None:
    """A run that is killed after a checkpoint and goes on ends in the weights of one that was left alone."""
    whole, killed = folder / "whole", folder / "killed"
    finish_fork(command, whole)
    kill_when((killed / "checkpoints" / "last.ckpt").is_file, command, killed)
    assert not (killed / result).exists()
    finish_fork([*command, "--resume"], killed)
    assert_same_weights(whole / result, killed / result)
    assert_went_on(killed)


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("retinanet", "faster_rcnn", "mask_rcnn", "cascade_rcnn", "detr", "rt_detr_v2", "rf_detr")
]


@pytest.mark.usefixtures("imports")
@pytest.mark.parametrize("detector", ["fcos", *SLOW])
def test_pretrain(detector: str, sample: Path, proposals: Path, tmp_path: Path) -> None:
    command = [
        "pretrain",
        str(sample / "train"),
        f"--proposals={proposals}",
        f"--detector={detector}",
        *small(detector),
        *("--batch-size=1", "--accumulate=2"),
    ]
    assert_resumes(command, tmp_path, "pretrained")


@pytest.mark.slow
@pytest.mark.usefixtures("imports")
def test_pretrain_on_images_of_a_web_server(sample: Path, proposals: Path, tmp_path: Path) -> None:
    with served(sample) as address:
        command = ["pretrain", f"{address}/train", f"--proposals={proposals}", *SMALL]
        assert_resumes(command, tmp_path, "pretrained")


@pytest.mark.usefixtures("imports")
@pytest.mark.slow
@pytest.mark.parametrize("method", ["simsiam", "moco"])
def test_pretrain_backbone(method: str, sample: Path, tmp_path: Path) -> None:
    command = [
        *("pretrain-backbone", str(sample / "train"), f"--method={method}", "--trunk=resnet18"),
        *("--crop-size=32", "--batch-size=4", "--queue=24", "--steps=25", "--checkpoint-every=5"),
        *(f"--workers={int(method == 'moco')}", "--accelerator=cpu"),
        *(f"--labels={sample / 'train.json'}", "--validate-every=4"),
    ]
    assert_resumes(command, tmp_path, "trunk")


@pytest.mark.usefixtures("imports")
def test_finetune(sample: Path, tmp_path: Path) -> None:
    command = ["finetune", str(sample / "train.json"), f"--val-annotations={sample / 'val.json'}", *SMALL]
    command += ["--channels-last=true", "--ema=0.9"]  # checkpoints keep the format, and the average
    command += ["--workers=0", "--validate-every=3"]
    assert_resumes(command, tmp_path, "model")


@pytest.mark.usefixtures("imports")
def test_propose(sample: Path, tmp_path: Path) -> None:
    command = ["propose", str(sample / "train"), "--shard-size=2", "--workers=1"]
    finish_fork(command, tmp_path / "whole")
    killed = tmp_path / "killed"
    kill_when((killed / "part-00001.parquet").is_file, command, killed)
    with pytest.raises(ValueError, match="not complete"):
        read_proposals(killed)
    finished = {path.name: path.stat().st_mtime_ns for path in killed.glob("part-*.parquet")}
    finish_fork(command, killed)
    assert {name: (killed / name).stat().st_mtime_ns for name in finished} == finished
    ours, theirs = read_proposals(tmp_path / "whole"), read_proposals(killed)
    assert ours.file_names == theirs.file_names
    np.testing.assert_array_equal(ours.boxes, theirs.boxes)
    np.testing.assert_array_equal(ours.offsets, theirs.offsets)


class Whole(NamedTuple):
    """A command that was left alone."""

    name: str
    command: list[str]
    output: Path
    seconds: float  # from its first file to its end


@pytest.fixture(scope="module", params=["propose", "pretrain", "pretrain-backbone", "finetune", "compare"])
def whole(
    request: pytest.FixtureRequest,
    imports: None,
    sample: Path,
    proposals: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Whole:
    images = str(sample / "train")
    labels = [str(sample / "train.json"), f"--val-annotations={sample / 'val.json'}"]
    small = ["--batch_size=2", "--checkpoint_every=2", "--workers=0", "--warmup_steps=1", "--accelerator=cpu"]
    small += ["--min_size=[64,96]", "--max_size=128"]
    commands = {
        "propose": [images, "--shard-size=2", "--workers=1"],
        # loader processes are killed above; here they would double the time
        "pretrain": [images, f"--proposals={proposals}", *SMALL, "--workers=0"],
        "pretrain-backbone": [
            *(images, "--trunk=resnet18", "--crop-size=32", "--batch-size=4", "--steps=15"),
            *("--checkpoint-every=3", "--workers=0", "--accelerator=cpu"),
        ],
        "finetune": [*labels, *SMALL, "--workers=0"],
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
    output = tmp_path_factory.mktemp("whole") / request.param
    command = [request.param, *commands[request.param]]
    process = fork(command, output)
    begun = at_work(process, output)
    process.join(240)
    assert_succeeded(process, output)
    return Whole(request.param, command, output, time.monotonic() - begun)


def newest(folder: Path) -> tuple[float, Path]:
    """Where a run was: when it last touched a file, and which; or the folder, if there is none."""
    touched = [(0.0, folder)]
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # one that has just got its name
            touched.append((path.stat().st_mtime, path))
    return max(touched)


def at_work(process: BaseProcess, output: Path) -> float:
    """Waits until a process touches its output, or ends; returns the time."""
    begun = time.time()
    while process.is_alive() and newest(output)[0] <= begun:
        time.sleep(0.02)
    return time.monotonic()


def random_kills(whole: Whole, output: Path, seed: int) -> int:
    """Kills a run at random moments until it ends by itself; returns how often it was killed."""
    rng, kills = np.random.default_rng(seed), 0
    while True:
        resumes = whole.name not in ("propose", "compare") and (output / "run.json").is_file()
        process = fork([*whole.command, *(["--resume"] if resumes else [])], output)
        at_work(process, output)
        # later from time to time, since a run has to get past its first checkpoint to get on at all
        seconds = rng.uniform(0, 0.8 * whole.seconds) * 1.5**kills
        process.join(seconds)
        if not process.is_alive():
            assert_succeeded(process, output)
            print(f"{whole.name}, seed {seed}: ended by itself after {kills} kills")
            return kills
        place = newest(output)[1].relative_to(output)
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        kills += 1
        print(f"{whole.name}, seed {seed}: killed after {seconds:.1f} s at {place}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_moments(whole: Whole, seed: int, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    assert random_kills(whole, killed, seed)
    files = sorted(whole.output.rglob("model.safetensors"))
    for path in files:
        assert_same_weights(path.parent, killed / path.parent.relative_to(whole.output))
    if whole.name == "propose":
        ours, theirs = read_proposals(whole.output), read_proposals(killed)
        assert ours.file_names == theirs.file_names
        np.testing.assert_array_equal(ours.boxes, theirs.boxes)
    else:
        assert files
    if whole.name == "compare":
        for name in ("table.md", "results.csv"):
            assert (killed / name).read_bytes() == (whole.output / name).read_bytes()
