"""Liver CT: LiTS, https://competitions.codalab.org/competitions/17094

    ROOT/volume-0.nii ... volume-130.nii and ROOT/segmentation-0.nii ...      512 x 512 x N; 1 liver, 2 tumour

Also .nii.gz, and also in sub-folders.

Axial slices with liver, every third; -200 to 250 HU becomes black to white. Slices of one patient share a group.
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

from .volumes import slices

PUBLISHED = {"groups": 131}  # volumes; the number of slices depends on --every


def add_arguments(parser) -> None:
    parser.add_argument("--every", type=int, default=3, help="take every so many slices (default 3)")


def records(root: Path, out: Path, every: int = 3) -> Iterator[dict]:
    files = sorted(p for p in root.resolve().glob("**/volume-*.nii*") if not p.name.startswith("."))
    for image in sorted(files, key=lambda p: int(p.name.split("-")[1].split(".")[0])):
        seg = next((p for p in root.resolve().glob(f"**/{image.name.replace('volume', 'segmentation')}")), None)
        if seg is None:
            raise FileNotFoundError(f"{image.with_name(image.name.replace('volume', 'segmentation'))} is missing")
        yield from slices(image.name.split(".")[0], image, seg, out, "tumour", every, grey=lambda s: 255 * (s.astype(float) + 200) / 450,
                          defect=lambda labels: labels == 2, wanted=lambda labels, s: (labels > 0).any())
