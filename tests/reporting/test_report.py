"""Report pages of small folders in the form that the commands write."""

from __future__ import annotations

import io
import json
import re
import tarfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aligndet import cli
from aligndet.commands.report import report
from aligndet.comparison import Cell, rows_of
from aligndet.data.formats import read_labelled
from aligndet.detectors.build import build_detector
from aligndet.detectors.weights import save_weights
from aligndet.reporting.details import detail_plots
from aligndet.reporting.figures import comparison_plots, pretraining_losses, run_colours, run_plots
from aligndet.reporting.page import comparison_section
from aligndet.reporting.pictures import draw_sides, sides_of
from aligndet.reporting.plots import colours_of, draw_bars
from aligndet.reporting.pretraining import proposal_pictures
from aligndet.reporting.runs import Comparison, read_curves, read_folders, read_run
from aligndet.verdicts import sentence

EVIL = "<script>alert(1)</script>"
LABELS = {0.1: 10, 1.0: 100}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def run_folder(
    folder: Path, settings: dict[str, Any], metrics: str = "step,loss/total\n0,2.0\n1,1.5\n"
) -> Path:
    record = {"command": "aligndet finetune 'a & b.json'", "versions": {"torch": "2.9"}, "settings": settings}
    write(folder / "run.json", record)
    write(folder / "logs" / "csv" / "metrics.csv", metrics)
    return folder


DETAILS = {
    "iou": 0.5,
    "score": 0.3,
    "classes": {
        name: {"objects": objects, "AP50": 0.5} for name, objects in ((EVIL, 7.0), ("5$ and 6$", 3.0))
    },
    "errors": {"class": {"count": 2.0, "AP50_lost": 0.02}, "missed": {"count": 1.0, "AP50_lost": None}},
    "confusion": {"names": [EVIL, "5$ and 6$", "background"], "counts": [[5, 1, 1], [0, 3, 0], [4, 0, 0]]},
    "curves": {
        "score": [0.0, 0.5, 1.0],
        "recall": [0.0, 0.5, 1.0],
        "mean": {"F1": [0.4, 0.6, None], "precision_at_recall": [0.9, 0.6, 0.0]},
        "classes": {
            name: {"F1": [0.4, 0.6, None], "precision_at_recall": [0.9, 0.6, 0.0]}
            for name in (EVIL, "5$ and 6$")
        },
    },
}


def comparison_folder(folder: Path) -> Path:
    """A finished comparison of two arms with six pairs, in the form of `aligndet compare`."""
    cells = []
    for fraction in LABELS:
        for seed in range(6):
            for arm, gain in (("scratch", 0.0), ("aligndet", 0.1)):
                cell = Cell(fraction, 5, seed, 0, arm)
                ap = 0.2 + gain + 0.2 * fraction + 0.01 * seed
                result = {"AP": ap, "AP_by_class": {EVIL: ap, "5$ and 6$": 0.5, "unseen": None}}
                entry = {"fraction": fraction, "steps": 5, "seed": seed, "fold": 0, "arm": arm}
                cells.append({**entry, "labels": LABELS[fraction], "learning_rate": 1e-3, "figures": result})
                made = run_folder(folder / "cells" / cell.name(1e-3), {"annotations": "train.json"})
                write(made / "result.json", {**result, "details": DETAILS})
    results = {"rows": rows_of(cells), "cells": cells, "planned": len(cells), "remarks": []}
    call = {"command": "aligndet compare train.json", "versions": {"torch": "2.9"}}
    write(folder / "results.json", {**results, **call})
    write(folder / "compare.json", {"settings": {"detector": "fcos"}, **call})
    return folder


