from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aligndet.detectors.reading import read_tensors, weights_file


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


class Quiet(Bomb):
    """The same, through names that look harmless."""

    def __reduce__(self) -> Any:
        return getattr, (self.path, "touch")


@pytest.mark.parametrize("kind", [Bomb, Quiet])
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("inside", ["value", "array"])
def test_a_file_that_runs_code_is_refused(kind: Any, suffix: str, inside: str, tmp_path: Path) -> None:
    bomb = kind(tmp_path / "exploded")
    content: Any = {"conv1.weight": torch.ones(2) if suffix == ".pth" else np.ones(2), "bomb": bomb}
    if inside == "array":
        content["bomb"] = np.array([bomb], dtype=object)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"weights\.p.*: not readable as weights"):
        read_tensors(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_protocol(protocol: int, tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "float": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.ones(3, np.float16),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4").astype("<f4"),
        "counter": np.array(7),
    }
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": arrays, "lr": np.float64(1)}, protocol=protocol))
    tensors = read_tensors(tmp_path / "w.pkl")
    assert set(tensors) == {f"model.{name}" for name in arrays}
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[f"model.{name}"].numpy(), array)
        assert tensors[f"model.{name}"].shape == array.shape


def test_what_is_no_weights(tmp_path: Path) -> None:
    for name in ("text.pth", "text.pkl", "text.safetensors"):
        (tmp_path / name).write_text("no weights")
        with pytest.raises(ValueError, match=rf"{name}: not readable"):
            read_tensors(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no dict of tensors"):
        read_tensors(tmp_path / "list.pth")


def test_the_file_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file of weights"):
        weights_file(str(tmp_path))
    (tmp_path / "trunk").mkdir()
    (tmp_path / "trunk" / "model.safetensors").touch()
    for given in (tmp_path, tmp_path / "trunk", tmp_path / "trunk" / "model.safetensors"):
        assert weights_file(str(given)) == tmp_path / "trunk" / "model.safetensors"
