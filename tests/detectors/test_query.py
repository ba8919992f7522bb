"""Query-based detectors beside the contract: more proposals than queries, variants, queries copied."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from aligndet.boxes import BACKGROUND, BoxPredictions
from aligndet.detectors.build import DETECTORS, build_detector, build_pretrainable, family_of
from aligndet.detectors.query import proposal_ids
from aligndet.detectors.query_detector import relative_targets
from aligndet.detectors.query_families import from_transformers, with_first_prediction
from aligndet.detectors.weights import initialise, pretrained_state, save_detector
from aligndet.losses import box_contrastive_loss
from aligndet.momentum import momentum_copy, update_momentum

FAST = ("detr", "deformable_detr", "rt_detr_v2", "d_fine")
NAMES = [
    pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])
    for name in sorted(DETECTORS)
    if family_of(name).weights_format == "transformers"
]
IMAGES = [torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(2)) for _ in range(2)]


FEW = {"num_queries": 12, "encoder_layers": 1, "decoder_layers": 3, "decoder_ffn_dim": 64, "group_detr": 1}
SMALL: dict[str, Any] = {"num_classes": 3, "fpn_channels": 32, "min_size": 96, "max_size": 128}


def few(name: str, **options: Any) -> dict[str, Any]:
    """A trunk, and few of all that there is a choice of."""
    known = {key: value for key, value in FEW.items() if key in family_of(name).shared_options()}
    return {"trunk": "test_vit" if name == "rf_detr" else "resnet18", "options": known | options}


def build(name: str, **options: Any) -> Any:
    return build_pretrainable(name, fpn_channels=32, **few(name, **options))


def build_plain(name: str, **options: Any) -> Any:
    return build_detector(name, **SMALL, **few(name, **options))


def boxes(count: int) -> torch.Tensor:
    corner = torch.rand(count, 2, generator=torch.Generator().manual_seed(4)) * 50
    return torch.cat([corner, corner + 30], dim=1)


@pytest.mark.parametrize("name", NAMES)
def test_more_proposals_than_queries(name: str) -> None:
    adapter = build(name)
    proposals = [boxes(30), boxes(5)]
    output = adapter(IMAGES, proposals, [torch.arange(30), torch.arange(5)])
    assert len(output.stages) == 3
    for stage in output.stages:
        ids = stage.proposal_ids.view(2, 12)
        assert (ids[0] != BACKGROUND).all()  # every query has one of the thirty
        assert len(set(ids[0].tolist())) == 12
        assert set(ids[0].tolist()) <= set(range(30))
        assert set(ids[1].tolist()) == {BACKGROUND, 30, 31, 32, 33, 34}
    assert torch.stack(list(output.losses.values())).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_query_stands_for_the_proposal_that_it_predicts(name: str) -> None:
    adapter = build(name, objectness=True)
    config = adapter.detector.network.config
    # a box costs all, so that the matching is known: the nearest box
    for cost in ("class_cost", "giou_cost", "matcher_class_cost", "matcher_giou_cost"):
        if hasattr(config, cost):
            setattr(adapter.matcher, cost.removeprefix("matcher_"), 0.0)
    predicted = torch.rand(1, 12, 4) * 0.4 + 0.3
    wanted = torch.tensor([7, 2, 10])
    layer = {"logits": torch.zeros(1, 12, 2), "pred_boxes": predicted}
    labels = [{"boxes": predicted[0, wanted], "class_labels": torch.zeros(3, dtype=torch.int64)}]
    (ids,) = proposal_ids([adapter._match(layer, labels)], labels, 12)
    assert ids[wanted].tolist() == [0, 1, 2]
    assert (ids == BACKGROUND).sum() == 9


def test_the_plain_variant_needs_no_clusters() -> None:
    adapter = build("detr", objectness=True)
    assert adapter.needs == ()
    assert build("detr").needs == ("clusters",)
    assert adapter.detector.network.config.num_labels == 1
    output = adapter(IMAGES, [boxes(3), boxes(0)])
    assert set(output.losses) == {"ce", "bbox", "giou"}
    assert set(output.stages[-1].proposal_ids.tolist()) == {BACKGROUND, 0, 1, 2}


@pytest.mark.parametrize("name", ["detr", "conditional_detr", "dab_detr", "deformable_detr", "rf_detr"])
def test_the_momentum_detector_has_the_online_queries(name: str) -> None:
    adapter = build(name)
    momentum: Any = momentum_copy(adapter, adapter.detector.backbone.body)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(1.0)
    update_momentum(adapter, momentum, 0.9, adapter.copied_parameters)
    ours, theirs = dict(adapter.named_parameters()), dict(momentum.named_parameters())
    assert adapter.copied_parameters
    for copied in adapter.copied_parameters:
        assert torch.equal(theirs[copied], ours[copied])
    weight = "projection_head.hidden.weight"
    torch.testing.assert_close(theirs[weight], ours[weight] - 0.9)


def test_gradients_are_those_of_all_embeddings() -> None:
    adapter = build("detr", objectness=True)
    states, ids = torch.randn(3, 24, 32, requires_grad=True), torch.full((3, 24), BACKGROUND)
    for layer in ids:
        layer[torch.randperm(24)[:7]] = torch.arange(7)
    others = torch.cat([torch.arange(5), torch.full((15,), BACKGROUND)])
    momentum = BoxPredictions(torch.randn(20, 128), others)
    found, head = [], adapter.projection_head
    embedded = head(states.flatten(0, 1)).unflatten(0, (3, 24))
    for stages in (adapter._stages(states, ids, 2), map(BoxPredictions, embedded, ids)):
        losses = [box_contrastive_loss(own, momentum) for own in stages]
        inputs = [states, *head.parameters()]
        found.append(torch.autograd.grad(torch.stack(losses).sum(), inputs))
    torch.testing.assert_close(*found)
    assert found[0][0].any()


def test_of_groups_of_queries_the_background_is_that_of_the_first() -> None:
    adapter = build("rf_detr", objectness=True, group_detr=3)
    proposals = [boxes(4), boxes(2)]
    for stage in adapter(IMAGES, proposals).stages:
        assert len(stage.embeddings) == len(stage.proposal_ids)
        stands = stage.proposal_ids != BACKGROUND
        assert stands.sum() == 3 * 6  # of all groups
        assert (~stands).sum() == 2 * 12 - 6
        assert stage.embeddings.abs().sum(1).min() > 0


@pytest.mark.parametrize("name", ["rt_detr_v2", "d_fine"])
def test_what_chooses_queries_goes_on_as_it_is(name: str) -> None:
    adapter = build(name, objectness=True)
    with torch.no_grad():
        adapter.detector.network.model.enc_score_head.bias.normal_()
    detector = build_plain(name)
    origins = initialise(detector, pretrained_state(adapter))
    assert origins["model.enc_score_head"] == "pre-trained"
    assert origins["class_embed.0"] == "new"
    ours, theirs = (part.network.model.enc_score_head for part in (detector, adapter.detector))
    for parameter in ("weight", "bias"):
        for row in getattr(ours, parameter):  # of each class
            assert torch.equal(row, getattr(theirs, parameter)[0])
    assert "model.enc_score_head" in build(name).prediction_layers  # with clusters, as all class layers


def test_noise_rests_in_pretraining_alone() -> None:
    adapter = build("rt_detr", num_denoising=50)
    assert adapter.detector.network.config.num_denoising == 0


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_normalised_over_all_processes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with one and three boxes average to what one process has of both batches."""
    detector = build_plain(name).eval()
    labels = [
        {"boxes": torch.rand(count, 4) * 0.3 + 0.2, "class_labels": torch.zeros(count, dtype=torch.int64)}
        for count in (1, 3)
    ]
    whole = detector.losses(detector.run(IMAGES, labels), labels)
    alone = [
        detector.losses(detector.run([i], [label]), [label]) for i, label in zip(IMAGES, labels, strict=True)
    ]
    monkeypatch.setattr("aligndet.detectors.query_detector.all_reduce_mean", lambda boxes: boxes * 0 + 2)
    parts = [
        detector.losses(detector.run([i], [label]), [label]) for i, label in zip(IMAGES, labels, strict=True)
    ]
    for kind, loss in whole.items():
        if f"loss_{kind}" in detector.family.own_norm:
            assert [part[kind] for part in parts] == [part[kind] for part in alone]
        else:
            torch.testing.assert_close(
                torch.stack([part[kind] for part in parts]).mean(), loss, rtol=1e-3, atol=1e-4
            )
    if {f"loss_{kind}" for kind in whole} - set(detector.family.own_norm):
        means = [torch.stack([part[kind] for part in alone]).mean() / loss for kind, loss in whole.items()]
        assert any(abs(mean - 1) > 1e-2 for mean in means)  # each by its own number of boxes


