"""Retinal OCT (RESC) as the BMAD benchmark distributes it, https://github.com/DorisBao/BMAD

    ROOT/train/good/*.png, ROOT/{valid,test}/{good,Ungood}/{img,label}/*.png   (masks in label, of the same name)

Counts: Bao et al., BMAD (CVPR workshops 2024), Table 1: 4,297 for training, 1,805 for tests (1,041 good, 764 bad); the validation part is
left out. The slices of one eye share the name before the last underscore.
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

from .common import images, read_mask, size

PUBLISHED = {"images": 6102, "train good": 4297, "test good": 1041, "test bad": 764}


def records(root: Path, out: Path) -> Iterator[dict]:
    root = root.resolve()
    for split, folder in (("train", root / "train" / "good"), ("test", root / "test" / "good"), ("test", root / "test" / "Ungood")):
        inner = folder / "img" if (folder / "img").is_dir() else folder
        for image in images(inner):
            record = {"image": str(image), "labels": {}, "split": split, "group": image.stem.rpartition("_")[0] or image.stem}
            if folder.name != "Ungood":
                size(image)
                yield record
                continue
            mask = folder / "label" / image.name
            if not mask.is_file():
                raise FileNotFoundError(f"{mask} is missing")
            yield record | ({"mask": str(mask), "labels": {"*": "lesion"}} if read_mask(mask, image).any() else {"anomalous": True})
