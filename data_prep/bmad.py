"""BMAD's arrangement of medical slices, for `oct`, `brats` and `lits`:
https://github.com/DorisBao/BMAD (its README shows the folders)

    ROOT/train/good/[img/]00003_60.png
    ROOT/test/good/img/00000_96.png
    ROOT/test/Ungood/img/00002_60.png
    ROOT/test/Ungood/label/00002_60.png      any value but 0 is the lesion

Names differ from archive to archive: Ungood or ungood, label or anomaly_mask (MVFA-AD's copy),
test/img/good instead of test/good/img, and one folder more around it all (Brain_AD/BraTS2021_slice,
Liver_AD/hist_DIY, Retina_RESC_AD/RESC, as public readers of the archives have it). The validation
part is left out. A patient's slices share the name before the last underscore.
Counts: Bao et al., BMAD (CVPR workshops 2024), Table 1, from memory; those for training agree with
https://huggingface.co/datasets/Hammadhaideerr/CTTA-AD-Benchmarks.
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

from .common import by_stem, child, first_folder, folders, images, missing, read_mask, size

COUNTS = {"oct": {"images": 6102, "train good": 4297, "test good": 1041, "test bad": 764},
          "brats": {"images": 11215, "train good": 7500, "test good": 640, "test bad": 3075},
          "lits": {"images": 3035, "train good": 1542, "test good": 833, "test bad": 660}}


def find(root: Path) -> Path | None:
    """The folder that holds train/ and test/: ROOT or one below."""
    return next((p for p in [root, *folders(root)]
                 if child(p, "train").is_dir() and child(p, "test").is_dir()), None)


def records(root: Path, label: str) -> Iterator[dict]:
    base = find(root)
    if base is None:
        raise ValueError(f"{root}: expected train/good, test/good/img, test/Ungood/img and "
                         f"test/Ungood/label; found "
                         f"{[p.name for p in folders(root)][:8]}")
    for split in ("train", "test"):
        phase = child(base, split)
        for kind in ("good", "ungood"):
            folder = first_folder(phase, f"{kind}/img", f"img/{kind}", kind)
            marks = first_folder(phase, f"label/{kind}", f"anomaly_mask/{kind}",
                                 f"{kind}/anomaly_mask", f"{kind}/label")
            masks = by_stem(marks)
            for image in images(folder) if folder.is_dir() else []:
                patient = image.stem.rpartition("_")[0] or image.stem
                record = {"image": str(image), "labels": {}, "split": split, "group": patient}
                if kind == "good":
                    size(image)
                    yield record
                elif image.stem not in masks:
                    yield missing(marks / image.name)
                elif read_mask(masks[image.stem], image).any():
                    yield record | {"mask": str(masks[image.stem]), "labels": {"*": label}}
                else:
                    yield record | {"anomalous": True}
