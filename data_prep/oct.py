"""Retinal OCT (RESC) as the BMAD benchmark distributes it, https://github.com/DorisBao/BMAD

    ROOT/train/good/*.png, ROOT/test/{good,Ungood}/{img,label}/*.png
        see data_prep/bmad.py for its variants
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

from . import bmad

PUBLISHED = bmad.COUNTS["oct"]


def records(root: Path, out: Path) -> Iterator[dict]:
    yield from bmad.records(root.resolve(), "lesion")
