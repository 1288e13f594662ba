"""PASCAL VOC 2012 segmentation, http://host.robots.ox.ac.uk/pascal/VOC/voc2012 (development kit,
sec. 3 and 4)

    ROOT/JPEGImages/2007_000032.jpg
    ROOT/SegmentationClass/2007_000032.png          palette: 0 background, 1 to 20, 255 void
    ROOT/ImageSets/Segmentation/{train,val}.txt     ROOT: VOC2012, VOCdevkit or the folder around it

Void pixels, the seams around objects, become 0 (unlabelled) in a copy of the mask: elsewhere in the
project every value has a name.
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

import numpy as np

from .common import child, first_folder, missing, read_mask, read_text, write_png

PUBLISHED = {"images": 2913, "train bad": 1464, "test bad": 1449, "labels": 20}
CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
           "motorbike person pottedplant sheep sofa train tvmonitor").split()


def records(root: Path, out: Path) -> Iterator[dict]:
    root = root.resolve()
    if not child(root, "SegmentationClass").is_dir():
        root = first_folder(root, "VOC2012", "VOCdevkit/VOC2012", ".")
    photographs, masks = child(root, "JPEGImages"), child(root, "SegmentationClass")
    for split, name in (("train", "train"), ("test", "val")):
        for stem in read_text(child(root, f"ImageSets/Segmentation/{name}.txt")).split():
            image, mask = photographs / f"{stem}.jpg", masks / f"{stem}.png"
            if not image.is_file() or not mask.is_file():
                yield missing(mask if image.is_file() else image)
                continue
            array = read_mask(mask, image)
            array = np.where(array == 255, 0, array)
            if array.max() > 20:
                raise ValueError(f"{mask}: expected 0 to 20 and 255, got {array.max()}; "
                                 "is it from SegmentationClass?")
            labels = {str(v): CLASSES[v - 1] for v in np.unique(array) if v}
            copy = write_png(out / "masks" / f"{stem}.png", array)
            yield {"image": str(image), "mask": str(copy), "labels": labels, "split": split,
                   "group": stem}
