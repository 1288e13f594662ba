"""Brain MRI: BraTS 2021 training volumes, https://www.synapse.org/brats2021 (names as in the
archive on Kaggle, brats-2021-task1)

    ROOT/BraTS2021_00000/BraTS2021_00000_{flair,t1,t1ce,t2,seg}.nii.gz
        240 x 240 x 155; seg 1, 2, 4 are parts of the tumour

Axial slices of FLAIR, every fifth, where at least a twentieth is brain; 0 to the slice's maximum
becomes black to white. Good and bad slices of one patient share a group; three quarters of the
patients are "train". Also .nii, also BMAD's slices (data_prep/bmad.py).
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

from . import bmad
from .common import folders, missing
from .volumes import nifti, slices

PUBLISHED = {"groups": 1251}  # patients; the number of slices depends on --every


def add_arguments(parser) -> None:
    parser.add_argument("--every", type=int, default=5,
                        help="take every so many slices (default 5)")


def published(root: Path, every: int) -> dict[str, int]:
    return bmad.COUNTS["brats"] if bmad.find(root) else PUBLISHED


def records(root: Path, out: Path, every: int = 5) -> Iterator[dict]:
    root = root.resolve()
    if bmad.find(root):
        yield from bmad.records(root, "tumour")
        return
    for patient in folders(root):
        image, seg = (nifti(patient, f"{patient.name}_{kind}") for kind in ("flair", "seg"))
        if image.is_file() and seg.is_file():
            yield from slices(patient.name, image, seg, out, "tumour", every,
                              grey=lambda s: 255 * s.astype(float) / max(1, s.max()),
                              defect=lambda labels: labels > 0,
                              wanted=lambda labels, s: (s > 0).mean() > 0.05)
        elif patient.name.lower().startswith("brats"):
            yield missing(seg if image.is_file() else image)