@pytest.mark.parametrize("name", NAMES)
def test_queries_differ_from_the_start(name: str) -> None:
    torch.manual_seed(0)
    detector: Any = build_detector(name, num_classes=2, fpn_channels=64, **few(name)).eval()
    with torch.inference_mode():
        boxes = detector.run(IMAGES).pred_boxes  # (2, 12, 4)
    assert boxes.std(1).amax(1).min() > 2e-5  # of transformers' own numbers for DETR: 3e-8
    ends = [
        m.layers[-1] for n, m in detector.network.named_modules() if "bbox_" in n and hasattr(m, "layers")
    ]
    assert ends
    assert all(bool(end.weight.any()) != detector.family.moves for end in ends)  # reference points stay
    if name == "deformable_detr":  # an eighth of the image
        torch.testing.assert_close(boxes[..., 2:], torch.full((2, 12, 2), -2.0).sigmoid())


def test_refined_boxes_start_at_an_eighth_of_the_image() -> None:
    detector = build_plain("deformable_detr", with_box_refine=True).eval()
    with torch.inference_mode():
        sides = detector.run(IMAGES).pred_boxes[..., 2:]
    torch.testing.assert_close(sides, torch.full_like(sides, -2.0).sigmoid())


@pytest.mark.parametrize("name", NAMES)
def test_new_layers_start_as_their_authors_have_them(name: str) -> None:
    detector: Any = build_detector(name, num_classes=4, fpn_channels=64, **few(name))
    network = detector.network
    trunk = set(detector.backbone.body.modules())
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d) and m not in trunk]
    assert all((norm.weight == 1).all() for norm in norms)
    assert bool(norms) == detector.family.from_encoder
    classes = [
        m
        for n, m in network.named_modules()
        if n.startswith(detector.family.class_layers) and isinstance(m, torch.nn.Linear)
    ]
    assert classes
    for layer in classes:
        if detector.family.moves:  # every class has a score of 0.01
            torch.testing.assert_close(layer.bias.sigmoid(), torch.full_like(layer.bias, 0.01))
        assert layer.weight.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.2)  # torch's own
    for attention, layer in network.named_modules():
        if (
            layer not in trunk and hasattr(layer, "q_proj") and hasattr(layer, "k_proj")
        ):  # Xavier of one matrix for all three
            assert layer.q_proj.weight.std().item() == pytest.approx(128**-0.5, rel=0.1), attention


