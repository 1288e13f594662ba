"""COCO 2017, https://cocodataset.org/#download (its format: https://cocodataset.org/#format-data)

    ROOT/{train2017,val2017}/000000000009.jpg, ROOT/annotations/instances_{train,val}2017.json
    ROOT/annotations/panoptic_{train,val}2017.json
    ROOT/annotations/panoptic_{train,val}2017/000000000009.png

--masks panoptic has things and stuff, instances has things only; without it panoptic is taken where
it is there. All instances of a category are one label, crowds are left out. Masks become run
lengths in the manifest. 117,266 and 4,952 images have an instance that is no crowd (detectron2's
log: "Removed 1021 images with no usable annotations. 117266 images left.").
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

import numpy as np

import icas

from .common import (as_text, child, json_items, mask_values, merge, missing, painted, size,
                     upright)

PUBLISHED = {"images": 123287, "train": 118287, "test": 5000}
SPLITS = (("train", "train2017"), ("test", "val2017"))


def add_arguments(parser) -> None:
    parser.add_argument("--masks", choices=("panoptic", "instances"),
                        help="which annotations (default: panoptic if they are there)")


def published(root: Path, masks: str | None) -> dict[str, int]:
    if chosen(root, masks) == "panoptic":
        return PUBLISHED | {"labels": 133}
    return PUBLISHED | {"train bad": 117266, "test bad": 4952, "labels": 80}


def chosen(root: Path, masks: str | None) -> str:
    there = [kind for kind in ("panoptic", "instances") for _, name in SPLITS
             if child(root, f"annotations/{kind}_{name}.json").is_file()]
    return masks or (there or ["instances"])[0]


def records(root: Path, out: Path, masks: str | None = None) -> Iterator[dict]:
    root = root.resolve()
    kind = chosen(root, masks)
    for split, name in SPLITS:
        annotations = child(root, f"annotations/{kind}_{name}.json")
        if annotations.is_file():
            read = from_panoptic if kind == "panoptic" else from_instances
            yield from read(root, name, split, annotations)
        else:
            yield missing(annotations)


def from_panoptic(root: Path, name: str, split: str, annotations: Path) -> Iterator[dict]:
    """A PNG holds each pixel's segment as R + 256 G + 65536 B."""
    names, files = {}, {}
    for key, entry in json_items(annotations, "categories", "images"):
        if key == "categories":
            names[entry["id"]] = entry["name"]
        else:
            files[entry["id"]] = entry["file_name"]
    photographs, painted_in = child(root, name), child(root, f"annotations/panoptic_{name}")
    for _, entry in json_items(annotations, "annotations"):
        image, colours = photographs / files[entry["image_id"]], painted_in / entry["file_name"]
        if not image.is_file() or not colours.is_file():
            yield missing(colours if image.is_file() else image)
            continue
        size(colours)
        opened = upright(colours)
        opened = opened if opened.mode == "RGBA" else opened.convert("RGB")
        pixels = mask_values(opened, colours).astype(np.int32)
        if pixels.shape[:2] != size(image):
            raise ValueError(f"{colours}: mask is {pixels.shape[:2]}, "
                             f"its image {image} {size(image)}")
        ids = pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]
        kinds: dict[int, list[int]] = {}
        for segment in entry["segments_info"]:
            if not segment.get("iscrowd"):
                kinds.setdefault(segment["category_id"], []).append(segment["id"])
        masks = {names[kind]: icas.run_lengths(np.isin(ids, own))
                 for kind, own in sorted(kinds.items())}
        yield painted(image, split, masks)


def from_instances(root: Path, name: str, split: str, annotations: Path) -> Iterator[dict]:
    """Polygons (a list) or run lengths (a dict) an instance; kept as compressed run lengths, a
    tenth of the polygons' memory."""
    names, infos = {}, {}
    for key, entry in json_items(annotations, "categories", "images"):
        if key == "categories":
            names[entry["id"]] = entry["name"]
        else:
            infos[entry["id"]] = entry
    shapes: dict[int, dict[str, list[dict]]] = {}
    for _, entry in json_items(annotations, "annotations"):
        if not entry.get("iscrowd") and entry["segmentation"]:
            info = infos[entry["image_id"]]
            try:
                code = run_lengths(entry["segmentation"], info["height"], info["width"])
            except (ValueError, TypeError, IndexError, KeyError) as error:
                raise ValueError(f"{annotations}: annotation {entry.get('id')} is neither polygons "
                                 f"nor run lengths ({error})") from error
            kinds = shapes.setdefault(entry["image_id"], {})
            kinds.setdefault(names[entry["category_id"]], []).append(code)
    photographs = child(root, name)
    for number, info in infos.items():
        image = photographs / info["file_name"]
        if not image.is_file():
            yield missing(image)
            continue
        annotated = info["height"], info["width"]
        if size(image) != annotated:
            raise ValueError(f"{image}: image is {size(image)}, annotated as {annotated}")
        kinds = sorted(shapes.pop(number, {}).items())
        yield painted(image, split, {label: merge(codes) for label, codes in kinds})


def run_lengths(segmentation: list | dict, h: int, w: int) -> dict:
    """Of polygons [[x, y, x, y, ...], ...] or of run lengths, as counts or compressed."""
    from pycocotools import mask as coco
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
        return segmentation
    codes = coco.frPyObjects(segmentation, h, w)
    return as_text(coco.merge(codes) if isinstance(codes, list) else codes)
