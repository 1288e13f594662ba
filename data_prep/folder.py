"""Your own pictures: the MVTec AD layout, one category or many, or three flat folders.

    ROOT/CATEGORY/train/good/*.png                  ROOT/good/*.png
    ROOT/CATEGORY/test/good/*.png                   ROOT/bad/*.png
    ROOT/CATEGORY/test/TYPE/*.png                   ROOT/mask/*.png      same stem as in bad/,
    ROOT/CATEGORY/ground_truth/TYPE/*_mask.png                           also with _mask

The first is described at https://www.mvtec.com/company/research/datasets/mvtec-ad (readme.txt of
the download) and in anomalib's docs, https://anomalib.readthedocs.io. ROOT may be one category.
Masks are used where they lie: every value but 0 is the defect. A bad image without a mask is kept
as "anomalous".
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

from .common import (by_stem, child, first_folder, folders, images, read_mask, size, split_of,
                     starts_black)

PUBLISHED: dict[str, int] = {}


def records(root: Path, out: Path | None = None) -> Iterator[dict]:
    """Records with absolute paths; nothing is written."""
    root = Path(root).resolve()
    if child(root, "good").is_dir() or child(root, "bad").is_dir():
        yield from flat(root)
        return
    found = False
    for category in [root] if is_category(root) else folders(root):
        if is_category(category):
            found = True
            yield from mvtec_category(category)
    if not found:
        raise ValueError(f"{root}: expected good/ (and bad/, mask/), or train/ and test/ as in "
                         "MVTec AD; found "
                         f"{[p.name for p in folders(root)][:8]}")


def is_category(folder: Path) -> bool:
    return child(folder, "train").is_dir() or child(folder, "test").is_dir()


def mvtec_category(category: Path) -> Iterator[dict]:
    for split in ("train", "test"):
        phase = child(category, split)
        for kind in folders(phase) if phase.is_dir() else []:
            good, masks = is_good(kind), by_stem(child(category, f"ground_truth/{kind.name}"))
            for image in images(kind):
                group = image.relative_to(category.parent).as_posix()
                marks = {} if good else marked(image, masks, kind.name)
                yield part(image, split, group, category.name) | marks


def is_good(folder: Path) -> bool:
    return folder.name.lower() == "good"


def flat(root: Path) -> Iterator[dict]:
    masks = by_stem(first_folder(root, "mask", "masks"))
    for kind in ("good", "bad"):
        folder = child(root, kind)
        for image in images(folder) if folder.is_dir() else []:
            name = image.relative_to(root).as_posix()
            split = split_of(name) if kind == "good" else "test"
            marks = {} if kind == "good" else marked(image, masks, "defect")
            yield part(image, split, name, root.name) | marks


def part(image: Path, split: str, group: str, category: str) -> dict:
    size(image)
    return {"image": str(image), "labels": {}, "split": split, "group": group, "category": category}


def marked(image: Path, masks: dict[str, Path], label: str) -> dict:
    """What the mask of a bad image adds to its record, if there is one that marks anything."""
    mask = masks.get(f"{image.stem}_mask") or masks.get(image.stem)
    if mask is None or not read_mask(mask, image).any():
        return {"anomalous": True}
    if not starts_black(mask):
        raise ValueError(f"{mask}: value 0 of its palette is not black, so what is marked is "
                         "unclear; save it as a grey PNG")
    return {"mask": str(mask), "labels": {"*": label}}
