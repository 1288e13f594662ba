"""Liver CT: LiTS, https://competitions.codalab.org/competitions/17094

    ROOT/Training Batch 1/volume-0.nii ... ROOT/Training Batch 2/volume-130.nii
    segmentation-N.nii beside or in a folder of their own

512 x 512 x N; segmentation 1 liver, 2 tumour. Also .nii.gz. The folders below ROOT don't matter:
they differ from copy to copy, the names do not (GitHub search for segmentation-130.nii). Axial
slices with liver, every third; -200 to 250 HU becomes black to white. Slices of one patient share a
group; three quarters of the patients are "train". Also BMAD's slices (data_prep/bmad.py).
"""
from __future__ import annotations

import re
from pathlib import Path
from typing import Iterator

from . import bmad
from .common import missing
from .volumes import slices

PUBLISHED = {"groups": 131}  # volumes; the number of slices depends on --every
NAME = re.compile(r"(volume|segmentation)-(\d+)\.nii(\.gz)?$")


def add_arguments(parser) -> None:
    parser.add_argument("--every", type=int, default=3,
                        help="take every so many slices (default 3)")


def published(root: Path, every: int) -> dict[str, int]:
    return bmad.COUNTS["lits"] if bmad.find(root) else PUBLISHED


def records(root: Path, out: Path, every: int = 3) -> Iterator[dict]:
    root = root.resolve()
    if bmad.find(root):
        yield from bmad.records(root, "tumour")
        return
    found: dict[str, dict[int, Path]] = {"volume": {}, "segmentation": {}}
    for path in sorted(root.glob("**/*.nii*")):  # ** does not follow links
        if match := NAME.match(path.name):
            found[match[1]][int(match[2])] = path
    for number, image in sorted(found["volume"].items()):
        seg = found["segmentation"].get(number)
        if seg is None:
            yield missing(image.with_name(image.name.replace("volume", "segmentation")))
            continue
        yield from slices(f"volume-{number}", image, seg, out, "tumour", every,
                          grey=lambda s: 255 * (s.astype(float) + 200) / 450,
                          defect=lambda labels: labels == 2,
                          wanted=lambda labels, s: (labels > 0).any())
