from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from aligndet.data import sample
from aligndet.data.sample import BACKGROUNDS, MATTERS, compose_scene


def test_a_scene_is_made_of_its_seed_alone() -> None:
    first, again, other = (compose_scene("train", 128, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first.image.tobytes() == again.image.tobytes()
    assert first.labels == again.labels
    assert first.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("part", ["train", "val"])
def test_objects_are_apart_and_visible(part: str) -> None:
    for seed in range(6):
        scene = compose_scene(part, 128, np.random.default_rng(seed))
        assert max(scene.image.size) <= 128
        assert len(scene.labels) == len(scene.masks) >= 1
        assert all(1 <= label <= len(MATTERS) for label in scene.labels)
        assert all(mask.shape == scene.image.size[::-1] and mask.any() for mask in scene.masks)
        assert np.sum(scene.masks, 0).max() == 1  # what is hidden belongs to no mask


def test_training_and_validation_share_no_photographed_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not set(BACKGROUNDS["train"]) & set(BACKGROUNDS["val"])
    assert not {name for part in BACKGROUNDS.values() for name in part} & {m.photograph for m in MATTERS}
    position: dict[str, Image.Image] = {}

    def columns_and_rows(name: str) -> Image.Image:
        """A picture that tells where each of its pixels is from."""
        if name not in position:
            width, height = original(name).size
            x, y = np.meshgrid(np.arange(width) * 255 / width, np.arange(height) * 255 / height)
            position[name] = Image.fromarray(np.stack([x, y, np.zeros_like(x)], 2).astype(np.uint8))
        return position[name]

    original = sample._photograph
    monkeypatch.setattr(sample, "_photograph", columns_and_rows)
    for matter in MATTERS:
        if matter.outline == "coin":
            continue  # single coins, listed by hand
        rng = np.random.default_rng(0)
        right = max(np.asarray(sample._texture(matter, "train", 32, rng))[..., 0].max() for _ in range(12))
        left = min(np.asarray(sample._texture(matter, "val", 32, rng))[..., 0].min() for _ in range(12))
        assert right < left, matter.name


def test_coins_are_used_on_one_side_only() -> None:
    for x, y, radius in sample._COINS["train"]:
        for other_x, other_y, other_radius in sample._COINS["val"]:
            assert np.hypot(x - other_x, y - other_y) > radius + other_radius


def test_missing_photographs_tell_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_skimage(name: str) -> object:
        return None if name == "skimage" else find_spec(name)

    monkeypatch.setattr(sample, "find_spec", without_skimage)
    sample._photograph.cache_clear()
    with pytest.raises(ValueError, match=r'skimage: pip install "aligndet\[quickstart\]"'):
        sample._photograph("skimage/brick.png")
