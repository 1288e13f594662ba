"""Brain MRI: BraTS 2021 training volumes, https://www.synapse.org/brats2021

    ROOT/BraTS2021_00000/BraTS2021_00000_{flair,t1,t1ce,t2,seg}.nii.gz      240 x 240 x 155; seg 1, 2, 4 are parts of the tumour

Axial slices of FLAIR, every fifth, where at least a twentieth is brain; 0 to the volume's slice maximum becomes black to white.
Good and bad slices of one patient share a group; three quarters of the patients are "train".
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

from .common import folders
from .volumes import slices

PUBLISHED = {"groups": 1251}  # patients; the number of slices depends on --every


def add_arguments(parser) -> None:
    parser.add_argument("--every", type=int, default=5, help="take every so many slices (default 5)")


def records(root: Path, out: Path, every: int = 5) -> Iterator[dict]:
    for patient in folders(root.resolve()):
        image, seg = (patient / f"{patient.name}_{kind}.nii.gz" for kind in ("flair", "seg"))
        if not image.is_file() or not seg.is_file():
            raise FileNotFoundError(f"{image if not image.is_file() else seg} is missing")
        yield from slices(patient.name, image, seg, out, "tumour", every, grey=lambda s: 255 * s.astype(float) / max(1, s.max()),
                          defect=lambda labels: labels > 0, wanted=lambda labels, s: (s > 0).mean() > 0.05)
