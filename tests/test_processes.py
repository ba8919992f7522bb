"""Two processes do what one does that takes their batches one after the other."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

from aligndet.boxes import BACKGROUND, BoxPredictions
from aligndet.data.coco import Category
from aligndet.data.images import read_image_size
from aligndet.data.splits import with_images
from aligndet.evaluation.coco import CocoEvaluator, CocoResult
from aligndet.losses import box_contrastive_loss
from aligndet.processes import all_gather_items, all_reduce_mean, gather_other_boxes
from aligndet.reporting.runs import read_curves
from aligndet.sharding import shard
from tests.commands.test_kill import (
    FEW_QUERIES,
    assert_same_weights,
    assert_succeeded,
    end,
    finish_fork,
    fork,
    imports,
    small,
)
from tests.commands.test_kill import SMALL as KILL_SMALL

__all__ = ["imports"]  # a fixture

SHORT = ["--steps=4", "--workers=0", "--warmup-steps=1"]
SMALL = [*KILL_SMALL, *SHORT]


def start(*arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "aligndet", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # so that the kill reaches the loader's processes as well
    )


def kill_after_checkpoint(process: subprocess.Popen[bytes], output: Path) -> None:
    kept = output / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 240
    while not kept.is_file() and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert kept.is_file()


def finish(*arguments: str) -> None:
    process = start(*arguments)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors.decode()


def two_forks(command: list[str], output: Path, strategy: str = "ddp") -> None:
    """As torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both |= {"TORCHELASTIC_RUN_ID": "two", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    command = [*command, "--devices=2", f"--strategy={strategy}"]
    processes = {rank: fork(command, output, **both, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")}
    try:
        for rank, process in processes.items():
            process.join(240)
            assert_succeeded(process, output, rank)
    finally:  # one waits for the other
        for process in processes.values():
            end(process)


def curve(run: Path) -> list[float]:
    return list(read_curves(run / "logs")["loss/total"].values())


@pytest.fixture(scope="session")
def two_boxes(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Proposals: the left and the right of each image, so that all processes have the same number."""
    images: list[dict[str, Any]] = [
        {"id": i, "file_name": p.name} for i, p in enumerate(sorted((sample / "train").iterdir()))
    ]
    for image in images:
        image["width"], image["height"] = read_image_size(sample / "train" / str(image["file_name"]))
    places = [(image["id"], left) for image in images for left in (8, 72)]
    boxes = [
        {
            "id": i,
            "image_id": image,
            "category_id": 1,
            "bbox": [left, 30, 48, 60],
            "area": 48 * 60,
            "iscrowd": 0,
        }
        for i, (image, left) in enumerate(places)
    ]
    path = tmp_path_factory.mktemp("two") / "boxes.json"
    path.write_text(
        json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "box"}]})
    )
    return path


def parts() -> list[tuple[BoxPredictions, BoxPredictions]]:
    """Both views of two processes: of each, three proposals are in both views; numbers of boxes differ."""
    generator = torch.Generator().manual_seed(0)

    def view(ids: list[int]) -> BoxPredictions:
        return BoxPredictions(torch.randn(len(ids), 16, generator=generator), torch.tensor(ids))

    first = view([0, 0, 1, 2, 2, BACKGROUND, 3]), view([0, 1, 1, 2, BACKGROUND])
    return [first, (view([0, 1, 2, 2]), view([2, 1, 0, BACKGROUND, BACKGROUND, 0, 1, 1]))]


def evaluated(images: range) -> CocoResult:
    """The figures of these images out of five; all scores are the same, so that their order counts."""
    evaluator = CocoEvaluator([Category(1, "a"), Category(2, "b")], masks=True)
    for image in images:
        generator = torch.Generator().manual_seed(image)
        boxes = torch.rand(6, 2, generator=generator) * 40
        boxes = torch.cat([boxes, boxes + 12], 1)
        labels = torch.randint(1, 3, (6,), generator=generator)
        masks = torch.zeros(6, 64, 64, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.long(), strict=True):
            mask[top:bottom, left:right] = True
        target = {"boxes": boxes, "labels": labels, "masks": masks}
        found = {
            **target,
            "boxes": boxes + 2 * torch.rand(6, 1, generator=generator),
            "scores": torch.ones(6),
        }
        found["labels"] = labels.where(torch.rand(6, generator=generator) > 0.3, torch.tensor(1))
        evaluator.update([found], [target])
    return evaluator.compute()


def part_of(layer: nn.Linear) -> torch.Size:
    shard(layer, init_device_mesh("cpu", (2,)))
    weight: Any = layer.weight
    return torch.Size(weight.to_local().shape)


def in_a_process(rank: int, folder: Path) -> None:
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    online, momentum = parts()[rank]
    online.embeddings.requires_grad_()
    elsewhere = gather_other_boxes(online, momentum)
    loss = box_contrastive_loss(online, momentum, 0.5, elsewhere)
    loss.backward()
    half = BoxPredictions(online.embeddings[: 3 * rank].detach().bfloat16(), online.proposal_ids[: 3 * rank])
    found = {
        "loss": loss.detach(),
        "gradient": online.embeddings.grad,
        "elsewhere": elsewhere.embeddings,
        "ids": elsewhere.proposal_ids,
        "from_one_without": gather_other_boxes(half).embeddings,
        "mean": all_reduce_mean(torch.tensor(1.0 + 2 * rank)),
        "items": all_gather_items([[0, 2, 4], [1]][rank]),
        "figures": evaluated(range(rank, 5, 2)).to_dict(),
        "part": part_of(nn.Linear(10, 3)),
    }
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_gathered_keys_and_images_are_those_of_one_process(tmp_path: Path) -> None:
    spawn(in_a_process, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = [
        BoxPredictions(
            torch.cat([a.embeddings, b.embeddings]),
            torch.cat(
                [a.proposal_ids, torch.where(b.proposal_ids == BACKGROUND, BACKGROUND, b.proposal_ids + 4)]
            ),
        )
        for a, b in zip(*parts(), strict=True)
    ]
    whole[0].embeddings.requires_grad_()
    loss = box_contrastive_loss(whole[0], whole[1])
    loss.backward()
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, loss.detach())
    torch.testing.assert_close(
        torch.cat([first["gradient"], second["gradient"]]) / 2, whole[0].embeddings.grad
    )
    alone = [box_contrastive_loss(*views) for views in parts()]
    assert torch.stack(alone).mean() < loss - 0.1  # fewer negatives
    for found, (online, momentum) in zip((second, first), parts(), strict=True):
        assert torch.equal(found["elsewhere"], torch.cat([online.embeddings, momentum.embeddings]))
        assert (found["ids"] == BACKGROUND).all()
        assert found["mean"] == 2
    assert first["from_one_without"].shape == (3, 16)
    assert second["from_one_without"].shape == (0, 16)

    for found in (first, second):
        assert found["items"] == [0, 1, 2, 4]
        assert found["figures"] == evaluated(range(5)).to_dict()
    assert (first["part"], second["part"]) == ((2, 10), (1, 10))
    assert found["figures"]["images"] == 5
    assert 0.1 < found["figures"]["AP"] < 0.9


def test_one_process_has_no_boxes_elsewhere() -> None:
    assert gather_other_boxes(*parts()[0]).embeddings.shape == (0, 16)
    assert all_reduce_mean(torch.tensor(3.0)) == 3


@pytest.mark.slow
def test_two_processes_gather_keys(sample: Path, two_boxes: Path, tmp_path: Path) -> None:
    """One process with the whole batch computes the same, since all have the same number of proposals."""
    command = ["pretrain", str(sample / "train"), f"--proposals={two_boxes}", *SMALL, "--box-weight=0"]
    command += ["--min-size=[96,96]"]  # views of one size: padding would be background of the larger batch
    several = [*command, "--devices=2", "--strategy=ddp"]
    finish(*command, f"--output={tmp_path / 'one'}", "--batch-size=4")
    finish(*several, f"--output={tmp_path / 'two'}", "--gather-keys")
    finish(*several, f"--output={tmp_path / 'alone'}")
    one, two, alone = (
        load_file(tmp_path / run / "pretrained" / "model.safetensors") for run in ("one", "two", "alone")
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-4)
    assert curve(tmp_path / "alone") != pytest.approx(curve(tmp_path / "one"), rel=1e-2)
    assert any(not torch.allclose(alone[name], value, rtol=1e-3, atol=1e-5) for name, value in one.items())

    gathering = [*several, "--gather-keys", "--steps=9", "--checkpoint-every=2"]
    killed = tmp_path / "killed"
    finish(*gathering, f"--output={tmp_path / 'whole'}")
    kill_after_checkpoint(start(*gathering, f"--output={killed}"), killed)
    assert not (killed / "pretrained").exists()
    finish(*gathering, f"--output={killed}", "--resume")
    assert_same_weights(tmp_path / "whole" / "pretrained", killed / "pretrained")


@pytest.mark.slow
def test_two_processes_are_terminated_together(sample: Path, two_boxes: Path, tmp_path: Path) -> None:
    command = ["pretrain", str(sample / "train"), f"--proposals={two_boxes}", *SMALL, "--steps=5000"]
    several = [*command, "--devices=2", "--strategy=ddp", "--checkpoint-every=3"]
    process = start(*several, f"--output={tmp_path / 'run'}")
    kept = tmp_path / "run" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 240
    while not kept.is_file() and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be terminated"
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    deadline = time.monotonic() + 30
    with suppress(ProcessLookupError):  # none is left of the group
        while True:
            os.killpg(process.pid, 0)
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.slow
def test_two_processes_of_queries_are_one_with_the_whole_batch(
    sample: Path, proposals: Path, tmp_path: Path
) -> None:
    """Deformable DETR divides all its losses by the number of boxes: the mean over all processes."""
    command = [
        *("pretrain", str(sample / "train"), f"--proposals={proposals}", "--detector=deformable_detr"),
        *(*SMALL, *FEW_QUERIES, "--min-size=[96,96]", "--contrast-weight=0", "--options.dropout=0.0"),
        *("--options.encoder_layers=1", "--options.decoder_layers=2", "--learning-rate=1e-3"),
    ]
    finish(*command, f"--output={tmp_path / 'one'}", "--batch-size=4")
    finish(*command, f"--output={tmp_path / 'two'}", "--devices=2", "--strategy=ddp")
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-3)


@pytest.mark.usefixtures("imports")
@pytest.mark.parametrize(
    "detector",
    [
        "fcos",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("htc", "detr", "rt_detr_v2", "rf_detr")),
    ],
)
def test_two_processes(detector: str, sample: Path, proposals: Path, two_boxes: Path, tmp_path: Path) -> None:
    # query-based detectors normalise over all processes, so the numbers of boxes have to be the same
    chosen = two_boxes if "detr" in detector else proposals
    command = [
        "pretrain",
        str(sample / "train"),
        f"--proposals={chosen}",
        f"--detector={detector}",
        *small(detector),
        *SHORT,
    ]
    # the contrast and the detector's normalisation are over a process's own boxes: what equals two processes
    # is two batches for one step of the optimizer, not one batch of twice the size
    finish_fork([*command, "--accumulate=2"], tmp_path / "one")
    two_forks(command, tmp_path / "two")
    one, two = (load_file(tmp_path / run / "pretrained" / "model.safetensors") for run in ("one", "two"))
    for name, value in one.items():
        # what a batch norm remembers is, without GPUs, of the first process's batches
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
    assert len(curve(tmp_path / "two")) == 4


@pytest.mark.usefixtures("imports")
def test_two_processes_that_split_the_detector(sample: Path, proposals: Path, tmp_path: Path) -> None:
    command = ["pretrain", str(sample / "train"), f"--proposals={proposals}", *SMALL]
    command += ["--detector=fcos", "--trunk=convnext_atto", "--steps=2"]  # has no norms that are folded
    for strategy in ("ddp", "fsdp"):
        two_forks(command, tmp_path / strategy, strategy)
    assert_same_weights(tmp_path / "ddp" / "pretrained", tmp_path / "fsdp" / "pretrained")


@pytest.mark.slow
@pytest.mark.parametrize("second", ["fsdp", "ddp"])
def test_a_split_detector_goes_on(second: str, sample: Path, tmp_path: Path) -> None:
    """Also with different numbers of batches to validate on."""
    document, three = json.loads((sample / "val.json").read_text()), tmp_path / "three.json"
    three.write_text(json.dumps(with_images(document, document["images"][:3])))
    command = ["finetune", str(sample / "train.json"), *SMALL, "--batch-size=1", f"--val-annotations={three}"]
    command += [f"--val-images={sample / 'val'}"]
    command += ["--detector=faster_rcnn", "--validate-every=4", "--steps=8", "--checkpoint-every=2"]
    several = [*command, "--devices=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(*several, f"--output={whole}", "--strategy=fsdp")
    process = start(*several, f"--output={killed}", "--strategy=fsdp")
    kill_after_checkpoint(process, killed)
    finish(*several, f"--output={killed}", f"--strategy={second}", "--resume")
    if second == "fsdp":
        assert_same_weights(whole / "model", killed / "model")
    else:  # gradients are clipped by their norm, which is added up in another order
        ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (whole, killed))
        for name, value in ours.items():
            assert (theirs[name] - value).float().norm() <= 1e-2 * value.float().norm(), name


@pytest.mark.slow
def test_two_processes_validate_every_image_once(sample: Path, tmp_path: Path) -> None:
    command = ["finetune", str(sample / "train.json"), *SMALL, f"--val-annotations={sample / 'val.json'}"]
    command += ["--detector=fcos", "--validate-every=2"]
    finish(*command, f"--output={tmp_path / 'one'}", "--accumulate=2")
    finish(*command, f"--output={tmp_path / 'two'}", "--devices=2", "--strategy=ddp")
    one, two = (read_curves(tmp_path / run / "logs") for run in ("one", "two"))
    assert list(two["val/images"].values()) == [float(len(list((sample / "val").iterdir())))] * 2
    assert one.keys() == two.keys()
    for name in (name for name in two if name.startswith("val/")):
        assert one[name] == pytest.approx(two[name], abs=2e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simsiam", "moco"])
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
