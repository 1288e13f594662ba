"""MANTA: tiny objects in five views, 38 categories of five domains,
https://grainnet.github.io/MANTA (Fan et al., CVPR 2025)

    ROOT/DOMAIN/CATEGORY/train/good/*.png
    ROOT/DOMAIN/CATEGORY/test-pixel/{good,TYPE,mask}/*.png
        a mask has its image's name, or its place in the sorted list

The download is behind a form. The folders are those that a public reader walks (class MANTASolver
on GitHub, for the domain "groceries"); what else the archives hold could not be looked up, so only
the number of categories is checked. MVTec AD's layout below a folder for each domain is read too,
and ROOT may be one domain. An image is a montage of the views of one item.
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

from .common import by_stem, child, folders, images
from .folder import is_category, is_good, marked, mvtec_category, part

PUBLISHED = {"categories": 38}


def records(root: Path, out: Path) -> Iterator[dict]:
    root = root.resolve()
    for category in [c for d in [root, *folders(root)] for c in folders(d)]:
        if child(category, "test-pixel").is_dir():
            yield from from_category(category)
        elif is_category(category):
            yield from mvtec_category(category)


def from_category(category: Path) -> Iterator[dict]:
    for split, name in (("train", "train"), ("test", "test-pixel")):
        phase = child(category, name)
        for kind in folders(phase) if phase.is_dir() else []:
            if "mask" in kind.name.lower():
                continue
            good, found, masks = is_good(kind), images(kind), by_stem(child(phase, "mask"))
            named = any(i.stem in masks or f"{i.stem}_mask" in masks for i in found)
            if not good and len(found) == len(masks) and not named:
                masks = {image.stem: mask for image, mask in zip(found, masks.values())}
            for image in found:
                group = image.relative_to(category.parent).as_posix()
                marks = {} if good else marked(image, masks, kind.name)
                yield part(image, split, group, category.name) | marks
