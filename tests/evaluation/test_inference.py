from __future__ import annotations

from collections.abc import Iterator
from threading import Event

import pytest
import torch
from torch import Tensor, nn

from aligndet.evaluation.inference import binary_masks, predict_images, resolve_device

CPU = torch.device("cpu")


class Brightness(nn.Module):
    """Finds one box an image, which is as sure as the image is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.batches.append(len(images))
        return [{"scores": image.mean()[None], "labels": torch.ones(1)} for image in images]


def test_one_prediction_an_image_in_order_and_in_batches() -> None:
    detector = Brightness().train()
    images = [torch.full((3, 8 + i, 9), 51 * i, dtype=torch.uint8) for i in range(5)]
    found = [f for _, f in predict_images(detector, zip(images), device=CPU, batch_size=2)]
    assert [round(float(f["scores"]), 2) for f in found] == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert detector.batches == [2, 2, 1]


def test_one_batch_is_read_while_another_is_computed() -> None:
    read, following = [], Event()

    def images() -> Iterator[tuple[Tensor]]:
        for i in range(6):
            read.append(i)
            if i == 3:
                following.set()
            yield (torch.zeros(3, 8, 8, dtype=torch.uint8),)

    class Waits(Brightness):
        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            assert following.wait(60)
            return super().forward(images)

    predictions = predict_images(Waits(), images(), device=CPU, batch_size=2)
    next(predictions)
    predictions.close()  # type: ignore[attr-defined]
    assert read == [0, 1, 2, 3]  # and no more


def test_an_image_that_fails_ends_the_predictions_before_it() -> None:
    def images() -> Iterator[tuple[Tensor]]:
        yield from [(torch.zeros(3, 8, 8, dtype=torch.uint8),)] * 3
        raise ValueError("broken")

    predictions = predict_images(Brightness(), images(), device=CPU, batch_size=2)
    assert len([next(predictions), next(predictions)]) == 2
    with pytest.raises(ValueError, match="broken"):
        next(predictions)


def test_the_callers_gradients_stay_on_between_images() -> None:
    images = [(torch.zeros(3, 8, 8, dtype=torch.uint8),)] * 2
    for _ in predict_images(Brightness(), images, device=CPU, batch_size=1):
        assert not torch.is_inference_mode_enabled()


def test_devices() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="unknown device 'toaster'"):
        resolve_device("toaster")
    with pytest.raises(ValueError, match="device 'cuda:99': torch finds"):
        resolve_device("cuda:99")
    assert resolve_device("cuda:99", elsewhere=True) == torch.device("cuda:99")


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        list(predict_images(Brightness(), [], device=CPU, batch_size=0))


def test_masks_are_decided_pixel_by_pixel() -> None:
    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask_predictor = nn.Identity()

        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            assert len(images) == 1  # or their masks would fill the memory
            masks = torch.tensor([[[[0.2, 0.6]]], [[[0.5, 0.9]]]])
            return [{"masks": masks[: len(image)]} for image in images]

    images = [(torch.zeros(n, 1, 2, dtype=torch.uint8),) for n in (2, 0)]
    (_, found), (_, none) = predict_images(Masks(), images, device=CPU, batch_size=2)
    assert found["masks"].tolist() == [[[False, True]], [[False, True]]]
    assert found["masks"].dtype == torch.bool
    assert none["masks"].shape == (0, 1, 2)
    assert torch.equal(binary_masks(found["masks"]), found["masks"])  # decided already
