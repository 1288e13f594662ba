"""Real-IAD: 30 objects in five views, https://realiad4ad.github.io/Real-IAD
(Wang et al., CVPR 2024)

    ROOT/realiad_1024/audiojack/{OK,NG/TYPE}/S0001/audiojack_0001_OK_C1_20230101000000.jpg
        masks .png beside the bad ones; also realiad_raw, realiad_512, realiad_256
    ROOT/realiad_jsons/audiojack.json      (or realiad_jsons/realiad_jsons/)
        {"meta": {"prefix": "audiojack/", "normal_class": "OK"}, "train": [...], "test": [...]}, and
        in the lists {"category": "audiojack", "anomaly_class": "OK",
                      "image_path": "OK/S0001/audiojack_0001_OK_C1_...jpg", "mask_path": null}

Read in the README of https://github.com/Tencent/AnomalyDetection_Real-IAD and in anomalib's
realiad.py. A group is one item (S0001) of a class, seen from all five sides. A view of a bad item
that shows no defect has no mask: it is good. Counts: the files of a copy of realiad_256 as its
owner listed them (151,050 .jpg, 51,329 .png).
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

from .common import child, first_folder, missing, read_json, read_mask, size

PUBLISHED = {"images": 151050, "bad": 51329, "categories": 30}
TYPES = {"AK": "pit", "BX": "deformation", "CH": "abrasion", "HS": "scratch", "PS": "damage",
         "QS": "missing parts", "YW": "foreign object", "ZW": "contamination"}


def records(root: Path, out: Path) -> Iterator[dict]:
    root = root.resolve()
    lists = first_folder(root, "realiad_jsons/realiad_jsons", "realiad_jsons")
    paths = sorted(p for p in lists.glob("*")
                   if p.suffix.lower() == ".json" and not p.name.startswith("."))
    if not paths:
        raise FileNotFoundError(f"{lists}: no list of images (realiad_jsons.zip)")
    base = first_folder(root, *(f"realiad_{n}" for n in ("1024", "512", "256", "raw")), ".")
    for path in paths:
        data = read_json(path)
        folder = child(base, data["meta"]["prefix"])
        for split in ("train", "test"):
            for entry in data[split]:
                image = child(folder, entry["image_path"])
                mask = child(folder, entry["mask_path"] or "")
                if not image.is_file() or entry["mask_path"] and not mask.is_file():
                    yield missing(mask if image.is_file() else image)
                    continue
                item = Path(entry["image_path"]).parent.as_posix()
                record = {"image": str(image), "labels": {}, "split": split,
                          "category": entry["category"], "group": f"{entry['category']}/{item}"}
                if not entry["mask_path"]:
                    size(image)
                elif read_mask(mask, image).any():
                    kind = entry["anomaly_class"]
                    record |= {"mask": str(mask), "labels": {"*": TYPES.get(kind, kind)}}
                else:
                    record |= {"anomalous": True}
                yield record
