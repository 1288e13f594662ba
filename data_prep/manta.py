"""MANTA: tiny objects in five views, 38 categories of five domains, https://grainnet.github.io/MANTA (Fan et al., CVPR 2025)

    ROOT/DOMAIN/CATEGORY/{train/good,test/good,test/TYPE}/*.png, ROOT/DOMAIN/CATEGORY/ground_truth/TYPE/*.png

The download is behind a form: the layout is MVTec AD's below a folder for each domain, as its paper says; it could not be looked up
file by file, so only the number of categories is checked. An image is a montage of the five views of one item.
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

from .common import folders
from .folder import mvtec_category

PUBLISHED = {"categories": 38}


def records(root: Path, out: Path) -> Iterator[dict]:
    for domain in folders(root.resolve()):
        for category in folders(domain):
            if (category / "train").is_dir() or (category / "test").is_dir():
                yield from mvtec_category(category)
