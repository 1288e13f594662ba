"""Slices of NIfTI volumes, for `brats` and `lits`: the one case where pictures are written, since a
slice is not a file."""
from __future__ import annotations

import zlib
from pathlib import Path
from typing import Callable, Iterator

import numpy as np

from .common import child, split_of, write_png


def nifti(folder: Path, stem: str) -> Path:
    """STEM.nii.gz in a folder, or STEM.nii if that is what is there."""
    plain = child(folder, f"{stem}.nii")
    return plain if plain.is_file() else child(folder, f"{stem}.nii.gz")


def load(path: Path) -> np.ndarray:
    """(x, y, z) array of a volume, scaled as its header says."""
    import nibabel
    try:
        volume = nibabel.load(path).dataobj
        if len(volume.shape) != 3:
            raise ValueError(f"expected three axes, got {volume.shape}")
        return np.asarray(volume)
    except (OSError, EOFError, ValueError, zlib.error,
            nibabel.filebasedimages.ImageFileError) as error:
        raise ValueError(f"{path}: not a readable NIfTI volume ({error}); get it again") from error


def slices(name: str, image: Path, seg: Path, out: Path, label: str, every: int, grey: Callable,
           defect: Callable, wanted: Callable) -> Iterator[dict]:
    """Every n-th axial slice that `wanted`(seg slice, image slice) keeps; `grey` maps values to
    [0, 255], `defect` the labels to bool."""
    if every < 1:
        raise ValueError(f"--every: expected at least 1, got {every}")
    volume, labels = load(image), load(seg)
    if volume.shape != labels.shape:
        raise ValueError(f"{seg}: volume is {labels.shape}, its image {image} {volume.shape}")
    for z in range(0, volume.shape[2], every):
        if wanted(labels[..., z], volume[..., z]):
            stem, marked = f"{name}_{z:03d}", defect(labels[..., z])
            picture = np.rot90(grey(volume[..., z])).clip(0, 255).round()
            path = write_png(out / "images" / f"{stem}.png", picture)
            record = {"image": str(path), "labels": {}, "split": split_of(name), "group": name}
            if marked.any():
                mask = write_png(out / "masks" / f"{stem}.png", np.rot90(marked) * 255)
                record |= {"mask": str(mask), "labels": {"*": label}}
            yield record
