"""What every pre-trainable detector has to do: one parameter a detector."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from aligndet.box_pretraining import BoxPretraining
from aligndet.boxes import BACKGROUND, BoxPredictions, PretrainOutput
from aligndet.data.views import TwoViews, View
from aligndet.detectors.build import DETECTORS, build_detector, build_pretrainable, family_of
from aligndet.detectors.weights import (
    MODULES,
    initialise,
    load_detector,
    network_of,
    pretrained_state,
    save_detector,
)
from aligndet.losses import box_contrastive_loss
from aligndet.momentum import momentum_copy, update_momentum
from aligndet.sharding import _layers, shard
from aligndet.training import compile_networks, networks

ARCHITECTURE: dict[str, Any] = {"trunk": "resnet18", "fpn_channels": 64}
QUERY_OPTIONS: dict[str, Any] = {
    **{"num_queries": 20, "encoder_layers": 1, "decoder_layers": 2},
    **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "group_detr": 2},
}
OBJECTS = torch.tensor([[10.0, 12.0, 60.0, 70.0], [40.0, 30.0, 120.0, 90.0], [5.0, 60.0, 40.0, 110.0]])


def architecture_of(name: str) -> dict[str, Any]:
    return ARCHITECTURE | ({"trunk": "test_vit"} if name == "rf_detr" else {})


def options_of(name: str, **more: Any) -> dict[str, Any]:
    """Small, where there is a choice."""
    few = QUERY_OPTIONS if family_of(name).weights_format == "transformers" else {}
    return {key: value for key, value in few.items() if key in family_of(name).shared_options()} | more


@cache
def _built(name: str, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter: Any = build_pretrainable(name, **architecture_of(name), options=options_of(name, **options))
    adapter.detector.backbone.body.requires_grad_(False).eval()
    return adapter


@cache
def _built_plain(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(5)  # no number is the adapter's
        return build_detector(name, num_classes=4, **architecture_of(name), options=options_of(name))


def build(name: str, **options: Any) -> Any:
    """A copy of an adapter that was built once, which takes longer."""
    return copy.deepcopy(_built(name, **options))


def plain_of(name: str) -> Any:
    """Likewise of the detector that fine-tuning starts with."""
    return copy.deepcopy(_built_plain(name))


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


def call(adapter: Any, images: list[Tensor], proposals: list[Tensor]) -> PretrainOutput:
    """With all that the detector needs to know of the proposals."""
    known = {
        "masks": [torch.ones(len(boxes), 8, 8, dtype=torch.uint8).tril() for boxes in proposals],
        "clusters": [torch.arange(len(boxes)) * 7 for boxes in proposals],
    }
    return adapter(images, proposals, **{name: known[name] for name in getattr(adapter, "needs", ())})


# these go the way of another name; CBNet's HTC, with all its masks, takes minutes
LIKE_OTHERS = ("conditional_detr", "dab_detr", "rt_detr", "cbnet_htc")
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in LIKE_OTHERS else []) for name in sorted(DETECTORS)
]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_assigns_embeds_and_learns(name: str) -> None:
    adapter = build(name)
    output = call(adapter, images((128, 160), (96, 128)), [OBJECTS, OBJECTS[:2] * 0.75])
    for stage in output.stages:
        assert stage.embeddings.shape[0] == stage.proposal_ids.shape[0]
        assert stage.embeddings.isfinite().all()
        assert set(stage.proposal_ids.tolist()) <= {BACKGROUND, 0, 1, 2, 3, 4}
        assert len(set(stage.proposal_ids.tolist()) - {BACKGROUND}) >= 4  # both images' proposals are found
    contrasts = [box_contrastive_loss(stage, stage) for stage in output.stages]
    torch.stack([*contrasts, *output.losses.values()]).sum().backward()
    untrained = [n for n, p in adapter.named_parameters() if p.requires_grad and p.grad is None]
    assert not untrained
    assert all(p.grad is None for p in adapter.detector.backbone.body.parameters())


@pytest.mark.parametrize("name", ["fcos", "retinanet", "faster_rcnn", "cascade_rcnn"])
def test_the_boxes_of_a_stage_are_bounded(name: str) -> None:
    bounded, usual = build(name, max_boxes=8), build(name)
    for stage in call(bounded, images((128, 160)), [OBJECTS]).stages:
        assert 0 < len(stage.proposal_ids) <= 8
    if name in ("fcos", "retinanet"):
        assert usual.detector.head.max_boxes == 2048
    else:
        assert {stage.fg_bg_sampler.limit for stage in usual.stages} == {4096}


def test_the_momentum_copy_sees_the_same_assignment_without_a_graph(name: str) -> None:
    adapter = build(name)
    momentum: Any = momentum_copy(adapter, adapter.detector.backbone.body)
    batch = images((128, 160)), [OBJECTS]
    torch.manual_seed(1)
    online = call(adapter, *batch)
    torch.manual_seed(1)
    with torch.no_grad():
        other = call(momentum, *batch)
    for ours, theirs in zip(online.stages, other.stages, strict=True):
        assert torch.equal(ours.proposal_ids, theirs.proposal_ids)
        torch.testing.assert_close(ours.embeddings, theirs.embeddings)
        assert not theirs.embeddings.requires_grad


@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (0, 1)])
def test_images_without_proposals(name: str, counts: tuple[int, int]) -> None:
    adapter = build(name)
    output = call(adapter, images((128, 160), (128, 128)), [OBJECTS[:n] for n in counts])
    contrasts = [box_contrastive_loss(stage, stage) for stage in output.stages]
    total = torch.stack([*contrasts, *output.losses.values()]).sum()
    assert total.isfinite()
    total.backward()
    grads = [p.grad for p in adapter.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    if sum(counts) == 0:
        assert all((stage.proposal_ids == BACKGROUND).all() for stage in output.stages)


def test_pretrained_parts_fill_the_plain_detector(name: str) -> None:
    adapter = build(name)
    plain = plain_of(name)
    fresh = copy.deepcopy(network_of(plain).state_dict())
    origins = initialise(plain, pretrained_state(adapter))
    source = network_of(adapter.detector).state_dict()
    new = tuple(module for module, origin in origins.items() if origin == "new")
    for key, value in network_of(plain).state_dict().items():
        if key.rpartition(".")[0] in new:
            torch.testing.assert_close(value, fresh[key])
        else:  # what serves all classes is repeated for each
            times = len(value) // len(source[key]) if value.ndim else 1
            torch.testing.assert_close(value, torch.cat([source[key]] * times) if value.ndim else source[key])
    left_out = [layer for layer in adapter.prediction_layers if any(k.startswith(layer + ".") for k in fresh)]
    assert all(f"{module}.".startswith(tuple(f"{layer}." for layer in left_out)) for module in new)
    assert all(any(f"{module}.".startswith(f"{layer}.") for module in new) for layer in left_out)


@pytest.mark.parametrize("modules", [("neck",), ("trunk", "head"), ()])
def test_parts_are_taken_one_by_one(name: str, modules: tuple[str, ...]) -> None:
    plain = plain_of(name)
    origins = initialise(plain, pretrained_state(build(name)), modules)
    parts = {
        part: [origin for module, origin in origins.items() if f"{module}.".startswith(MODULES[part])]
        for part in ("trunk", "neck", "head")
    }
    for part, found in parts.items():
        assert ("pre-trained" in found) == (part in modules)
        assert found
    prefixes = tuple(prefix for part in MODULES.values() for prefix in part)
    assert all(key.startswith(prefixes) for key in network_of(plain).state_dict())


def few_boxes(name: str) -> dict[str, Any]:
    """Settings with which an untrained detector finds something, but not much."""
    if family_of(name).weights_format == "transformers":
        return options_of(name)
    few: dict[str, Any] = {"score_thresh": 0.0, "detections_per_img": 10}
    if name in ("fcos", "retinanet"):
        return few
    return {f"box_{option}": value for option, value in few.items()} | {"rpn_post_nms_top_n_test": 50}


def test_a_saved_detector_predicts_the_same(name: str, tmp_path: Path) -> None:
    architecture = {
        "detector": name,
        **architecture_of(name),
        **{"num_classes": 4, "min_size": 128, "max_size": 160, "options": few_boxes(name)},
    }
    plain = build_detector(**architecture).eval()
    save_detector(tmp_path / "model", plain, {"architecture": architecture})
    loaded, _ = load_detector(tmp_path)
    with torch.inference_mode():
        for ours, theirs in zip(plain(images((128, 160))), loaded(images((128, 160))), strict=True):
            assert len(ours["boxes"])
            torch.testing.assert_close(ours, theirs)


def test_boxes_are_exact_in_half_precision(name: str) -> None:
    plain = build_detector(
        name, num_classes=4, **architecture_of(name), min_size=128, options=few_boxes(name)
    ).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        (prediction,) = plain(images((128, 160)))
    boxes = prediction["boxes"]
    assert boxes.dtype == torch.float32
    assert (boxes != boxes.bfloat16().float()).float().mean() > 0.2  # a part lies on the image's edge
    assert prediction.get("masks", boxes).dtype == torch.float32


def losses_of(adapter: Any) -> Tensor:
    torch.manual_seed(2)
    output = call(adapter, images((128, 160), (128, 160)), [OBJECTS, OBJECTS[:2]])
    contrasts = [box_contrastive_loss(stage, stage) for stage in output.stages]
    return torch.stack([*contrasts, *output.losses.values()]).float()


IN_HALF = ("fcos", "faster_rcnn", "detr")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in IN_HALF else [pytest.mark.slow]) for name in DETECTORS],
)
def test_losses_agree_in_channels_last_and_in_half_precision(name: str) -> None:
    # dropout draws in the order of memory
    calm = {"dropout": 0.0} if "dropout" in family_of(name).shared_options() else {}
    adapter = build(name, **calm)
    for part, module in adapter.detector.named_modules():
        if part.endswith("enc_score_head"):  # or rounding would choose the queries
            nn.init.normal_(module.weight)
    plain = losses_of(adapter)
    adapter.to(memory_format=torch.channels_last)
    maps: list[Tensor] = []
    for layer in adapter.detector.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda *call: maps.append(call[2]))
    torch.testing.assert_close(losses_of(adapter), plain, rtol=1e-4, atol=1e-4)
    assert maps
    assert all(found.is_contiguous(memory_format=torch.channels_last) for found in maps)
    with torch.autocast("cpu", torch.bfloat16):
        half = losses_of(adapter)
    assert not torch.equal(half, plain)
    torch.testing.assert_close(half.sum(), plain.sum(), rtol=0.03, atol=0.0)
    torch.testing.assert_close(half, plain, rtol=0.2, atol=0.1)  # none is lost beneath others


def test_compile_takes_the_networks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda part: taken.append(part))
    adapter = build(name)
    compile_networks(adapter)
    inside = {id(parameter) for part in taken for parameter in part.parameters()}
    sizes = {id(parameter): parameter.numel() for parameter in adapter.detector.parameters()}
    assert sum(sizes[key] for key in inside) > 0.8 * sum(sizes.values())  # not what predicts and projects
    called: set[nn.Module] = set()
    for part in taken:
        part.register_forward_hook(lambda part, *_: called.add(part))
    losses_of(adapter)
    assert called == set(taken)  # what is not called would not be compiled either


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_layers_are_called_alike_whatever_there_is_to_find(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or processes that gather them would wait for each other."""
    monkeypatch.setattr("aligndet.sharding._LARGE", 20_000)
    adapter = build(name)
    called: list[nn.Module] = []
    for layer in (layer for network in networks(adapter) for layer in _layers(network)):
        layer.register_forward_hook(lambda layer, *_: called.append(layer))
    orders = []
    for boxes in ([OBJECTS, OBJECTS[:2]], [OBJECTS[:0], OBJECTS[:0]]):
        call(adapter, images((128, 160), (128, 160)), boxes)
        orders.append(called[:])
        called.clear()
    assert orders[0]
    assert orders[0] == orders[1]