def test_what_fills_up_images_with_few_objects_is_nothing() -> None:
    embedding = build_plain("d_fine", num_denoising=8).network.model.denoising_class_embed
    assert not embedding.weight[embedding.padding_idx].any()
    assert embedding.weight[: embedding.padding_idx].std() > 0.5


@pytest.mark.parametrize(
    ("name", "options", "layers"),
    [
        ("dab_detr", {"num_patterns": 3}, ("model.patterns",)),
        ("detr", {"position_embedding_type": "learned"}, ("row_embeddings", "column_embeddings")),
    ],
)
def test_layers_that_an_option_adds_are_taken_over(
    name: str, options: dict[str, Any], layers: tuple[str, ...]
) -> None:
    adapter, detector = build(name, **options), build_plain(name, **options)
    origins = initialise(detector, pretrained_state(adapter))
    for layer in layers:
        assert [origin for key, origin in origins.items() if key.endswith(layer)] == ["pre-trained"], origins


def test_every_layer_of_d_fine_learns_from_its_own_predictions() -> None:
    """Edges of all layers are pulled to the boxes that go with them, and every class layer learns."""
    detector = build_plain("d_fine", num_denoising=8).train()
    target = {"boxes": boxes(2), "labels": torch.tensor([1, 2])}
    losses = detector([i.clone() for i in IMAGES], [target, target])
    network = detector.network
    sum(losses.values()).backward()
    for layer in (
        *network.class_embed,
        *(lqe.reg_conf.layers[-1] for lqe in network.model.decoder.lqe_layers),
    ):
        assert layer.weight.grad.abs().sum() > 0
    pickle.dumps(detector)
    recorded: dict[str, Any] = {}

    def loss(*call: Any, **others: Any) -> tuple[torch.Tensor, dict[str, Any], None]:
        recorded.update(classes=call[5], boxes=call[6], **others)
        return call[0].sum(), {}, None

    network.loss_function = partial(with_first_prediction, loss)
    labels = [{"boxes": torch.rand(2, 4) * 0.2 + 0.3, "class_labels": torch.tensor([0, 1])}] * 2
    outputs = detector.run(IMAGES, labels)
    assert recorded["classes"].shape[1] == recorded["predicted_corners"].shape[1] == 3
    torch.testing.assert_close(recorded["boxes"], outputs.intermediate_reference_points[:, 1:])
    kinds = ("loss_vfl", "loss_bbox", "loss_giou")
    assert set(outputs.loss_dict) == {f"{kind}{of}_pre" for kind in kinds for of in ("", "_dn_0")}


