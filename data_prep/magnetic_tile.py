"""Magnetic tiles, https://github.com/abin24/Magnetic-tile-defect-datasets. (Huang et al., 2020)

    ROOT/MT_{Blowhole,Break,Crack,Fray,Uneven,Free}/Imgs/exp1_num_108719.jpg
        a mask .png beside each

Folders as in the copies on GitHub and Kaggle; counts: Huang et al., Table 1. A tile was
photographed under up to six lights, one after the other (exp1 to exp6, rising numbers): these share
a group. No key says so; consecutive numbers of one folder belong together while the light's number
rises and the gap stays below 500.
"""
from __future__ import annotations

import re
from pathlib import Path
from typing import Iterator

from .common import child, images, missing, read_mask, size

# blowhole 115, break 85, crack 57, fray 32, uneven 103
PUBLISHED = {"images": 1344, "good": 952, "bad": 392, "masks": 392}
KINDS = ("Blowhole", "Break", "Crack", "Fray", "Free", "Uneven")
NAME = re.compile(r"exp(\d+)_num_(\d+)$")


def records(root: Path, out: Path) -> Iterator[dict]:
    for kind in KINDS:
        folder = child(root.resolve(), f"MT_{kind}/Imgs")
        for image, tile in tiles(folder) if folder.is_dir() else []:
            record = {"image": str(image), "labels": {}, "split": "test", "group": f"{kind}_{tile}"}
            mask = image.with_suffix(".png")
            if kind == "Free":
                size(image)
                yield record
            elif not mask.is_file():
                yield missing(mask)
            elif read_mask(mask, image).any():
                yield record | {"mask": str(mask), "labels": {"*": kind.lower()}}
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
