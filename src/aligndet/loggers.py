"""The table of metrics of a run, as Lightning writes it, but whole."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from aligndet.files import whole_path


class TableLogger(CSVLogger):
    """Lightning's logger of CSV, whose table survives a kill and a full disk at any moment."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What writes the table; made when it is first asked for."""
        if self._experiment is None:
            Path(self.root_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _WholeTable(log_dir=self.log_dir)
        return self._experiment


class _WholeTable(ExperimentWriter):
    """Names the file in errors; a column that comes later makes a new file, which replaces the old one."""

    def save(self) -> None:
        try:
            super().save()
        except OSError as error:
            self.metrics = []  # Lightning saves once more when a run has failed: behind a cut line
            raise OSError(error.errno, error.strerror, self.metrics_file_path) from error

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        with whole_path(path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=fieldnames)
            writer.writeheader()
            writer.writerows(rows)
