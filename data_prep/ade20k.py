"""ADE20K, the scene parsing benchmark's release, http://sceneparsing.csail.mit.edu (ADEChallengeData2016.zip)

    ROOT/images/{training,validation}/ADE_train_00000001.jpg
    ROOT/annotations/{training,validation}/ADE_train_00000001.png      0 other, 1 to 150
    ROOT/objectInfo150.txt       Idx  Ratio  Train  Val  Stuff  Name, tabs between
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

import numpy as np

from .common import images, read_mask

PUBLISHED = {"images": 22210, "train bad": 20210, "test bad": 2000}


def records(root: Path, out: Path) -> Iterator[dict]:
    root = root.resolve()
    lines = (root / "objectInfo150.txt").read_text().splitlines()[1:]
    names = {int(line.split("\t")[0]): line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()}
    for split, folder in (("train", "training"), ("test", "validation")):
        for image in images(root / "images" / folder):
            mask = root / "annotations" / folder / f"{image.stem}.png"
            if not mask.is_file():
                raise FileNotFoundError(f"{mask} is missing")
            values = [int(v) for v in np.unique(read_mask(mask, image)) if v]
            yield {"image": str(image), "mask": str(mask), "labels": {str(v): names[v] for v in values}, "split": split,
                   "group": image.stem}
