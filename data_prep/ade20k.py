"""ADE20K, the scene parsing benchmark's release, http://sceneparsing.csail.mit.edu
(ADEChallengeData2016.zip)

    ROOT/images/{training,validation}/ADE_train_00000001.jpg
    ROOT/annotations/{training,validation}/ADE_train_00000001.png      0 other, 1 to 150
    ROOT/objectInfo150.txt       Idx  Ratio  Train  Val  Stuff  Name, tabs between; synonyms in
                                 Name, commas between

Columns and folders as public readers of the release take them (GitHub search for
objectInfo150.txt). Counts: Zhou et al., CVPR 2017.
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

import numpy as np

from .common import child, first_folder, images, missing, read_mask, read_text

PUBLISHED = {"images": 22210, "train bad": 20210, "test bad": 2000, "labels": 150}


def records(root: Path, out: Path) -> Iterator[dict]:
    root = root.resolve()
    if not child(root, "images").is_dir():
        root = first_folder(root, "ADEChallengeData2016", ".")
    rows = [line.split("\t") for line in read_text(child(root, "objectInfo150.txt")).splitlines()]
    names = {int(row[0]): row[-1].split(",")[0].strip() for row in rows if row[0].strip().isdigit()}
    for split, folder in (("train", "training"), ("test", "validation")):
        masks = child(root, f"annotations/{folder}")
        for image in images(child(root, f"images/{folder}")):
            mask = masks / f"{image.stem}.png"
            if not mask.is_file():
                yield missing(mask)
                continue
            values = [int(v) for v in np.unique(read_mask(mask, image)) if v]
            if not names.keys() >= set(values):
                unknown = sorted(set(values) - names.keys())[:5]
                raise ValueError(f"{mask}: values {unknown} have no name in objectInfo150.txt")
            labels = {str(v): names[v] for v in values}
            yield {"image": str(image), "mask": str(mask), "labels": labels, "split": split,
                   "group": image.stem}
