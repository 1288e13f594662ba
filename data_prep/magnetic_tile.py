"""Magnetic tiles, https://github.com/abin24/Magnetic-tile-defect-datasets. (Huang et al., 2020)

    ROOT/MT_{Blowhole,Break,Crack,Fray,Uneven,Free}/Imgs/exp1_num_108719.jpg, and a mask .png beside each

Folders as in the copies on GitHub and Kaggle; counts: Huang et al., Table 1. A tile was photographed under up to six lights, one after
the other (exp1 to exp6, rising numbers): these share a group. No key says so; consecutive numbers of one folder belong together while
the light's number rises and the gap stays below 500.
"""
from __future__ import annotations

import re
from pathlib import Path
from typing import Iterator

from .common import folders, images, missing, read_mask, size

PUBLISHED = {"images": 1344, "good": 952, "bad": 392, "masks": 392}  # blowhole 115, break 85, crack 57, fray 32, uneven 103
NAME = re.compile(r"exp(\d+)_num_(\d+)$")


def records(root: Path, out: Path) -> Iterator[dict]:
    for kind in folders(root.resolve()):
        if kind.name.startswith("MT_") and (kind / "Imgs").is_dir():
            name = kind.name[3:].lower()
            for image, tile in tiles(kind / "Imgs"):
                record = {"image": str(image), "labels": {}, "split": "test", "group": f"{kind.name[3:]}_{tile}"}
                mask = image.with_suffix(".png")
                if name == "free":
                    size(image)
                    yield record
                elif not mask.is_file():
                    yield missing(mask)
                elif read_mask(mask, image).any():
                    yield record | {"mask": str(mask), "labels": {"*": name}}
                else:
                    yield record | {"anomalous": True}


def tiles(folder: Path) -> Iterator[tuple[Path, int]]:
    """Photographs and the number of the tile that they show."""
    photographs = [p for p in images(folder) if p.suffix.lower() in (".jpg", ".jpeg")]
    shots = sorted((int(m[2]), int(m[1]), p) for p in photographs if (m := NAME.search(p.stem)))
    tile, before = 0, (-10 ** 9, 99)
    for number, light, image in shots:
        tile += light <= before[1] or number - before[0] >= 500
        before = number, light
        yield image, tile
