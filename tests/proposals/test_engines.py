"""Work on processes and on a Ray cluster is the same work."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psutil
import pytest

from aligndet.commands import propose as command
from aligndet.commands.cluster import cluster as group_proposals
from aligndet.commands.propose import propose
from aligndet.commands.sample_data import sample_data
from aligndet.data.sources import ImageSource
from aligndet.proposals import engines
from aligndet.proposals.clusters import with_clusters
from aligndet.proposals.engines import Engine, run
from aligndet.proposals.pipeline import propose_image
from aligndet.proposals.storage import read_proposals, write_shard


def odd(number: int) -> int:
    if number % 2 == 0:
        raise ValueError(f"{number} is even")
    return number


def slowly(number: int) -> tuple[int, str]:
    time.sleep(0.5)
    return number, os.environ["RAY_RAYLET_PID"]  # of the node


def test_processes_keep_the_order_and_raise_what_the_work_raises() -> None:
    numbers = [*range(1, 33, 2), 40]
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in numbers:
            taken.append(number)
            yield number

    with closing(run(odd, items(), workers=1)) as results:
        assert not taken  # nothing starts before it has to
        assert [next(results) for _ in range(16)] == numbers[:-1]
        with pytest.raises(ValueError, match="40 is even"):
            next(results)


def killed(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_process_ends_the_work_with_a_word() -> None:
    results = run(killed, range(40), workers=2)
    with pytest.raises(ChildProcessError, match=r"a worker process was killed, .* fewer --workers"):
        list(results)


def killed_once(path: Path) -> str:
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return path.name


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ends the processes that are started beside this one, as if it were Ray's."""
    pools = []

    def start(*settings: Any) -> Any:
        pools.append(ProcessPoolExecutor(*settings))
        return pools[-1]

    monkeypatch.setattr(engines, "ProcessPoolExecutor", start)
    yield
    engines._beside.cache_clear()
    for pool in pools:
        pool.shutdown()


@pytest.mark.usefixtures("beside")
def test_what_kills_the_process_beside_rays_is_done_once_more(tmp_path: Path) -> None:
    piece = {"item": pickle.dumps([tmp_path / "a"])}
    assert pickle.loads(engines._Piece(killed_once)(piece)["item"]) == [("a", None)]
    ((nothing, error),) = pickle.loads(engines._Piece(killed)({"item": pickle.dumps([3])})["item"])
    assert nothing is None
    assert isinstance(error, ChildProcessError)
    assert "killed twice" in str(error)


class Unknown:
    def __reduce__(self) -> Any:
        return import_module, ("no_such_package",)


@pytest.mark.usefixtures("beside")
def test_a_machine_that_lacks_a_package_says_so() -> None:
    work = partial(lambda_free, Unknown())
    ((_, error),) = pickle.loads(engines._Piece(work)({"item": pickle.dumps([1])})["item"])
    assert isinstance(error, ModuleNotFoundError)


def lambda_free(_: Any, number: int) -> int:
    return number


def gpus(number: int) -> tuple[int, str | None]:
    return number, os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.usefixtures("beside")
def test_a_worker_of_ray_can_be_given_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    piece = engines._Piece(gpus)
    for given in ("0", "1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        found = pickle.loads(piece({"item": pickle.dumps([1, 2])})["item"])
        assert found == [((1, given), None), ((2, given), None)]


def sleeping(path: Path) -> None:
    path.touch()
    time.sleep(600)


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    paths = [str(tmp_path / str(number)) for number in range(9)]
    code = "from tests.proposals.test_engines import *; "
    code += f"list(run(sleeping, map(Path, {paths}), workers=2))"
    first = psutil.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 240
    while len(list(tmp_path.iterdir())) < 2:  # both have begun
        assert first.is_running()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = first.children(recursive=True)
    assert len(workers) >= 3  # the one they are copies of, and two
    first.kill()
    first.wait()
    assert not psutil.wait_procs(workers, timeout=30)[1]


def test_a_missing_engine_is_named(monkeypatch: pytest.MonkeyPatch, sample: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "pandas" else find_spec("os"))
    with pytest.raises(ImportError, match=r'pip install "aligndet\[ray\]"'):
        propose(sample / "train", output=tmp_path / "out", engine="ray")
    with pytest.raises(ValueError, match="--ray-address head:6379 is for --engine ray, not for processes"):
        propose(sample / "train", output=tmp_path / "out", ray_address="head:6379")
    assert not (tmp_path / "out").exists()


def test_images_that_a_machine_does_not_have_are_no_broken_ones(tmp_path: Path) -> None:
    find = partial(propose_image, mode="fast", resolution=None, rank="search", filters={}, outlines=None)
    with pytest.raises(ValueError, match="elsewhere: no such folder of images on "):
        find(ImageSource(tmp_path / "elsewhere"), "image.jpg")


# From here on: a cluster of two nodes, with a core each.

SHARD = 4


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 images, and one that is broken."""
    data = sample_data(tmp_path_factory.mktemp("many") / "data", train_images=23, val_images=1, size=80)
    (data / "train" / "00003b.jpg").write_bytes(b"\xff\xd8\xff")
    return data / "train"


@pytest.fixture(scope="module")
def expected(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What processes write."""
    output = tmp_path_factory.mktemp("expected") / "out"
    propose(images, output=output, workers=1, shard_size=SHARD, masks=True)
    return written(output)


def written(output: Path) -> dict[str, bytes]:
    assert not list(output.glob(".*.partial*"))
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.name != ".lock"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    pytest.importorskip("ray.data")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args=node)
    yield started
    started.shutdown()