def test_a_detector_that_is_split_over_devices_learns_alike(
    name: str, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aligndet.sharding._LARGE", 20_000)  # of one this small
    whole = BoxPretraining(build(name), steps=10)
    split: Any = copy.deepcopy(whole)
    split.forward = lambda: losses_of(split.online).sum() + 0 * losses_of(split.momentum).sum()
    losses_of(whole.online).sum().backward()
    shard(split, mesh)
    layers = {part for part in split.modules() if isinstance(part, FSDPModule) and part is not split}
    assert layers & set(split.trunk.modules())
    split().backward()
    optimizer = torch.optim.SGD([p for p in split.online.parameters() if p.requires_grad], 0.1)
    torch.optim.SGD([p for p in whole.online.parameters() if p.requires_grad], 0.1).step()
    optimizer.step()
    for module in (whole, split):
        update_momentum(module.online, module.momentum, 0.5)
    for ours, theirs in zip(split.parameters(), whole.parameters(), strict=True):
        assert isinstance(ours, DTensor)
        torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-4, atol=1e-5)


def test_what_is_used_twice_is_gathered_for_the_whole_step(mesh: DeviceMesh) -> None:
    module: Any = nn.Module()
    module.decoder = nn.Sequential(nn.Linear(800, 800), nn.Linear(800, 800))
    detector: Any = nn.Module()
    detector.model, detector.classes = module, nn.Linear(800, 800)
    detector.classes.weight = module.decoder[1].weight
    shard(detector, mesh)
    split = [part for part in detector.modules() if isinstance(part, FSDPModule)]
    assert split == [detector, module.decoder[0]]
    module.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"model\.scale is a single number"):
        shard(detector, mesh)


