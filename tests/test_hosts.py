"""Two hosts, as two network namespaces that share nothing but a cable and a file system."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.commands.test_kill import SMALL, assert_same_weights
from tests.test_processes import curve, finish

pytestmark = pytest.mark.slow
ADDRESSES = ("10.77.0.1", "10.77.0.2")
BOUND = 120.0  # seconds until a run has to be over after one of its processes has died
Started = list[tuple["subprocess.Popen[bytes]", Path]]


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no network namespaces here: ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces that a pair of virtual network cards joins."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the command ip (iproute2)")
    names = [f"aligndet-{os.getpid()}-{host}" for host in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "cable",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            names[1],
        )
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def torchrun(host: int, *script: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    return [*launcher, f"--node-rank={host}", f"--master-addr={ADDRESSES[0]}", "--master-port=29500", *script]


def srun(host: int) -> dict[str, str]:
    """What srun tells its task on a host."""
    task = {"PROCID": host, "NODEID": host, "LOCALID": 0, "NTASKS": 2, "NTASKS_PER_NODE": 1, "NNODES": 2}
    return {f"SLURM_{name}": str(v) for name, v in task.items()} | {"SLURM_NODELIST": ",".join(ADDRESSES)}


def start(
    hosts: Sequence[str], command: list[str], logs: Path, by: str = "torchrun", second: Sequence[str] = ()
) -> Started:
    """Starts a command on both hosts, the second one with further options; each has a log of its own."""
    logs.mkdir()
    started = []
    for host, name in enumerate(hosts):
        arguments = [*command, *(second if host else ())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
        if by == "srun":
            environment |= srun(host)
            program = [sys.executable, "-m", "aligndet", *arguments]
        elif by == "torchrun":
            program = torchrun(host, "-m", "aligndet", *arguments)
        else:
            program = torchrun(host, by, *arguments)
        log = logs / f"host{host}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", name, *program],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started.append((process, log))
    return started


def codes(started: Started, seconds: float = 300.0) -> list[int]:
    """Waits for both hosts; what hangs is ended, and fails the test."""
    limit = time.monotonic() + seconds
    try:
        return [process.wait(max(0.0, limit - time.monotonic())) for process, _ in started]
    except subprocess.TimeoutExpired:
        pytest.fail(f"a host hangs after {seconds:.0f} s:\n{texts(started)}")
    finally:
        for process, _ in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def texts(started: Started) -> str:
    return "\n".join(log.read_text("utf-8", "replace")[-3000:] for _, log in started)


def worker_of(process: subprocess.Popen[bytes]) -> int:
    """The training process below torchrun's agent."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def command(request: pytest.FixtureRequest, sample: Path, proposals: Path) -> list[str]:
    own = ["--workers=0", f"--strategy={request.param}"]
    return ["pretrain", str(sample / "train"), f"--proposals={proposals}", *SMALL, *own]


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes on one host."""
    output = tmp_path_factory.mktemp("whole") / "run"
    finish(*command, f"--output={output}", "--devices=2")
    return output


def test_two_hosts_train_as_one_with_two_processes(
    hosts: list[str], command: list[str], whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    keep = str(Path(__file__).with_name("keep_states.py"))
    started = start(hosts, [*command, f"--output={output}", "--nodes=2"], tmp_path / "logs", keep)
    assert codes(started) == [0, 0], texts(started)
    assert_same_weights(whole / "pretrained", output / "pretrained")
    assert curve(output) == curve(whole)
    first, second = (torch.load(tmp_path / f"run-of-{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    wrote = [log.read_text().count("pre-trained weights:") for _, log in started]
    assert wrote == [1, 0]


def test_slurms_tasks_on_two_hosts(hosts: list[str], command: list[str], whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    started = start(hosts, [*command, f"--output={output}", "--nodes=2"], tmp_path / "logs", "srun")
    assert codes(started) == [0, 0], texts(started)
    assert_same_weights(whole / "pretrained", output / "pretrained")


def test_a_killed_worker_ends_the_run_and_it_goes_on(
    hosts: list[str], command: list[str], whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    both = [*command, f"--output={output}", "--nodes=2"]
    started = start(hosts, both, tmp_path / "killed")
    checkpoint, limit = output / "checkpoints" / "last.ckpt", time.monotonic() + 240
    while not checkpoint.is_file() and time.monotonic() < limit:
        assert all(process.poll() is None for process, _ in started), texts(started)
        time.sleep(0.05)
    os.kill(worker_of(started[1][0]), signal.SIGKILL)
    killed = time.monotonic()
    assert all(codes(started, BOUND)), texts(started)
    print(f"both hosts had ended {time.monotonic() - killed:.1f} s after the kill")
    assert not (output / "pretrained").exists()

    apart = start(hosts, [*both, "--resume"], tmp_path / "apart", second=[f"--output={tmp_path / 'empty'}"])
    assert all(codes(apart)), texts(apart)
    assert "different steps" in texts(apart)

    resumed = start(hosts, [*both, "--resume"], tmp_path / "resumed")
    assert codes(resumed) == [0, 0], texts(resumed)
    assert_same_weights(whole / "pretrained", output / "pretrained")
