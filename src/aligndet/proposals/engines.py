"""Where work on many images is done: in processes of this machine, or on the machines of a Ray cluster."""

from __future__ import annotations

import logging
import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import islice
from typing import Any, Literal, TypeVar

from aligndet.workers import begin, cores, worker_context

Engine = Literal["processes", "ray"]
Item = TypeVar("Item")
Result = TypeVar("Result")

_TOGETHER = 4
"""Items that a process takes at a time."""
_AHEAD = 8
"""Of these, what waits for each process: enough for the others while one is slow."""
_PIECE = 32
"""Items a task at most: what a machine that fails loses for each of its cores."""
_WINDOW = 1000
"""Tasks that Ray knows of at a time: it makes all blocks of a data set before it works on the first."""
_work: Callable[[Any], Any]
"""Of a process beside one of Ray's."""


def check_engine(engine: Engine, address: str | None) -> None:
    """Refuses what `run` could not do.

    Raises:
        ImportError: If the engine is not installed.
        ValueError: If an address is given to an engine that has none.
    """
    if engine == "ray" and not all(map(find_spec, ("ray", "pandas"))):
        raise ImportError('--engine ray needs Ray Data: pip install "aligndet[ray]"')
    if engine != "ray" and address is not None:
        raise ValueError(f"--ray-address {address} is for --engine ray, not for {engine}")


def run(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    engine: Engine = "processes",
    workers: int | None = None,
    gpus: float = 0,
    address: str | None = None,
) -> Generator[Result, None, None]:
    """Does the same to many items; nothing starts before the first result is asked for.

    Close the iterator if it is left before its end.

    Args:
        work: What to do to one; it can be pickled.
        items: To do it to; they are taken as they are needed.
        engine: "processes", or "ray": tasks that a cluster does again elsewhere where a machine fails.
        workers: Processes or tasks at a time; by default one a core.
        gpus: Of Ray: share of a GPU that a task takes.
        address: Of Ray's cluster; by default what RAY_ADDRESS says, a cluster that runs on this machine, or
            one that is started here for as long as the work takes.

    Returns:
        The results, in the order of the items.

    Raises:
        ChildProcessError: If a process is killed.
        Exception: What work raises.
    """
    if engine == "ray":
        return _on_ray(work, items, workers, gpus, address)
    return _on_processes(work, items, workers)


def _on_processes(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int | None
) -> Generator[Result, None, None]:
    count = workers or cores()
    rest = iter(items)
    waiting: deque[Future[list[Result]]] = deque()
    pool = _pool(count)
    try:
        while True:
            while len(waiting) < _AHEAD * count and (piece := list(islice(rest, _TOGETHER))):
                waiting.append(pool.submit(_each, work, piece))
            if not waiting:
                return
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process was killed, most likely for lack of memory: give fewer --workers; the same"
            " command goes on where it stopped"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _each(work: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return [work(item) for item in items]


def _pool(workers: int) -> ProcessPoolExecutor:
    # multiprocessing's own pool would wait for ever for what a killed process had
    return ProcessPoolExecutor(workers, worker_context(), _start)


def _start() -> None:
    begin()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one


def _on_ray(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int | None,
    gpus: float,
    address: str | None,
) -> Generator[Result, None, None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before the import: nothing is reported to anyone
    import ray
    import ray.data

    started = not ray.is_initialized()
    if started:
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        rest = iter(items)
        cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
        while window := list(islice(rest, _PIECE * _WINDOW)):
            # small sets: some tasks for every core, so that all cores are done at about the same time
            size = max(1, min(_PIECE, len(window) // (4 * cores)))
            pieces = [pickle.dumps(window[start : start + size]) for start in range(0, len(window), size)]
            data = ray.data.from_items(pieces, override_num_blocks=len(pieces))
            data.context.execution_options.preserve_order = True
            data.context.enable_progress_bars = False
            done = data.map(_Piece(work), num_cpus=1, num_gpus=gpus or None, concurrency=workers)
            for row in done.iter_rows():
                for result, error in pickle.loads(row["item"]):
                    if error is not None:
                        raise error
                    yield result
    finally:
        if started:
            ray.shutdown()


class _Piece:
    """Does the work on the items of one task, in a process beside Ray's.

    Errors travel as values, or Ray would wrap them.
    """

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = pickle.dumps(work)  # which may hold a network: for each process once

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        items = pickle.loads(row["item"])
        # a process that is killed, most likely for lack of memory: once more, in a new one
        for _ in range(2):
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES")  # a worker's next task can have another one
            try:
                found = _beside(self.work, gpus).submit(_each, _result, items).result()
                break
            except BrokenProcessPool:
                _beside.cache_clear()
        else:
            message = "a process of Ray's worker was killed twice, most likely for lack of memory"
            found = [(None, ChildProcessError(f"{message}: give fewer --workers"))]
        return {"item": pickle.dumps(found)}


@lru_cache(1)
def _beside(work: bytes, gpus: str | None) -> ProcessPoolExecutor:
    """A process without Ray's threads: like OpenCV's ranking, these draw and seed C's random numbers, so that
    the order of boxes would now and then be another.
    """
    return ProcessPoolExecutor(1, worker_context(), _start_beside, (work, gpus))


def _start_beside(work: bytes, gpus: str | None) -> None:
    global _work
    _start()
    if gpus is not None:  # the server that this process is a copy of has those of the first task
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    try:
        _work = pickle.loads(work)
    except Exception as error:  # a package may be missing on this machine
        _work = partial(_fail, error)


def _fail(error: Exception, item: Any) -> Any:
    raise error


def _result(item: Any) -> tuple[Any, Exception | None]:
    try:
        return _work(item), None
    except Exception as error:
        return None, error