@pytest.mark.slow
def test_compiled_losses_are_the_same() -> None:
    adapter = build("fcos")
    plain = losses_of(adapter)
    compile_networks(adapter)
    torch.testing.assert_close(losses_of(adapter), plain, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3  # trunk, pyramid, head


def test_weights_of_another_detector_are_refused(name: str) -> None:
    other = next(n for n in DETECTORS if n != name)
    with pytest.raises(ValueError, match="another"):
        initialise(plain_of(other), pretrained_state(build(name)))


# --8<-- [start:own]
class Colours(nn.Module):
    """A user's own detector: the whole image is its only box."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.body = nn.Conv2d(3, 8, 1)
        self.classes = nn.Linear(8, 2)


class ColoursPretraining(nn.Module):
    """Three members make it pre-trainable."""

    prediction_layers = ("classes",)

    def __init__(self) -> None:
        super().__init__()
        self.detector = Colours()
        self.projection = nn.Linear(8, 4)

    def forward(self, images: list[Tensor], proposals: list[Tensor]) -> PretrainOutput:
        trunk: Any = self.detector.backbone.body
        features = torch.stack([trunk(image[None])[0].mean((1, 2)) for image in images])
        ids = torch.tensor([i if len(boxes) else BACKGROUND for i, boxes in enumerate(proposals)])
        return PretrainOutput((BoxPredictions(self.projection(features), ids),), {})


# --8<-- [end:own]


def test_a_detector_of_ones_own() -> None:
    pictures = [(image * 255).byte() for image in images((32, 32), (32, 40), (40, 32))]
    boxes = [OBJECTS, OBJECTS[:0], OBJECTS[:1]]
    views = [View(image, box) for image, box in zip(pictures, boxes, strict=True)]
    module = BoxPretraining(ColoursPretraining(), steps=1)
    loss = module.training_step([TwoViews(view, view, "image.jpg", ()) for view in views], 0)
    loss.backward()
    assert loss > 0
    assert module.online.projection.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in module.trunk.parameters())
    assert set(pretrained_state(module.online)) == {"backbone.body.weight", "backbone.body.bias"}


def test_an_unknown_option_is_answered_with_the_list(name: str) -> None:
    with pytest.raises(ValueError, match=r"no option 'colour'; there are: .*embedding_dim"):
        build_pretrainable(name, **architecture_of(name), options={"colour": 1})
    assert build_pretrainable(name, **architecture_of(name), options={"embedding_dim": 32})
