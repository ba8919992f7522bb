"""A device that computes on the CPU and refuses what a GPU refuses: tensors of two devices in one operation.

    python -m tests.other_device fcos detr    # trains and predicts on it, against the CPU

It is torch's place for backends in Python, which changes a process for good: a process of its own runs it.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

from aligndet.box_pretraining import BoxPretraining
from aligndet.data.coco import Category
from aligndet.data.crops import TwoCrops
from aligndet.data.labelled import HostBatch, Labelled
from aligndet.data.views import TwoViews, View
from aligndet.detectors.build import family_of
from aligndet.detectors.trunks import build_trunk
from aligndet.evaluation.coco import CocoEvaluator
from aligndet.finetuning import Finetuning
from aligndet.image_pretraining import MoCo, SimSiam
from tests.detectors.test_contract import OBJECTS, build, images, plain_of

NAME = "other"


class Backend(_DummyBackendModule):
    def get_rng_state(self, device: Any = 0) -> Tensor:
        return torch.get_rng_state()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        pass


_setup_privateuseone_for_python_backend(NAME, Backend())
DEVICE = torch.device(NAME, 0)
# a GPU takes indices of the CPU, and copies from there
_MIXED = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten._to_copy.default,
}


class OnDevice(Tensor):
    """Says that it is on the device, and holds its numbers on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        tensor: Any = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})

    def new_tensor(  # type: ignore[override]
        self, data: Any, *, dtype: Any = None, device: Any = None
    ) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype).to(device or self.device)

    def tolist(self) -> Any:
        return self.held.tolist()

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a tensor on a device cannot become an array")

    numpy = __array__


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operation on the CPU and says where its result is."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    here = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim()]
    indexed_here = func is torch.ops.aten.index.Tensor and not isinstance(args[0], OnDevice)
    if there and here and (func not in _MIXED or indexed_here):
        shapes = [[tuple(tensor.shape) for tensor in place] for place in (there, here)]
        raise RuntimeError(f"{func}: tensors of two devices, {shapes[0]} there and {shapes[1]} on the CPU")
    asked = kwargs.get("device")
    goes_there = bool(there) if asked is None else torch.device(asked).type == NAME
    if func is torch.ops.aten.copy_.default:
        goes_there = isinstance(args[0], OnDevice)
    settings = {k: v for k, v in kwargs.items() if k != "pin_memory"}
    if asked is not None:
        settings["device"] = torch.device("cpu")
    args_here, settings = tree_map(lambda x: x.held if isinstance(x, OnDevice) else x, (args, settings))
    result = func(*args_here, **settings)
    if not goes_there:
        return result
    known = {id(tensor.held): tensor for tensor in there}  # the result of an operation in place

    def put_there(x: Any) -> Any:
        return known[id(x)] if id(x) in known else OnDevice(x) if isinstance(x, Tensor) else x

    result = tree_map(put_there, result)
    is_copy = func is torch.ops.aten._to_copy.default
    return return_and_correct_aliasing(func, args, kwargs, result) if there and not is_copy else result


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Numbers(TorchFunctionMode):
    """What torch fills in C++, past its operations: tensors and indices out of Python's numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None:
            if isinstance(args[0], OnDevice):
                return args[0].to(dtype=kwargs.get("dtype") or args[0].dtype, device=device)
            return func(*args, **{**kwargs, "device": "cpu"}).to(device)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(i) if isinstance(i, list) else i for i in index)
            return func(args[0], index, *args[2:])
        return func(*args, **kwargs)


@contextmanager
def on_device() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    with Numbers(), Operations():
        yield


def silent(module: Any) -> Any:
    module.log = module.log_dict = lambda *_, **__: None
    return module


def compare(module: Any, batch: Any, seed: int = 1) -> None:
    """Takes a step on both devices."""
    there = copy.deepcopy(module)
    module.on_train_start()
    torch.manual_seed(seed)
    wanted = module.training_step(batch("cpu"), 0)
    wanted.backward()
    with on_device():
        there.to(DEVICE)
        there.on_train_start()
        torch.manual_seed(seed)
        found = there.training_step(batch(DEVICE), 0)
        found.backward()
        assert found.device == DEVICE
        torch.testing.assert_close(found.detach().cpu(), wanted.detach(), rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(there.parameters(), module.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            assert ours.device == DEVICE
        if isinstance(there, Finetuning):
            predict(there)


def predict(module: Any) -> None:
    type(module).device = property(lambda self: DEVICE)
    module.eval()
    image, target = (
        (images((128, 160))[0] * 255).byte(),
        {"boxes": OBJECTS, "labels": torch.tensor([1, 2, 3])},
    )
    if module.evaluator.masks:
        target["masks"] = torch.ones(3, 128, 160, dtype=torch.bool)
    with torch.no_grad():
        module.validation_step(HostBatch([(image, target)]), 0)
        module.on_validation_epoch_end()


def two_views(device: Any) -> list[TwoViews]:
    def view(count: int) -> View:
        image, boxes = (images((128, 160))[0] * 255).byte(), OBJECTS[:count]
        masks, clusters = torch.ones(count, 56, 56, dtype=torch.uint8).tril(), torch.arange(count) * 7
        return View(*(tensor.to(device) for tensor in (image, boxes, masks, clusters)))

    return [TwoViews(view(count), view(count), f"{count}.jpg", ()) for count in (3, 2, 0)]


def labelled(device: Any, masks: bool) -> list[Labelled]:
    def item(count: int) -> Labelled:
        image, shapes = (images((128, 160))[0] * 255).byte(), torch.zeros(count, 128, 160, dtype=torch.uint8)
        shapes[:, 20:60, 20:60] = 1
        image, boxes, labels = (
            tensor.to(device) for tensor in (image, OBJECTS[:count], torch.arange(count) + 1)
        )
        return Labelled(image, boxes, labels, f"{count}.jpg", (), shapes.to(device) if masks else None)

    return [item(count) for count in (3, 2, 0)]


def crops(device: Any) -> list[TwoCrops]:
    pairs = (images((32, 32), (32, 32)) for _ in range(4))
    return [TwoCrops(first.to(device), second.to(device), "0.jpg", ()) for first, second in pairs]


def check(name: str) -> None:
    """Trains and predicts."""
    torch.manual_seed(0)
    if name in ("simsiam", "moco"):
        trunk, channels = build_trunk("resnet18")
        method: Any = (
            MoCo(trunk, channels[-1], queue=16, steps=10)
            if name == "moco"
            else SimSiam(trunk, channels[-1], steps=10)
        )
        compare(silent(method), crops)
        return
    masks = family_of(name).masks
    compare(silent(BoxPretraining(build(name), steps=10)), two_views)
    evaluator = CocoEvaluator([Category(i, str(i)) for i in range(1, 5)], masks=masks)
    module = Finetuning(plain_of(name), steps=10, evaluator=evaluator)
    compare(silent(module), lambda device: labelled(device, masks))


if __name__ == "__main__":
    for detector in sys.argv[1:]:
        check(detector)
        print(detector, flush=True)
    os._exit(0)  # at its usual end, a process with such a device is aborted