class _Page(HTMLParser):
    """Tags, attributes and text, as a browser would take them."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_comparison_and_runs_on_one_page(tmp_path: Path) -> None:
    compared = comparison_folder(tmp_path / "compared")
    metrics = "step,loss/total,loss/contrast\n0,3,2\n1,2,1\n"
    pretrained = run_folder(tmp_path / "quick" / "pretrained", {"images": "train"}, metrics)
    for side, ap in (("without", 0.25), ("with", 0.35)):
        run_folder(
            tmp_path / "quick" / side, {"annotations": "t.json"}, "step,loss/total,val/AP\n0,2,\n0,,0.1\n"
        )
        write(tmp_path / "quick" / f"{side}.json", {"AP": ap, "AP_by_class": {"cup": ap}})
    arguments = ["report", str(compared), str(pretrained.parent), "--output", str(tmp_path / "page.html")]
    assert cli.main(arguments) == 0
    page = _Page(tmp_path / "page.html")
    rows = read_folders([compared])[0][0].rows
    for row in rows:
        assert sentence(row) in page.text
    assert page.text.index("aligndet helps by +10.0") < page.text.index("labelled images")  # the answer first
    assert "The best mean F1: scratch 0.60 at 0.50, aligndet 0.60 at 0.50." in page.text
    assert "The area under a curve is AP50: scratch 50.0, aligndet 50.0." in page.text
    assert "<0.001" not in page.text  # of six pairs, none can be
    assert "0.031" in page.text
    for expected in ("aligndet compare train.json", "aligndet finetune 'a & b.json'", "torch 2.9", '"fcos"'):
        assert expected in page.text
    assert "Losses of pre-training, quick/pretrained" in page.text
    assert "35.0" in page.text  # the AP of quick/with
    assert "No images were given" in page.text
    names = {path.name for path in (tmp_path / "page_files").iterdir()}
    comparison = {"ap_labels", "ap_class", "loss", "precision_recall", "f1", "errors"}
    comparison |= {"confusion1", "confusion2"}  # of each arm; and one budget alone is no axis
    single = {"runs_ap_steps.png", "runs_ap_class.png", "runs_loss.png", "run1_loss.png"}
    assert names == {f"comparison1_{name}.png" for name in comparison} | single
    assert sum(tag == "img" for tag, _ in page.tags) == len(names)


def test_the_page_needs_no_other_file_and_escapes_names(tmp_path: Path) -> None:
    page = _Page(report((comparison_folder(tmp_path / "a<mark>"),), output=tmp_path / "page.html"))
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    assert len(links) >= 5
    assert all(str(link).startswith(("data:", "#section")) for link in links)
    html = re.sub(r"base64,[^\"]+", "", (tmp_path / "page.html").read_text())
    assert "http" not in html
    assert "@import" not in html
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any(tag == "mark" for tag, _ in page.tags)
    assert EVIL in page.text


def test_each_comparison_is_a_section_under_its_detector(tmp_path: Path) -> None:
    folders = tuple(comparison_folder(tmp_path / name) for name in ("first", "second"))
    settings = {"detector": "faster_rcnn", "trunk": "resnet18"}
    write(folders[1] / "compare.json", {"settings": settings})
    html = report(folders, output=tmp_path / "page.html").read_text()
    assert re.findall(r"<h2>(.*)</h2>", html) == ["fcos", "faster_rcnn"]
    assert "resnet18 · folder second · 24 fine-tunings" in html
    assert re.findall(r'<li><a href="#section(\d)">(\w+)</a>: aligndet helps by', html) == [
        ("1", "fcos"),
        ("2", "faster_rcnn"),
    ]


def test_what_is_missing_or_mixed_is_said(tmp_path: Path) -> None:
    folder = comparison_folder(tmp_path / "compared")
    finished = _Page(report((folder,), output=tmp_path / "page.html"))
    assert "folder compared · 24 fine-tunings" in finished.text
    for text in ("first call", "different versions", "rate tried"):
        assert text not in finished.text
    results = json.loads((folder / "results.json").read_text())
    results |= {"command": "aligndet compare --seeds 3", "versions": {"torch": "2.10"}}
    results |= {"planned": 30, "remarks": ["seed 5 has failed: <out of memory>"]}
    for cell in results["cells"]:
        cell |= {"searched": [1e-3, 1e-2], "search_AP": [0.3, 0.2]}
        cell["figures"]["mask_AP"] = 0.125
    write(folder / "results.json", {**results, "rows": rows_of(results["cells"])})
    run = next((folder / "cells").iterdir()) / "run.json"
    write(run, {**json.loads(run.read_text()), "versions": {"torch": "2.8"}})
    page = _Page(report((folder,), output=tmp_path / "page.html"))
    assert "folder compared · 24 of 30 fine-tunings" in page.text
    assert "seed 5 has failed: <out of memory>" in page.text
    mixed = re.search(r"Cells were made with different versions: torch (2\.\d) and (2\.\d)\.", page.text)
    assert mixed is not None
    assert {*mixed.groups()} == {"2.8", "2.9"}
    assert "0.001, the smallest learning rate tried, was best at 10 labelled images" in page.text
    settings = page.text[page.text.index("Commands and settings") :]
    assert settings.index("--seeds 3") < settings.index("first call") < settings.index("compare train.json")
    assert settings.index("torch 2.10") < settings.index("first call")
    for text in ("learning rate", "0.001", "AP of boxes", "AP of masks", "12.5"):
        assert text in page.text


def test_only_a_proven_gain_has_a_worth_on_the_page(tmp_path: Path) -> None:
    folder = comparison_folder(tmp_path / "compared")
    text = _Page(report((folder,), output=tmp_path / "page.html")).text
    assert "scratch needs about 36 labelled images" in text
    results = json.loads((folder / "results.json").read_text())
    few = [cell for cell in results["cells"] if cell["seed"] < 3]
    write(folder / "results.json", {**results, "cells": few, "rows": rows_of(few)})
    (comparison,) = read_folders([folder])[0]
    table = comparison_section(comparison, []).table
    column = [row[table.heads.index("scratch needs")] for row in table.rows]
    assert column == [None] * 4


def test_logs_of_a_resumed_run_are_joined(tmp_path: Path) -> None:
    write(tmp_path / "csv" / "metrics.csv", "step,loss,val/AP\n0,1.0,\n9,2.0,\n12,99,\n15,98,0.5\n")
    write(tmp_path / "csv_from_100" / "metrics.csv", "step,loss\n100,5.0\n")
    write(tmp_path / "csv_from_10" / "metrics.csv", "step,loss\n12,3.0\n14,nan\n100,97\n")
    curves = read_curves(tmp_path)
    assert curves == {"loss": {0: 1.0, 9: 2.0, 12: 3.0, 100: 5.0}, "val/AP": {15: 0.5}}


def test_proposals_are_shown_on_images_out_of_tars(tmp_path: Path) -> None:
    Image.new("RGB", (80, 60), "green").save(tmp_path / "0.png")
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        archive.add(tmp_path / "0.png", "0.png")
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 40, 40], "area": 1600, "iscrowd": 0}
    image = {"id": 1, "file_name": "0.tar/0.png", "width": 80, "height": 60}
    gone = {**image, "id": 2, "file_name": "0.tar/-.png"}, {**box, "id": 2, "image_id": 2}  # comes first
    document = {
        "images": [image, gone[0]],
        "annotations": [box, gone[1]],
        "categories": [{"id": 1, "name": "object"}],
    }
    (tmp_path / "proposals.json").write_text(json.dumps(document))
    settings = {"images": str(tmp_path), "proposals": str(tmp_path / "proposals.json"), "max_proposals": 5}
    (tmp_path / "run.json").write_text(json.dumps({"settings": settings}))
    (shown,) = proposal_pictures("run", tmp_path, count=2)
    ((name, (drawn,)),) = shown.rows
    assert name == "0.tar/0.png"
    colours = np.asarray(Image.open(io.BytesIO(drawn))).reshape(-1, 3)
    assert np.ptp(colours, axis=0).max() > 50  # a box on the plain ground


def test_predictions_side_by_side(tmp_path: Path) -> None:
    architecture: dict[str, Any] = {"detector": "fcos", "trunk": "resnet18", "fpn_channels": 64}
    architecture |= {"num_classes": 1, "min_size": 64, "max_size": 64}
    detector = build_detector(**architecture, trunk_weights="none")
    manifest = {"kind": "detector", "architecture": architecture, "class_names": ["cup"], "category_ids": [1]}
    runs = tuple(run_folder(tmp_path / name, {"annotations": "t.json"}) for name in ("first", "second"))
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "a&b.png")
    missing = _Page(report(runs, output=tmp_path / "page.html", images=tmp_path / "images"))
    assert "their folders hold no model" in missing.text
    for run in runs:
        save_weights(run / "model", detector.state_dict(), manifest)
    page = _Page(report(runs, output=tmp_path / "page.html", images=tmp_path / "images"))
    shown = [attrs["alt"] for tag, attrs in page.tags if tag == "img" and "jpeg" in str(attrs["src"])]
    assert shown == [f"a&b.png, {tmp_path.name}/{name}" for name in ("first", "second")]
    assert {path.name for path in (tmp_path / "page_files").glob("*.jpg")} == {
        "runs_predictions1_1.jpg",
        "runs_predictions1_2.jpg",
    }
    info = {"images": [{"id": 1, "file_name": "a&b.png", "width": 64, "height": 64}]}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 32, 32], "area": 1024, "iscrowd": 0}
    labels = {**info, "annotations": [box], "categories": [{"id": 1, "name": "cup"}]}
    write(tmp_path / "images.json", labels)
    (tmp_path / "splits").mkdir()
    write(tmp_path / "splits" / "val.json", labels)  # images are beside neither it nor its folder
    page = _Page(
        report(
            runs,
            output=tmp_path / "page.html",
            images=tmp_path / "images",
            annotations=tmp_path / "splits" / "val.json",
        )
    )
    shown = [str(attrs["alt"]) for tag, attrs in page.tags if tag == "img" and "jpeg" in str(attrs["src"])]
    assert shown[0] == "a&b.png, labels"
    assert len(shown) == 3
    # labels are of files, not of names: those of the folder above hold, those of another folder do not
    coco = read_labelled(tmp_path / "images.json")
    above = replace(coco, folder=tmp_path, file_names=["images/a&b.png"])
    for labelled, sides in ((above, 3), (replace(coco, folder=tmp_path), 2)):
        settings: dict[str, Any] = {"count": 1, "score": 0.3}
        drawn = draw_sides(
            "p", [(r.name, read_run(r)) for r in runs], tmp_path / "images", labelled, **settings
        )
        assert len(drawn.rows[0][1]) == sides


def test_the_best_arm_stands_beside_its_own_scratch(tmp_path: Path) -> None:
    cells = []
    for arm, seed, ap in (
        ("scratch", 0, 0.25),
        ("boxes-only", 1, 0.3),
        ("aligndet", 1, 0.4),
        ("aligndet", 0, 0.35),
        ("scratch", 1, 0.27),
        ("scratch", 2, 0.5),
    ):
        run = run_folder(tmp_path / f"{arm}{seed}", {})
        write(run / "model" / "manifest.json", {})
        entry = {"fraction": 1.0, "labels": 9, "steps": 5, "seed": seed, "fold": 0, "arm": arm}
        cells.append((entry | {"figures": {"AP": ap}}, read_run(run)))
    chosen = sides_of(Comparison("c", {}, [], cells, tmp_path, len(cells)))
    assert [(arm, run.folder.name) for arm, run in chosen] == [
        ("scratch", "scratch1"),
        ("aligndet", "aligndet1"),
    ]


def test_figures_are_drawn_in_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    for place in ("figures.draw_panels", "details.draw_panels", "details.draw_bars", "details.draw_matrix"):
        monkeypatch.setattr(
            f"aligndet.reporting.{place}", lambda name, _, what, *__, **___: drawn.update({name: what})
        )
    (comparison,) = read_folders([comparison_folder(tmp_path / "compared")])[0]
    comparison_plots(comparison, "c")
    ((panel, lines),) = drawn["c_ap_labels"].items()
    assert panel == "5 steps"
    for line, mean in zip(lines, (24.5, 34.5), strict=True):
        assert line.values == pytest.approx({10: mean, 100: mean + 18})
        assert line.spread == pytest.approx(dict.fromkeys((10, 100), 3.5**0.5))
    tuned = run_folder(tmp_path / "run", {"annotations": "t.json"}, "step,val/AP\n3,0.125\n")
    run_plots([read_run(tuned)])
    assert drawn["runs_ap_steps"][""][0].values == {3: 12.5}


def test_figures_of_other_weights_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "run", {"annotations": "t.json"})
    weights = run / "model" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"123456789")
    write(tmp_path / "run.json", {"AP": 0.5, "weights": "cbf43926"})  # CRC-32's check value
    assert read_run(run).figures["AP"] == 0.5
    weights.write_bytes(b"others")
    assert not read_run(run).figures
    assert "run.json: is of other weights" in capsys.readouterr().out
    write(tmp_path / "run.json", {"AP": 0.5})  # of before there were fingerprints
    assert read_run(run).figures["AP"] == 0.5


def test_detectors_of_other_classes_are_drawn_where_they_have_them() -> None:
    other = json.loads(json.dumps(DETAILS).replace("5$ and 6$", "cat"))
    plots = detail_plots("d", "", {"one": [DETAILS], "two": [other]}, colours_of(["one", "two"]))
    assert {"d_precision_recall", "d_f1"} <= {plot.name for plot in plots}


def test_of_many_runs_the_nine_best_are_drawn(tmp_path: Path) -> None:
    metrics = "step,loss/total,val/AP\n0,2,\n0,,{}\n1,1,\n1,,{}\n"
    folders = [
        run_folder(tmp_path / str(i), {"annotations": "t"}, metrics.format(1 - i / 99, i / 99))
        for i in range(40)
    ]
    write(tmp_path / "0.json", {"AP": 0.9})  # as measured afterwards
    runs = read_folders([*folders, tmp_path / "0.json"])[1]
    best = {f"{tmp_path.name}/{i}" for i in (0, *range(32, 40))}
    assert set(run_colours(runs)) == best
    plots = run_plots(runs)
    assert len(plots) == 2
    for plot in plots:
        assert "The 9 of 40 fine-tunings with the highest AP." in plot.note
        assert plot.svg.count(b"stroke-width: 3") == 9  # entries of the legend
    page = report(tuple(folders), output=tmp_path / "page.html").read_text()
    assert f"{tmp_path.name}/7<" in page  # the table has them all
    assert run_plots(runs[:9])[0].note == ""


def test_of_many_losses_arms_and_classes_some_are_drawn_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["total", *(f"layer{i}" for i in range(9))]
    metrics = f"step,{','.join(f'loss/{name}' for name in names)}\n0,{','.join(map(str, range(10)))}\n"
    (plot,) = pretraining_losses("p", read_run(run_folder(tmp_path / "run", {}, metrics)))
    assert plot.note == "9 of 10 are drawn."
    assert colours_of(names).keys() == set(names[:9])
    details = {name: [DETAILS] for name in names[:2]}
    plots = detail_plots("d", "", details, colours_of(names[:1]))
    assert [plot.name for plot in plots if "confusion" in plot.name] == ["d_confusion1"]
    assert all("1 of 2 are drawn" in plot.note for plot in plots)
    monkeypatch.setattr("aligndet.reporting.plots._BARS", 20)
    classes = {str(i): {"one": 1.0, "two": 2.0} for i in range(12)}
    plot = draw_bars("b", "AP by class", classes, colours_of(["one", "two"]), x="AP", note="Mean.")
    assert plot.note == "Mean. The first 10 of 12."


def test_what_evaluate_has_written_beside_runs_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder(tmp_path / "runs" / "tuned", {"annotations": "t.json"})
    write(tmp_path / "runs" / "tuned.json", {"AP": 0.5})
    write(tmp_path / "runs" / "tuned_files" / "details_f1.png", "")
    (run,) = read_folders(sorted((tmp_path / "runs").iterdir()))[1]
    assert run.figures == {"AP": 0.5}
    named = run_folder(tmp_path / "runs" / "tuned_files", {})  # a run all the same
    assert len(read_folders([tmp_path / "runs" / "tuned", named])[1]) == 2
    monkeypatch.chdir(tmp_path / "runs" / "tuned")
    assert len(read_folders([Path()])[1]) == 1
    with pytest.raises(ValueError, match=r"tuned\.json: is no folder"):
        read_folders([tmp_path / "runs" / "tuned.json"])


def test_the_page_may_lie_beside_the_runs(tmp_path: Path) -> None:
    run_folder(tmp_path / "tuned", {"annotations": "t.json"})
    for _ in range(2):  # the second time there is the page of the first
        report(tuple(tmp_path.iterdir()), output=tmp_path / "page.html")


def test_runs_of_one_name_stay_apart(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / day / "out" / "tuned", {"annotations": "t.json"}) for day in "ab"]
    assert [run.name for run in read_folders(runs)[1]] == [run.as_posix() for run in runs]
    assert [run.name for run in read_folders(runs[:1])[1]] == ["out/tuned"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "x: is not there"),
        ({"x/other.txt": ""}, "x: has neither results.json"),
        ({"x/run.json": "{", "x/a": ""}, r"run\.json: is no JSON"),
        ({"x/results.json": "{}"}, r"results\.json: is no result of aligndet compare"),
        ({"x/run.json": "{}", "x/logs/csv/metrics.csv": "a,b\n1,2\n"}, r"metrics\.csv: is no table"),
    ],
)
def test_what_is_no_run_is_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        report((tmp_path / "x",), output=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
