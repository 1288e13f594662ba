"""KolektorSDD: 399 images of 50 commutators, 52 with cracks,
https://www.vicos.si/resources/kolektorsdd

    ROOT/kos01/Part0.jpg, ROOT/kos01/Part0_label.bmp (0 where there is nothing)

kos26 and kos34 repeat the images of kos01 and kos27 under other labels, and kos21/Part7 is
kos21/Part6: left out, 383 images with 50 cracks remain. `--strips 3` cuts each image into three
equal parts along its longer side, as the few-shot protocol does.
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

from .common import by_stem, cuts, folders, missing, read_mask

PUBLISHED = {"images": 383, "masks": 50}
REPEATED = {("kos26", None), ("kos34", None), ("kos21", "Part7")}


def add_arguments(parser) -> None:
    parser.add_argument("--strips", type=int, default=1,
                        help="equal parts of each image (default 1; few-shot protocol: 3)")


def published(root: Path, strips: int) -> dict[str, int]:
    return PUBLISHED if strips == 1 else {"images": 383 * strips}


def records(root: Path, out: Path, strips: int = 1) -> Iterator[dict]:
    if strips < 1:
        raise ValueError(f"--strips: expected at least 1, got {strips}")
    for item in folders(root.resolve()):
        name = item.name.lower()
        files = by_stem(item) if name.startswith("kos") else {}
        for stem, image in files.items():
            if stem.endswith("_label") or {(name, None), (name, stem)} & REPEATED:
                continue
            mask = files.get(f"{stem}_label")
            if mask is None:
                yield missing(item / f"{stem}_label.bmp")
                continue
            array = read_mask(mask, image)
            for box in cuts(*array.shape, strips):
                x0, y0, x1, y1 = box
                record = {"image": str(image), "labels": {}, "split": "test", "group": name}
                record |= {"box": box} if strips > 1 else {}
                marked = {"mask": str(mask), "labels": {"*": "crack"}}
                yield record | (marked if array[y0:y1, x0:x1].any() else {})
