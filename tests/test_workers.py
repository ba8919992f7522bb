from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch.utils.data import DataLoader

from aligndet.proposals.engines import run
from aligndet.workers import cores, worker_settings


def test_what_workers_need_is_imported_without_the_training_framework() -> None:
    modules = "commands.propose", "commands.cluster", "data.crops", "data.labelled", "data.views", "workers"
    code = "import sys\n" + "\n".join(f"import aligndet.{module}" for module in modules)
    subprocess.run([sys.executable, "-c", f"{code}\nassert 'lightning' not in sys.modules"], check=True)


def test_the_script_that_asks_for_work_is_not_run_by_its_workers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import aligndet; aligndet.propose('images', output='proposals')")
    main = ModuleType("__main__")
    main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert list(run(abs, [-1, 2], workers=1)) == [1, 2]
    assert list(DataLoader(Loaded(), batch_size=None, **worker_settings(1))) == [sys.platform == "linux"] * 2  # type: ignore[arg-type]


class Loaded:
    """Whether a process has imported what proposals need before it was asked for anything."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> bool:
        return "aligndet.proposals.selective_search" in sys.modules


def test_workers_start_with_what_they_need() -> None:
    settings = worker_settings(2)
    assert list(DataLoader(Loaded(), batch_size=None, **settings)) == [sys.platform == "linux"] * 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("quota", "count"), [("250000 100000", 3), ("max 100000", 8), ("", 8), ("50000 100000", 1)]
)
def test_a_containers_bound_counts(
    quota: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr("aligndet.workers._QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cores() == count