@pytest.fixture
def second(cluster: Any) -> Iterator[Any]:
    node = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()
    yield node
    if node in cluster.worker_nodes:
        cluster.remove_node(node)


@pytest.mark.slow
def test_a_cluster_writes_what_processes_write(
    cluster: Any, second: Any, images: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    arguments = [str(images), "--output=out", "--masks", f"--shard-size={SHARD}", "--engine=ray"]
    process = subprocess.run(
        [sys.executable, "-m", "aligndet", "propose", *arguments],
        env={**os.environ, "RAY_ADDRESS": cluster.address},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert written(tmp_path / "out") == expected
    lines = process.stdout.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("23 images, ")
    assert lines[1].startswith(f"skipped: {images / '00003b.jpg'}: ")
    assert lines[2:] == ["1 images skipped", "proposals: out"]
    progress = [line for line in process.stderr.replace("\r", "\n").splitlines() if line]
    assert [line for line in progress if not line.startswith("propose:")] == []


@pytest.mark.slow
def test_a_node_that_fails_midway_loses_and_doubles_nothing(cluster: Any, second: Any) -> None:
    failing = str(second.all_processes["raylet"][0].process.pid)
    seen = []
    with closing(run(slowly, range(40), engine="ray", address=cluster.address)) as results:
        for number, node in results:
            seen.append(node)
            assert number == len(seen) - 1
            if number == 15:
                assert failing in seen
                cluster.remove_node(second, allow_graceful=False)
    assert len(seen) == 40
    assert failing not in seen[-10:]


@pytest.mark.slow
def test_proposals_of_a_cluster_that_loses_a_node(
    cluster: Any,
    second: Any,
    images: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrote: list[Path] = []

    def write_and_remove(path: Path, rows: Any) -> None:
        write_shard(path, rows)
        wrote.append(path)
        if len(wrote) == 1:
            cluster.remove_node(second, allow_graceful=False)

    monkeypatch.setattr(command, "write_shard", write_and_remove)
    options: dict[str, Any] = {"shard_size": SHARD, "masks": True, "ray_address": cluster.address}
    propose(images, output=tmp_path / "out", engine="ray", **options)
    assert written(tmp_path / "out") == expected


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("ray", "processes"), ("processes", "ray")])
def test_one_engine_continues_what_the_other_has_begun(
    before: Engine,
    after: Engine,
    cluster: Any,
    images: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrote: list[Path] = []

    def write_and_stop(path: Path, rows: Any) -> None:
        if len(wrote) == 2:
            raise KeyboardInterrupt
        write_shard(path, rows)
        wrote.append(path)

    def go(engine: Engine) -> None:
        address = cluster.address if engine == "ray" else None
        options: dict[str, Any] = {"shard_size": SHARD, "masks": True, "workers": 1}
        propose(images, output=tmp_path / "out", engine=engine, ray_address=address, **options)

    monkeypatch.setattr(command, "write_shard", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        go(before)
    monkeypatch.setattr(command, "write_shard", write_shard)
    times = [path.stat().st_mtime_ns for path in wrote]
    go(after)
    assert [path.stat().st_mtime_ns for path in wrote] == times
    assert written(tmp_path / "out") == expected


@pytest.mark.slow
def test_errors_of_a_cluster_are_those_of_the_work(cluster: Any, images: Path, tmp_path: Path) -> None:
    with (
        closing(run(odd, [1, 3, 4], engine="ray", address=cluster.address)) as results,
        pytest.raises(ValueError, match=r"^4 is even$"),
    ):
        list(results)
    with pytest.raises(ValueError, match=r"00003b\.jpg: is no image"):
        propose(images, output=tmp_path / "out", engine="ray", ray_address=cluster.address, strict=True)


@pytest.mark.slow
def test_a_cluster_reads_tars_at_an_address(cluster: Any, second: Any, images: Path, tmp_path: Path) -> None:
    place = tmp_path / "shards"
    place.mkdir()
    for number in range(2):
        with tarfile.open(place / f"{number}.tar", "w") as tar:
            for path in sorted(images.iterdir())[number::2]:
                tar.add(path, path.name)
    options: dict[str, Any] = {"shard_size": SHARD, "masks": True, "workers": 1}
    propose(f"file://{place}", output=tmp_path / "alone", **options)
    propose(f"file://{place}", output=tmp_path / "ray", engine="ray", ray_address=cluster.address, **options)
    assert written(tmp_path / "ray") == written(tmp_path / "alone")
    table = read_proposals(tmp_path / "ray")
    assert len(table) == 23
    assert {name.partition("/")[0] for name in table.file_names} == {"0.tar", "1.tar"}


@pytest.mark.slow
def test_clusters_of_a_cluster(
    cluster: Any, second: Any, sample: Path, proposals: Path, tmp_path: Path
) -> None:
    pytest.importorskip("sklearn")
    found: list[Any] = []
    for engine in get_args(Engine):
        folder = tmp_path / engine
        shutil.copytree(proposals, folder)
        group_proposals(
            sample / "train",
            proposals=folder,
            trunk="resnet18",
            trunk_weights="none",
            min_size=64,
            max_size=96,
            device="cpu",
            clusters=6,
            components=8,
            sample=100,
            engine=engine,
            ray_address=cluster.address if engine == "ray" else None,
        )
        found.append(with_clusters(read_proposals(folder), folder).clusters)
    assert len(np.unique(found[0])) > 1
    assert (found[0] == found[1]).mean() > 0.95  # sums of floats depend on the number of threads
