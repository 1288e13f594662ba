"""COCO 2017, https://cocodataset.org/#download

    ROOT/{train2017,val2017}/000000000009.jpg, ROOT/annotations/instances_{train,val}2017.json
    ROOT/annotations/panoptic_{train,val}2017.json and ROOT/annotations/panoptic_{train,val}2017/000000000009.png

Panoptic masks where they are there (things and stuff), instances otherwise; all instances of a category are one label. Crowds are left
out. Masks become RLE in the manifest. The format: https://cocodataset.org/#format-data
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Iterator

import numpy as np
from PIL import Image

from .common import size

PUBLISHED = {"images": 123287, "train": 118287, "test": 5000}


def records(root: Path, out: Path) -> Iterator[dict]:
    root, found = root.resolve(), False
    for split, name in (("train", "train2017"), ("test", "val2017")):
        panoptic, instances = (root / "annotations" / f"{kind}_{name}.json" for kind in ("panoptic", "instances"))
        if panoptic.is_file():
            yield from from_panoptic(root, name, split, json.loads(panoptic.read_text()))
        elif instances.is_file():
            yield from from_instances(root, name, split, json.loads(instances.read_text()))
        found |= panoptic.is_file() or instances.is_file()
    if not found:
        raise FileNotFoundError(f"{root / 'annotations'}: neither panoptic_train2017.json nor instances_train2017.json")


def rle(mask: np.ndarray) -> dict:
    from pycocotools import mask as coco
    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(n) for n in code["size"]], "counts": code["counts"].decode("ascii")}


def from_panoptic(root: Path, name: str, split: str, data: dict) -> Iterator[dict]:
    names = {c["id"]: c["name"] for c in data["categories"]}
    files = {i["id"]: i["file_name"] for i in data["images"]}
    for entry in data["annotations"]:
        image, colours = root / name / files[entry["image_id"]], root / "annotations" / f"panoptic_{name}" / entry["file_name"]
        pixels = np.array(Image.open(colours).convert("RGB"), dtype=np.int64)
        if pixels.shape[:2] != size(image):
            raise ValueError(f"{colours}: mask is {pixels.shape[:2]}, its image {image} {size(image)}")
        ids = pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]   # the format's own id
        kinds: dict[int, list[int]] = {}
        for segment in entry["segments_info"]:
            if not segment.get("iscrowd"):
                kinds.setdefault(segment["category_id"], []).append(segment["id"])
        yield record(image, split, {names[k]: rle(np.isin(ids, v)) for k, v in sorted(kinds.items())})


def from_instances(root: Path, name: str, split: str, data: dict) -> Iterator[dict]:
    from pycocotools import mask as coco
    names = {c["id"]: c["name"] for c in data["categories"]}
    shapes: dict[int, dict[int, list]] = {}
    for entry in data["annotations"]:
        if not entry.get("iscrowd"):
            shapes.setdefault(entry["image_id"], {}).setdefault(entry["category_id"], []).append(entry["segmentation"])
    for info in data["images"]:
        h, w = info["height"], info["width"]
        if size(root / name / info["file_name"]) != (h, w):
            raise ValueError(f"{root / name / info['file_name']}: expected {h} x {w} as annotated")
        masks = {}
        for kind, parts in sorted(shapes.get(info["id"], {}).items()):
            codes = [coco.frPyObjects(p, h, w) for p in parts]   # a list of polygons gives a list, an RLE gives one
            code = coco.merge([c for part in codes for c in (part if isinstance(part, list) else [part])])
            masks[names[kind]] = {"size": [h, w], "counts": code["counts"].decode("ascii")}
        yield record(root / name / info["file_name"], split, masks)


def record(image: Path, split: str, masks: dict[str, dict]) -> dict:
    base = {"image": str(image), "labels": {}, "split": split, "group": image.stem}
    if not masks:
        return base
    numbered = {str(i): name for i, name in enumerate(masks, start=1)}
    return base | {"mask": {i: masks[name] for i, name in numbered.items()}, "labels": numbered}
