"""Plans and statistics of a comparison, against cases worked out by hand."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import pytest

from aligndet.comparison import (
    Cell,
    hold_out,
    labelled_subset,
    labels_for,
    part_of,
    plan,
    rows_of,
    sign_flip_p,
    summarise,
)
from aligndet.verdicts import markdown, sentence

DOCUMENT: dict[str, Any] = {
    "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(10)],
    "annotations": [{"id": 10 * i, "image_id": i} for i in range(10)],
    "categories": [{"id": 1, "name": "coin"}],
}


def _ids(document: dict[str, Any]) -> list[int]:
    return [image["id"] for image in document["images"]]


def test_all_labels_are_one_fold() -> None:
    cells = plan(["scratch", "aligndet"], [0.5, 1.0], [0, 1], [10, 20], [3])
    assert len(cells) == 2 * 2 * 2 + 2 * 2
    assert cells[:2] == [Cell(0.5, 10, 3, 0, "scratch"), Cell(0.5, 10, 3, 0, "aligndet")]
    assert {cell.fold for cell in cells if cell.fraction == 1} == {0}
    assert len({cell.name(1e-3) for cell in cells}) == len(cells)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fractions": [0.0]}, "fractions must be above 0"),
        ({"fractions": [20]}, "at most 1"),
        ({"steps": [0]}, "steps must be at least 1"),
        ({"seeds": [0, 0]}, "seeds must be different values"),
        ({"arms": []}, "arms must be different values, at least one"),
    ],
)
def test_plans_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    good = {"arms": ["scratch"], "fractions": [0.5], "folds": [0], "steps": [1], "seeds": [0]}
    with pytest.raises(ValueError, match=message):
        plan(**{**good, **change})


def test_parts_are_the_whole() -> None:
    cells = plan(["scratch", "aligndet"], [0.5], [0, 1], [10], [0, 1])
    parts = [part_of(cells, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(cell for part in parts for cell in part) == sorted(cells)
    for wrong in ("0/3", "4/3", "2", "a/b", "1/0"):
        with pytest.raises(ValueError, match="I/N"):
            part_of(cells, wrong)


def test_subsets_are_nested_and_folds_differ() -> None:
    few, more = labelled_subset(DOCUMENT, 0.3, 1), labelled_subset(DOCUMENT, 0.6, 1)
    assert len(_ids(few)) == 3
    assert set(_ids(few)) < set(_ids(more))
    assert {a["image_id"] for a in few["annotations"]} == set(_ids(few))
    assert _ids(labelled_subset(DOCUMENT, 0.3, 2)) != _ids(few)
    assert len(_ids(labelled_subset(DOCUMENT, 0.001, 0))) == 1


def test_the_held_out_part_is_not_trained_on() -> None:
    train, held_out = hold_out(DOCUMENT)
    assert (len(_ids(train)), len(_ids(held_out))) == (8, 2)
    assert not set(_ids(train)) & set(_ids(held_out))
    with pytest.raises(ValueError, match="two labelled images"):
        hold_out(labelled_subset(DOCUMENT, 0.1, 0))


def test_sign_flips_by_hand() -> None:
    assert sign_flip_p([1.0]) == 1.0
    assert sign_flip_p([1.0, 2.0, 3.0]) == 2 / 8
    assert sign_flip_p([1.0, 2.0, -3.0]) == 1.0
    # of |±1 ±2 ±4| only +++, ---, and those with the 1 flipped reach 5
    assert sign_flip_p([-1.0, 2.0, 4.0]) == 4 / 8
    assert sign_flip_p([1.0] * 6) == 2 / 64
    assert 0 < sign_flip_p([1.0] * 40) < 1e-3


def test_labels_by_interpolation() -> None:
    curve = {10: 10.0, 100: 20.0, 1000: 40.0}
    assert labels_for(curve, 15.0) == pytest.approx(math.sqrt(10 * 100))
    assert labels_for(curve, 40.0) == pytest.approx(1000)
    assert labels_for(curve, 41.0) is None
    assert labels_for(curve, 9.0) is None
    assert labels_for({10: 5.0, 50: 3.0, 100: 8.0}, 4.0) is None  # fewer than ten do already
    assert labels_for({5: 0.0, 20: 0.0, 100: 12.0}, 0.0) == 5


def test_all_labels_are_the_same_cell_in_every_fold() -> None:
    (first,) = plan(["scratch"], [1.0], [0], [10], [0])
    assert plan(["scratch"], [1.0], [1, 2], [10], [0]) == [first]


def test_arms_whose_rates_were_chosen_from_other_lists_are_no_pairs() -> None:
    arms = {arm: Cell(0.1, 5, 0, 0, arm) for arm in ("scratch", "aligndet", "boxes-only")}
    figures = dict(zip(arms.values(), (0.1, 0.2, 0.3), strict=True))
    searched = {arms["scratch"]: [1e-3], arms["aligndet"]: [1e-4, 1e-3], arms["boxes-only"]: [1e-3]}
    rows = {row["arm"]: row for row in summarise(figures, {0.1: 10}, searched)}
    assert "difference" not in rows["aligndet"]
    assert "1 of its cells" in sentence(rows["aligndet"])
    assert rows["boxes-only"]["difference"] == pytest.approx(20)
    assert "rates" not in sentence(rows["boxes-only"])


@pytest.mark.parametrize(
    ("chosen", "scores", "said"),
    [
        (1e-4, [0.3, 0.2, 0.1], "0.0001, the smallest learning rate tried, was best at"),
        (1e-2, [0.1, 0.2, 0.3], "0.01, the largest learning rate tried, was best at"),
        (1e-3, [0.0, 0.0, 0.0], "several learning rates were equally good at"),
        (1e-3, [0.1, 0.3, 0.2], None),
    ],
)
def test_the_table_says_which_rates_and_where_their_choice_says_little(
    chosen: float, scores: list[float], said: str | None
) -> None:
    entries: list[dict[str, Any]] = [
        {**asdict(Cell(fraction, 5, seed, 0, "scratch")), "labels": labels, "figures": {"AP": 0.1}}
        | {"learning_rate": chosen, "searched": [1e-4, 1e-3, 1e-2], "search_AP": scores}
        for fraction, labels in ((0.1, 10), (1.0, 100))
        for seed in (0, 1)
    ]
    table = markdown(rows_of(entries))
    assert f"| 10 | 5 | scratch | {chosen:g} | 2 | 10.00 |" in table
    tied = " (AP 0.0)" if not any(scores) else ""
    places = f"10 labelled images and 5 steps{tied}, 100 labelled images and 5 steps{tied}; "
    assert table.count(f"scratch: {said} {places}") == (said is not None)
    assert (" rates were " in table or " rate tried" in table) == (said is not None)
    alone = [{**entry, "searched": [chosen], "search_AP": None} for entry in entries]
    assert rows_of(alone)[0]["choices"] == []
    later = {**entries[0], "learning_rate": 5e-4, "seed": 2, "searched": [5e-4], "search_AP": None}
    assert rows_of([*entries, later])[0]["learning_rates"] == sorted([5e-4, chosen])


def test_boxes_and_masks_are_told_apart() -> None:
    entries: list[dict[str, Any]] = [
        {**asdict(Cell(1.0, 5, seed, 0, arm)), "labels": 100, "learning_rate": 1e-3}
        | {"figures": {"AP": 0.3 + gain, "mask_AP": 0.2 + gain + seed / 100}}
        for seed in (0, 2)
        for arm, gain in (("scratch", 0.0), ("aligndet", 0.1))
    ]
    table = markdown(rows_of(entries))
    assert "| AP of boxes | spread | difference | spread | p | AP of masks |" in table
    assert "| aligndet | 0.001 | 2 | 40.00 | 0.00 | 10.00 | 0.00 | 0.5 | 31.00 |" in table
    assert "+10.0 ± 0.0 AP of boxes at 100 labelled images" in table
    del entries[1]["figures"]["mask_AP"]  # of an earlier call with masks left out
    assert "masks_mean" not in rows_of(entries)[1]


def test_rows_of_entries_tell_arms_whose_rates_were_chosen_from_other_lists() -> None:
    entries = [
        {**vars(Cell(0.1, 5, 0, 0, arm)), "labels": 10, "learning_rate": 1e-3}
        | {"searched": searched, "figures": {"AP": figure}}
        for arm, searched, figure in (("scratch", [1e-3], 0.1), ("aligndet", [1e-4, 1e-3], 0.2))
    ]
    (_, row) = rows_of(entries)
    assert row["unlike"] == 1
    assert "difference" not in row
    (_, row) = rows_of([{**entry, "searched": [1e-3]} for entry in entries])
    assert row["difference"] == pytest.approx(10)


def test_what_a_gain_is_worth_is_of_its_own_budget() -> None:
    figures: dict[Cell, float] = {}
    for seed in range(6):
        figures |= {Cell(f, 5, seed, 0, "scratch"): ap for f, ap in ((0.1, 0.1), (1.0, 0.3))}
        figures |= {Cell(f, 50, seed, 0, "scratch"): ap for f, ap in ((0.1, 0.2), (1.0, 0.9))}
        figures[Cell(0.1, 5, seed, 0, "aligndet")] = 0.2
    rows = summarise(figures, {0.1: 10, 1.0: 100})
    (row,) = (row for row in rows if row["arm"] == "aligndet")
    assert row["scratch_labels"] == pytest.approx(math.sqrt(1000))


def _results(gains: list[float]) -> list[dict[str, Any]]:
    figures: dict[Cell, float] = {}
    for seed, gain in enumerate(gains):
        figures[Cell(0.1, 5, seed, 0, "scratch")] = 0.10
        figures[Cell(1.0, 5, seed, 0, "scratch")] = 0.30
        figures[Cell(0.1, 5, seed, 0, "aligndet")] = 0.10 + gain
    return summarise(figures, {0.1: 10, 1.0: 100})


def test_a_gain_is_said_with_its_worth_in_labels() -> None:
    scratch, row, full = _results([0.09, 0.11] * 3)
    assert (scratch["arm"], row["arm"], full["labels"]) == ("scratch", "aligndet", 100)
    assert (row["n"], row["pairs"]) == (6, 6)
    assert row["mean"] == pytest.approx(20)
    assert row["difference"] == pytest.approx(10)
    assert row["difference_spread"] == pytest.approx(math.sqrt(6 / 5))
    assert row["scratch_labels"] == pytest.approx(math.sqrt(1000))
    assert sentence(row) == (
        "aligndet helps by +10.0 ± 1.1 AP at 10 labelled images and 5 steps (n = 6, p = 0.031); "
        "scratch needs about 32 labelled images for the same AP, interpolated."
    )
    assert sentence(scratch) == ""
    assert sentence(row) in markdown([scratch, row, full])
    assert "| 10 | 5 | aligndet |  | 6 | 20.00 | 1.10 | 10.00 | 1.10 | 0.031 |" in markdown([row])


def test_few_pairs_prove_nothing_and_a_loss_is_a_loss() -> None:
    row = _results([0.1, 0.1])[1]
    assert "cannot be told apart from noise (n = 2, p = 0.5); so few pairs never can" in sentence(row)
    assert "p = 0.062); so few pairs never can" in sentence(_results([0.1] * 5)[1])
    assert "so few" not in sentence(_results([0.1, -0.1] * 4)[1])
    assert "does not help, it costs: -5.0" in sentence(_results([-0.05] * 6)[1])
    single = _results([0.1])[1]
    assert single["spread"] is None
    assert "+10.0 AP" in sentence(single)


def test_only_a_proven_gain_has_a_worth_in_labels() -> None:
    assert _results([0.1, 0.1])[1]["scratch_labels"] is None
    figures = {Cell(1.0, 5, seed, 0, "scratch"): 0.3 for seed in range(6)}
    figures |= {Cell(1.0, 5, seed, 0, "aligndet"): 0.2 for seed in range(6)}
    figures[Cell(0.1, 5, 0, 0, "scratch")] = 0.1
    row = summarise(figures, {0.1: 10, 1.0: 100})[2]
    assert (row["p"], row["difference"]) == pytest.approx((2 / 64, -10))
    assert row["scratch_labels"] is None


def test_folds_of_a_seed_are_one_of_several_seeds() -> None:
    gains = {(0, 0): 1.0, (0, 1): 1.1, (0, 2): 0.9, (1, 0): 0.1, (1, 1): 0.2, (1, 2): 0.15}
    figures = {Cell(0.1, 5, *key, "scratch"): 0.1 for key in gains}
    figures |= {Cell(0.1, 5, *key, "aligndet"): 0.1 + gain / 100 for key, gain in gains.items()}
    row = summarise(figures, {0.1: 10})[1]
    assert (row["pairs"], row["units"], row["starts"], row["p"]) == (6, 2, 2, 0.5)
    assert "(n = 6 of 2 seeds, p = 0.5); so few seeds never can" in sentence(row)
    one = {
        cell if cell.arm == "scratch" else replace(cell, arm="from-run-1"): f for cell, f in figures.items()
    }
    assert summarise(one, {0.1: 10})[1]["starts"] == 1
    folds = {replace(cell, seed=0, fold=3 * cell.seed + cell.fold): f for cell, f in figures.items()}
    row = summarise(folds, {0.1: 10})[1]
    assert (row["units"], row["starts"], row["p"]) == (6, 1, 2 / 64)
    assert "(n = 6, p = 0.031), all from one pre-training;" in sentence(row)


def test_what_a_gain_is_worth_is_of_pairs_too() -> None:
    figures = {Cell(0.1, 5, seed, 0, "scratch"): 0.2 if seed < 6 else 0.26 for seed in range(12)}
    figures |= {Cell(0.1, 5, seed, 0, "aligndet"): 0.21 for seed in range(6)}
    figures |= {Cell(1.0, 5, seed, 0, "scratch"): 0.3 for seed in range(6)}
    row = summarise(figures, {0.1: 10, 1.0: 100})[1]
    assert (row["mean"], row["difference"]) == pytest.approx((21, 1))
    assert row["scratch_labels"] == pytest.approx(10 * 10 ** (1 / 7))  # from 23 to 24 of 30


def test_many_tests_are_said_to_be_many() -> None:
    rows = _results([0.1] * 6)
    assert "by chance" not in markdown(rows)
    assert "2 tests, each at 5%, not corrected for their number: 0.1 of them" in markdown([*rows, rows[1]])


def test_only_pairs_are_compared() -> None:
    figures = {
        Cell(0.1, 5, 0, 0, "scratch"): 0.1,
        Cell(0.1, 5, 0, 0, "aligndet"): 0.2,
        Cell(0.1, 5, 1, 0, "aligndet"): 0.9,
    }
    row = summarise(figures, {0.1: 10})[1]
    assert (row["n"], row["pairs"]) == (2, 1)
    assert row["difference"] == pytest.approx(10)
