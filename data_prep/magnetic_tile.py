"""Magnetic tiles, https://github.com/abin24/Magnetic-tile-defect-datasets. (Huang et al., 2020)

    ROOT/MT_{Blowhole,Break,Crack,Fray,Uneven,Free}/Imgs/exp1_num_108719.jpg, and a mask .png beside each

A tile was photographed under up to six lights, one after the other (exp1 to exp6, rising numbers): these share a group. No key says so;
consecutive numbers of one folder belong together while the light's number rises and the gap stays below 500.
"""
from __future__ import annotations

import re
from pathlib import Path
from typing import Iterator

from .common import folders, images, read_mask, size

PUBLISHED = {"images": 1344, "good": 952, "bad": 392}
NAME = re.compile(r"exp(\d+)_num_(\d+)$")


def records(root: Path, out: Path) -> Iterator[dict]:
    for kind in folders(root.resolve()):
        if not kind.name.startswith("MT_") or not (kind / "Imgs").is_dir():
            continue
        photographs = [p for p in images(kind / "Imgs") if p.suffix.lower() in (".jpg", ".jpeg")]
        shots = sorted((int(m[2]), int(m[1]), p) for p in photographs if (m := NAME.search(p.stem)))
        tile, before = 0, (-10 ** 9, 99)
        for number, light, image in shots:
            tile += light <= before[1] or number - before[0] >= 500
            before = number, light
            record = {"image": str(image), "labels": {}, "split": "test", "group": f"{kind.name[3:]}_{tile}"}
            mask = image.with_suffix(".png")
            if kind.name == "MT_Free":
                size(image)
                yield record
            elif not mask.is_file():
                raise FileNotFoundError(f"{mask} is missing")
            elif read_mask(mask, image).any():
                yield record | {"mask": str(mask), "labels": {"*": kind.name[3:].lower()}}
