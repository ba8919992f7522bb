"""What clusters of proposals know of classes, before any training: for the choice of trunk and of image size.

    aligndet cluster ../shared/data/stamps/train --proposals PROPOSALS --min-size 480 --max-size 640
    python benchmarks/clusters.py --data ../shared/data/stamps PROPOSALS ...

Every labelled object has the cluster of the proposal that covers it best. In half of the images, most of a
cluster's objects give it a class; the figure is how many of the other half's objects these name rightly.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt

from aligndet.data.coco import CocoDataset
from aligndet.data.formats import read_labelled
from aligndet.proposals.clusters import clusters_file, read_manifest, with_clusters
from aligndet.proposals.filters import best_proposals
from aligndet.proposals.storage import read_proposals
from aligndet.proposals.table import ProposalTable

Objects = npt.NDArray[np.int64]


def clusters_of(labelled: CocoDataset, table: ProposalTable) -> Objects:
    """Image, class and cluster (n, 3) of all objects of which a proposal covers half or more."""
    positions = {name: position for position, name in enumerate(table.file_names)}
    found = []
    for i, name in enumerate(labelled.file_names):
        kept = ~labelled.iscrowd[i]
        if name in positions and len(boxes := table.boxes_of(positions[name])):
            ious, best = best_proposals(boxes, labelled.boxes[i][kept])
            clusters = table.clusters_of(positions[name], best)
            rows = np.stack([np.full(len(best), i), labelled.labels[i][kept], clusters], 1)
            found.append(rows[ious >= 0.5])
    return np.concatenate(found)


def accuracy(seen: Objects, held_out: Objects) -> float:
    """How many of the held-out objects have the class that most seen ones of their cluster have."""
    counts = np.zeros((max(seen[:, 2].max(), held_out[:, 2].max()) + 1, seen[:, 1].max() + 1), int)
    np.add.at(counts, (seen[:, 2], seen[:, 1]), 1)
    named = counts[held_out[:, 2]]
    return float(((named.argmax(1) == held_out[:, 1]) & (named.max(1) > 0)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("proposals", nargs="+", type=Path, help="of data's train/, with clusters")
    parser.add_argument("--data", type=Path, required=True, help="with train.json and train/")
    args = parser.parse_args()
    labelled = read_labelled(args.data / "train.json", args.data / "train")
    for path in args.proposals:
        objects = clusters_of(labelled, with_clusters(read_proposals(path), path))
        held_out = objects[:, 0] % 2 == 1
        settings = read_manifest(clusters_file(path))["settings"]
        print(
            f"{path}: {settings['trunk']}, {settings['min_size']} x {settings['max_size']} pixels,"
            f" {len(np.unique(objects[:, 2]))} clusters of {len(objects)} objects name"
            f" {100 * accuracy(objects[~held_out], objects[held_out]):.1f} % of {held_out.sum()}"
            f" ({100 * np.bincount(objects[held_out, 1]).max() / held_out.sum():.1f} % are of one class)",
            flush=True,
        )


if __name__ == "__main__":
    main()
