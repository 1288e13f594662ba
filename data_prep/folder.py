"""Your own pictures: the MVTec AD layout, one category or many, or three flat folders.

    ROOT/CATEGORY/train/good/*.png                  ROOT/good/*.png
    ROOT/CATEGORY/test/good/*.png                   ROOT/bad/*.png
    ROOT/CATEGORY/test/TYPE/*.png                   ROOT/mask/*.png      same stem as in bad/, also with _mask
    ROOT/CATEGORY/ground_truth/TYPE/*_mask.png

The first is described at https://www.mvtec.com/company/research/datasets/mvtec-ad (readme.txt of the download). Masks are used where
they lie: every value but 0 is the defect. A bad image without a mask is kept as "anomalous".
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

from .common import folders, images, read_mask, size, split_of

PUBLISHED: dict[str, int] = {}


def records(root: Path, out: Path | None = None) -> Iterator[dict]:
    """Records with absolute paths; nothing is written."""
    root = Path(root).resolve()
    if (root / "good").is_dir():
        yield from flat(root)
        return
    categories = [root] if (root / "train").is_dir() or (root / "test").is_dir() else folders(root)
    found = False
    for category in categories:
        if (category / "test").is_dir() or (category / "train").is_dir():
            found = True
            yield from mvtec_category(category)
    if not found:
        raise ValueError(f"{root}: expected good/ (and bad/, mask/), or train/ and test/ as in MVTec AD; found "
                         f"{[p.name for p in folders(root)][:8]}")


def mvtec_category(category: Path) -> Iterator[dict]:
    for split in ("train", "test"):
        for kind in folders(category / split) if (category / split).is_dir() else []:
            for image in images(kind):
                record = {"image": str(image), "labels": {}, "split": split, "group": image.relative_to(category.parent).as_posix(),
                          "category": category.name}
                if kind.name == "good":
                    size(image)
                    yield record
                else:
                    yield record | marked(image, category / "ground_truth" / kind.name, kind.name)


def flat(root: Path) -> Iterator[dict]:
    for kind in ("good", "bad"):
        for image in images(root / kind) if (root / kind).is_dir() else []:
            name = image.relative_to(root).as_posix()
            record = {"image": str(image), "labels": {}, "split": split_of(name) if kind == "good" else "test", "group": name,
                      "category": root.name}
            if kind == "good":
                size(image)
                yield record
            else:
                yield record | marked(image, root / "mask", "defect")


def marked(image: Path, folder: Path, label: str) -> dict:
    """The mask of a bad image, if there is one that marks anything."""
    if folder.is_dir():
        for mask in images(folder):
            if mask.stem in (image.stem, image.stem + "_mask"):
                if read_mask(mask, image).any():
                    return {"mask": str(mask), "labels": {"*": label}}
                break
    return {"anomalous": True}
