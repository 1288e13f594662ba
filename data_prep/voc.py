"""PASCAL VOC 2012 segmentation, http://host.robots.ox.ac.uk/pascal/VOC/voc2012

    ROOT/JPEGImages/2007_000032.jpg, ROOT/SegmentationClass/2007_000032.png (palette: 0 background, 1 to 20, 255 void)
    ROOT/ImageSets/Segmentation/{train,val}.txt
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

import numpy as np

from .common import read_mask

PUBLISHED = {"images": 2913, "train bad": 1464, "test bad": 1449, "labels": 20}
CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep sofa train "
           "tvmonitor").split()


def records(root: Path, out: Path) -> Iterator[dict]:
    root = root.resolve()
    root = next((p for p in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012") if (p / "SegmentationClass").is_dir()), root)
    for split, name in (("train", "train"), ("test", "val")):
        for stem in (root / "ImageSets" / "Segmentation" / f"{name}.txt").read_text().split():
            image, mask = root / "JPEGImages" / f"{stem}.jpg", root / "SegmentationClass" / f"{stem}.png"
            values = np.unique(read_mask(mask, image))
            labels = {str(v): CLASSES[v - 1] for v in values if 1 <= v <= 20}
            yield {"image": str(image), "mask": str(mask), "labels": labels, "split": split, "group": stem}