def test_square_batches_have_the_size_drawn_for_their_squarest_image() -> None:
    detector = build_plain("rt_detr_v2").train()
    detector.resize_in_training = False
    sides = ((32, 160), (128, 96), (160, 120), (160, 240))  # the first is bounded, the second was drawn
    pixels, _ = detector._batch([torch.rand(3, *side) for side in sides])
    assert pixels.shape == (4, 3, 96, 96)


@pytest.mark.parametrize("name", ["rt_detr_v2", "d_fine", pytest.param("rt_detr", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [True, False])
def test_anchors_are_exact_in_half_precision(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = build_plain(name)
    model, types = detector.train(training).network.model, []
    generate = model.generate_anchors

    def anchors(*args: Any, **settings: Any) -> Any:
        types.append(settings["dtype"])
        return generate(*args, **settings)

    monkeypatch.setattr(model, "generate_anchors", anchors)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        detector.run(IMAGES)
    assert types == [torch.float32]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_boxes_has_a_gradient_for_every_weight(name: str) -> None:
    """Other processes wait for it."""
    detector = build_plain(name).train()
    without = []
    for count in (2, 0):
        detector.zero_grad()
        targets = [
            {"boxes": boxes(2)[:count], "labels": torch.ones(count, dtype=torch.int64)} for _ in IMAGES
        ]
        sum(detector(IMAGES, targets).values()).backward()
        without.append({n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None})
    assert without[1] == without[0]


@pytest.mark.parametrize("learns", [True, False])
def test_boxes_that_are_not_finite_are_told_so(learns: bool) -> None:
    adapter = build("detr", objectness=True)
    with torch.no_grad():
        adapter.detector.network.bbox_predictor.layers[-1].bias.fill_(float("nan"))
    message = "the predicted boxes are not finite"
    with torch.set_grad_enabled(learns), pytest.raises(FloatingPointError, match=message):
        adapter(IMAGES, [boxes(3), boxes(2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("trunk", "theirs"),
    [("tf_efficientnet_lite0", FrozenBatchNormAct2d), ("resnet18", FrozenBatchNorm2d)],
)
def test_frozen_norms_are_those_of_their_libraries(trunk: str, theirs: Any, dtype: torch.dtype) -> None:
    detector: Any = build_detector("detr", num_classes=3, trunk=trunk, fpn_channels=32)
    torch.manual_seed(0)
    norms = [module for module in detector.modules() if isinstance(module, theirs)]
    activations = {str(getattr(norm, "act", "")): norm for norm in norms}
    assert len(activations) == (2 if theirs is FrozenBatchNormAct2d else 1)
    for norm in activations.values():
        for name, value in norm.named_buffers():
            value.uniform_(0.5 if name == "running_var" else -1.0, 1.5)
        x = torch.randn(2, len(norm.weight), 5, 7, dtype=dtype, requires_grad=True)
        same = x.detach().clone().requires_grad_()
        ours, expected = norm.train()(x * 1), theirs.forward(norm, same * 1)
        assert type(norm) is not theirs
        assert ours.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 0.03
        torch.testing.assert_close(ours.float(), expected.float(), atol=tolerance, rtol=tolerance)
        pairs = ((ours, x), (expected, same))
        grads = (torch.autograd.grad(y.float().square().sum(), z)[0].float() for y, z in pairs)
        torch.testing.assert_close(*grads, atol=2 * tolerance, rtol=3 * tolerance)


def test_settings_that_do_not_train_are_not_offered() -> None:
    assert "two_stage" not in family_of("deformable_detr").shared_options()
    assert "num_queries" in family_of("deformable_detr").shared_options()
    with pytest.raises(ValueError, match="num_feature_levels must be at least 3, not 2"):
        build("deformable_detr", num_feature_levels=2)
    build("deformable_detr", num_feature_levels=3)
    for name in ("conditional_detr", "rt_detr", "d_fine", "dab_detr"):
        hidden = {"decoder_layerdrop", "learn_initial_query", "eval_idx", "random_refpoints_xy"}
        assert hidden.isdisjoint(family_of(name).shared_options())


@pytest.mark.parametrize("name", ["detr", pytest.param("dab_detr", marks=pytest.mark.slow)])
def test_dilation_doubles_the_places(name: str, tmp_path: Path) -> None:
    """The DC5 variants of the detectors with one map; transformers alone builds them as well."""
    places = []
    for dilation in (False, True):
        settings = {"encoder_layers": 1, "decoder_layers": 1, "num_queries": 5, "dilation": dilation}
        detector: Any = build_detector(
            name, num_classes=2, trunk="resnet50", min_size=96, max_size=128, options=settings
        ).eval()
        assert detector.network.config.backbone_config.output_stride == (16 if dilation else None)
        maps: list[torch.Tensor] = []
        detector.backbone.body.register_forward_hook(lambda *call, maps=maps: maps.append(call[2][-1]))
        with torch.inference_mode():
            detector.run([torch.rand(3, 96, 128)])
        places.append(tuple(maps[0].shape[-2:]))
    assert places == [(3, 4), (6, 8)]
    save_detector(tmp_path, detector, {"architecture": {}})
    theirs = from_transformers("AutoModelForObjectDetection").from_pretrained(tmp_path).eval()
    pixels, mask = torch.rand(1, 3, 96, 128), torch.ones(1, 96, 128, dtype=torch.int64)
    with torch.inference_mode():
        ours = detector.network(pixel_values=pixels, pixel_mask=mask).pred_boxes
        torch.testing.assert_close(theirs(pixel_values=pixels, pixel_mask=mask).pred_boxes, ours)


@pytest.mark.parametrize("name", NAMES)
def test_without_gradient_predicts_the_same_and_has_no_losses(name: str) -> None:
    calm = {"dropout": 0.0} if "dropout" in family_of(name).shared_options() else {}
    adapter = build(name, objectness=True, **calm)
    proposals = [boxes(4), boxes(5)]
    with torch.no_grad():
        for head in adapter.detector.prediction_heads:
            for parameter in head.parameters():
                # so that layers match differently; RF-DETR's sides are exponentials
                parameter.add_(torch.randn_like(parameter), alpha=0.3 if name == "rf_detr" else 1.0)
    learning = adapter(IMAGES, proposals)
    with torch.no_grad():
        quiet = adapter(IMAGES, proposals)
    assert learning.losses
    assert not quiet.losses
    assert len({tuple(stage.proposal_ids.tolist()) for stage in learning.stages}) == 3
    for ours, theirs in zip(quiet.stages, learning.stages, strict=True):
        assert torch.equal(ours.proposal_ids, theirs.proposal_ids)
        torch.testing.assert_close(ours.embeddings, theirs.embeddings)
    assert adapter(IMAGES, proposals).losses


@pytest.mark.parametrize(
    ("half", "learns", "fused"), [(False, True, True), (True, False, True), (True, True, False)]
)
def test_attention_that_learns_in_bfloat16_on_a_cpu_is_not_fused(
    half: bool, learns: bool, fused: bool
) -> None:
    adapter, seen = build("detr", objectness=True), []
    enabled = torch.backends.cuda.flash_sdp_enabled  # means the CPU's, too
    adapter.detector.network.register_forward_pre_hook(lambda *_: seen.append(enabled()))
    with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.set_grad_enabled(learns):
        adapter(IMAGES, [boxes(4), boxes(5)])
    assert seen == [fused]
    assert enabled()


def test_labels_are_from_one_on_where_transformers_has_them_from_zero() -> None:
    """A detector that is sure of one class finds this class, and loses least where it is the label."""
    detector = build_plain("detr", dropout=0.0)
    bias, losses = detector.network.class_labels_classifier.bias.data, []
    for sure in (1, 2, 3):
        bias.copy_(torch.full((4,), -20.0))[sure - 1] = 20.0
        with torch.inference_mode():
            assert set(detector.eval()(IMAGES[:1])[0]["labels"].tolist()) == {sure}
        targets = [[{"boxes": boxes(1), "labels": torch.tensor([label])}] for label in (1, 2, 3)]
        losses.append([float(detector.train()(IMAGES[:1], target)["ce"]) for target in targets])
    assert torch.tensor(losses).argmin(1).tolist() == [0, 1, 2]


def test_the_class_layer_learns_clusters() -> None:
    adapter, losses = build("detr", dropout=0.0), []
    bias = adapter.detector.network.class_labels_classifier.bias.data
    for sure in (3, 7):
        bias.fill_(-20.0)[sure] = 20.0
        outputs = [adapter(IMAGES[:1], [boxes(1)], [torch.tensor([cluster])]) for cluster in (3, 7)]
        losses.append([output.losses["ce"].item() for output in outputs])
    assert torch.tensor(losses).argmin(1).tolist() == [0, 1]


def test_boxes_are_pixels_here_and_shares_there() -> None:
    image = torch.zeros(3, 100, 200)
    targets = relative_targets(image, torch.tensor([[20.0, 10.0, 60.0, 50.0]]), torch.tensor([2]))
    torch.testing.assert_close(targets["boxes"], torch.tensor([[0.2, 0.3, 0.2, 0.4]]))
    detector = build_plain("detr", dropout=0.0).eval()
    last = detector.network.bbox_predictor.layers[-1]
    nn.init.zeros_(last.weight)
    for share, box in (
        ([0.5, 0.5, 0.5, 0.25], [50.0, 37.5, 150.0, 62.5]),
        ([0.75, 0.5, 0.75, 0.25], [75.0, 37.5, 200.0, 62.5]),  # reaches beyond the image
    ):
        last.bias.data = torch.tensor(share).logit()
        with torch.inference_mode():
            found = detector([image])[0]["boxes"]
        torch.testing.assert_close(found, torch.tensor(box).expand(12, 4))


@pytest.mark.parametrize("name", NAMES)
def test_the_embeddings_of_a_layer_go_with_what_it_predicts(name: str) -> None:
    adapter = build(name, objectness=True)
    states: list[torch.Tensor] = []
    layers: list[torch.Tensor] = []
    embedded, matched = adapter._stages, adapter._match

    def recorded(given: torch.Tensor, ids: torch.Tensor, images: int) -> Any:
        states.append(given)
        return embedded(given, ids, images)

    def watched(layer: Any, labels: Any) -> Any:
        layers.append(layer["logits"])
        return matched(layer, labels)

    adapter._stages, adapter._match = recorded, watched
    with torch.no_grad():
        stages = adapter(IMAGES, [boxes(3), boxes(2)]).stages
    parts = dict(adapter.detector.network.named_modules())
    head = parts[
        next(n for n in ("class_labels_classifier", "class_embed", "model.decoder.class_embed") if n in parts)
    ]
    heads = list(head) if isinstance(head, nn.ModuleList) else [head] * 3
    for stage, layer, state, logits in zip(stages, heads, states[0], layers, strict=True):
        torch.testing.assert_close(layer(state).unflatten(0, (2, 12)), logits)
        torch.testing.assert_close(stage.embeddings, adapter.projection_head(state))
    assert not torch.allclose(layers[0], layers[-1])


@pytest.mark.parametrize("name", ["detr", "conditional_detr"])
def test_every_layer_predicts_as_a_decoder_of_so_many_layers(name: str) -> None:
    """transformers without losses of all layers, as in its checkpoints, has no norm between layers."""
    detector = build_plain(name, dropout=0.0)
    for norm in detector.modules():
        if isinstance(norm, nn.LayerNorm):  # the first weights of all norms are alike
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.bias)
    targets = [{"boxes": boxes(2), "labels": torch.tensor([1, 2])} for _ in IMAGES]
    labels = [relative_targets(i, t["boxes"], t["labels"]) for i, t in zip(IMAGES, targets, strict=True)]
    outputs = detector.run(IMAGES, labels)
    layers = [*outputs.auxiliary_outputs, {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}]
    assert len(layers) == 3
    plain = type(detector.network)(detector.network.config)
    plain.config.auxiliary_loss = False
    plain.load_state_dict(detector.network.state_dict())
    detector.network = plain.eval()
    whole = plain.model.decoder.layers
    for count, layer in enumerate(layers, 1):
        plain.model.decoder.layers = whole[:count]
        alone = detector.run(IMAGES)
        torch.testing.assert_close(layer["logits"], alone.logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer["pred_boxes"], alone.pred_boxes, atol=1e-5, rtol=1e-4)
