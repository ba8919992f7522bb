from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from aligndet.commands.propose import propose
from aligndet.commands.sample_data import sample_data

# the processes of pytest-xdist share the cores, and so do the commands that tests start
_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _PROCESSES > 1:
    torch.set_num_threads(max(1, torch.get_num_threads() // _PROCESSES))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
_OF_A_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "RAY_ADDRESS", "MLFLOW_TRACKING_URI")
for variable in list(os.environ):  # tests that start in a job are no part of it
    if variable.startswith(("SLURM_", "TORCHELASTIC_", "ALIGNDET_")) or variable in _OF_A_JOB:
        del os.environ[variable]
# a machine may be slow
_SLOW: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=15, derandomize=True, **_SLOW)
settings.register_profile("thorough", max_examples=500, **_SLOW)  # make test-slow
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the tests' own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve labelled images of 128 pixels, four of them for validation."""
    return sample_data(tmp_path_factory.mktemp("sample") / "data", train_images=12, val_images=4, size=128)


@pytest.fixture(scope="session")
def proposals(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("proposed") / "proposals"
    propose(sample / "train", output=output, workers=1, shard_size=5, masks=True)
    return output
