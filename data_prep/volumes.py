"""Slices of NIfTI volumes, for `brats` and `lits`: the one case where pictures are written, since a slice is not a file."""
from __future__ import annotations

from pathlib import Path
from typing import Callable, Iterator

import numpy as np

from .common import split_of, write_mask


def load(path: Path) -> np.ndarray:
    import nibabel
    try:
        return np.asarray(nibabel.load(path).dataobj)
    except (OSError, EOFError, ValueError, nibabel.filebasedimages.ImageFileError) as error:
        raise ValueError(f"{path}: not a readable NIfTI volume ({error}); get it again") from error


def slices(name: str, image: Path, seg: Path, out: Path, label: str, every: int, grey: Callable, defect: Callable,
           wanted: Callable) -> Iterator[dict]:
    """Every n-th axial slice that `wanted`(seg slice, image slice) keeps; `grey` maps values to [0, 255], `defect` the labels to bool."""
    volume, labels = load(image), load(seg)
    if volume.shape != labels.shape:
        raise ValueError(f"{seg}: volume is {labels.shape}, its image {image} {volume.shape}")
    for z in range(0, volume.shape[2], every):
        if wanted(labels[..., z], volume[..., z]):
            stem, marked = f"{name}_{z:03d}", defect(labels[..., z])
            path = write_mask(out / "images" / f"{stem}.png", np.rot90(grey(volume[..., z])).clip(0, 255).round())
            record = {"image": str(path.resolve()), "labels": {}, "split": split_of(name), "group": name}
            if marked.any():
                mask = write_mask(out / "masks" / f"{stem}.png", np.rot90(marked).astype(np.uint8) * 255)
                record |= {"mask": str(mask.resolve()), "labels": {"*": label}}
            yield record
