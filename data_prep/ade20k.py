"""ADE20K, the scene parsing benchmark's release, http://sceneparsing.csail.mit.edu (ADEChallengeData2016.zip)

    ROOT/images/{training,validation}/ADE_train_00000001.jpg
    ROOT/annotations/{training,validation}/ADE_train_00000001.png      0 other, 1 to 150
    ROOT/objectInfo150.txt       Idx  Ratio  Train  Val  Stuff  Name, tabs between; synonyms in Name, commas between

Columns and folders as public readers of the release take them (GitHub search for objectInfo150.txt). Counts: Zhou et al., CVPR 2017.
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

import numpy as np

from .common import first_folder, images, missing, read_mask, read_text

PUBLISHED = {"images": 22210, "train bad": 20210, "test bad": 2000, "labels": 150}


def records(root: Path, out: Path) -> Iterator[dict]:
    root = root.resolve()
    root = root if (root / "images").is_dir() else first_folder(root / "ADEChallengeData2016", root)
    rows = [line.split("\t") for line in read_text(root / "objectInfo150.txt").splitlines()]
    names = {int(row[0]): row[-1].split(",")[0].strip() for row in rows if row[0].strip().isdigit()}
    for split, folder in (("train", "training"), ("test", "validation")):
        for image in images(root / "images" / folder):
            mask = root / "annotations" / folder / f"{image.stem}.png"
            if not mask.is_file():
                yield missing(mask)
                continue
            values = [int(v) for v in np.unique(read_mask(mask, image)) if v]
            if not names.keys() >= set(values):
                raise ValueError(f"{mask}: values {sorted(set(values) - names.keys())[:5]} have no name in objectInfo150.txt")
            yield {"image": str(image), "mask": str(mask), "labels": {str(v): names[v] for v in values}, "split": split,
                   "group": image.stem}
