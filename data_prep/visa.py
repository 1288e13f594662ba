"""VisA: 12 objects, https://github.com/amazon-science/spot-diff (VisA_20220922.tar; counts: its
README)

    ROOT/candle/Data/Images/{Normal,Anomaly}/0000.JPG, ROOT/candle/Data/Masks/Anomaly/000.png
    ROOT/candle/image_anno.csv       image,label,mask: label "normal", or the defect types, with
                                     commas between several
    ROOT/split_csv/1cls.csv          object,split,label,image,mask: the one-class split

Types come from image_anno.csv. A mask's values are not the same from object to object: every value
but 0 is the defect. Without split_csv three quarters of the good images are "train".
"""
from __future__ import annotations

import csv
from pathlib import Path
from typing import Iterator

from .common import child, folders, missing, read_mask, read_text, size, split_of

PUBLISHED = {"images": 10821, "good": 9621, "bad": 1200, "masks": 1200, "categories": 12} | {
    f"category {name}": 100 + good for name, good in dict(
        candle=1000, capsules=602, cashew=500, chewinggum=503, fryum=500, macaroni1=1000,
        macaroni2=1000, pcb1=1004, pcb2=1001, pcb3=1006, pcb4=1005, pipe_fryum=500).items()}


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(read_text(path).splitlines()))


def records(root: Path, out: Path) -> Iterator[dict]:
    root = root.resolve()
    splits = {}
    if (lines := child(root, "split_csv/1cls.csv")).is_file():
        splits = {row["image"]: row["split"] for row in table(lines)}
    for category in folders(root):
        lines = child(category, "image_anno.csv")
        for row in table(lines) if lines.is_file() else []:
            image, mask = child(root, row["image"]), child(root, row["mask"] or "")
            good = row["label"] == "normal"
            if not image.is_file() or not good and not mask.is_file():
                yield missing(mask if image.is_file() else image)
                continue
            split = splits.get(row["image"], "test")
            if good and not splits:
                split = split_of(row["image"])
            record = {"image": str(image), "labels": {}, "split": split, "group": row["image"],
                      "category": category.name}
            if good:
                size(image)
            elif read_mask(mask, image).any():
                types = ", ".join(t.strip() for t in row["label"].split(","))
                record |= {"mask": str(mask), "labels": {"*": types}}
            else:
                record |= {"anomalous": True}
            yield record
