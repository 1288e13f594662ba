"""VisA: 12 objects, https://github.com/amazon-science/spot-diff (VisA_20220922.tar)

    ROOT/candle/Data/Images/{Normal,Anomaly}/0000.JPG, ROOT/candle/Data/Masks/Anomaly/000.png
    ROOT/candle/image_anno.csv       image,label,mask: label "normal", or the defect types, with commas between several
    ROOT/split_csv/1cls.csv          object,split,label,image,mask: the one-class split

Types come from image_anno.csv. A mask's values are not the same from object to object: every value but 0 is the defect.
"""
from __future__ import annotations

import csv
from pathlib import Path
from typing import Iterator

from .common import folders, read_mask, size

PUBLISHED = {"images": 10821, "good": 9621, "bad": 1200, "masks": 1200, "categories": 12}


def records(root: Path, out: Path) -> Iterator[dict]:
    root = root.resolve()
    splits = {}
    if (root / "split_csv" / "1cls.csv").is_file():
        with open(root / "split_csv" / "1cls.csv", newline="") as file:
            splits = {row["image"]: row["split"] for row in csv.DictReader(file)}
    for category in folders(root):
        if not (category / "image_anno.csv").is_file():
            continue
        with open(category / "image_anno.csv", newline="") as file:
            for row in csv.DictReader(file):
                image = root / row["image"]
                if not image.is_file():
                    raise FileNotFoundError(f"{category / 'image_anno.csv'}: {row['image']} is missing")
                record = {"image": str(image), "labels": {}, "split": splits.get(row["image"], "test"), "group": row["image"],
                          "category": category.name}
                if row["label"] == "normal":
                    size(image)
                    yield record
                else:
                    mask = root / row["mask"]
                    read_mask(mask, image)
                    yield record | {"mask": str(mask), "labels": {"*": ", ".join(t.strip() for t in row["label"].split(","))}}
