"""Real-IAD: 30 objects in five views, https://realiad4ad.github.io/Real-IAD (Wang et al., CVPR 2024)

    ROOT/realiad_1024/audiojack/{OK,NG/TYPE}/S0001/audiojack_0001_OK_C1_20230101000000.jpg, masks .png beside the bad ones
    ROOT/realiad_jsons/realiad_jsons/audiojack.json
        {"meta": {"prefix": "audiojack/", "normal_class": "OK"}, "train": [...], "test": [...]}, and in the lists
        {"category": "audiojack", "anomaly_class": "OK", "image_path": "OK/S0001/audiojack_0001_OK_C1_...jpg", "mask_path": null}

The layout is the one that https://github.com/TencentYoutuResearch/AnomalyDetection_Real-IAD describes. A group is one item (S0001) of a
class, seen from all five sides. A view of a bad item that shows no defect has no mask: it is good.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Iterator

from .common import read_mask, size

PUBLISHED = {"images": 151050, "masks": 51329, "categories": 30}
TYPES = {"AK": "pit", "BX": "deformation", "CH": "abrasion", "HS": "scratch", "PS": "damage", "QS": "missing parts", "YW": "foreign object",
         "ZW": "contamination"}


def records(root: Path, out: Path) -> Iterator[dict]:
    root = root.resolve()
    lists = next((p for p in (root / "realiad_jsons" / "realiad_jsons", root / "realiad_jsons") if list(p.glob("*.json"))), None)
    if lists is None:
        raise FileNotFoundError(f"{root / 'realiad_jsons'}: no list of images (realiad_jsons.zip)")
    base = next((root / n for n in ("realiad_1024", "realiad_512", "realiad_256", "realiad_raw") if (root / n).is_dir()), root)
    for path in sorted(lists.glob("*.json")):
        data = json.loads(path.read_text())
        folder = base / data["meta"]["prefix"]
        for split in ("train", "test"):
            for entry in data[split]:
                image = folder / entry["image_path"]
                if not image.is_file():
                    raise FileNotFoundError(f"{path}: {image} is missing")
                record = {"image": str(image), "labels": {}, "split": split, "category": entry["category"],
                          "group": f"{entry['category']}/{Path(entry['image_path']).parent.as_posix()}"}
                if entry["mask_path"]:
                    mask = folder / entry["mask_path"]
                    read_mask(mask, image)
                    kind = entry["anomaly_class"]
                    record |= {"mask": str(mask), "labels": {"*": TYPES.get(kind, kind)}}
                else:
                    size(image)
                yield record
