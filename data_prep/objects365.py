"""Objects365 v2, boxes only; SAM turns them into masks (Sec. 3.3).
https://www.objects365.org/download.html

    ROOT/{train,val}/patch0/objects365_v2_00900001.jpg
        also ROOT/{train,val}/images/{v1,v2}/patch0/...
    ROOT/annotations/zhiyuan_objv2_{train,val}.json
        also in ROOT/{train,val}/; COCO's format, boxes x y w h in pixels

Folders: MMDetection's guide to the data of MM-Grounding-DINO. Three images of the train list were
never published (MMDetection, mmdet/datasets/objects365.py). Every box's mask is kept in
OUT/sam/PATCH/NAME.json as soon as its image is done: a run that was stopped goes on there, and
--quality can be changed without asking SAM again. Left out: crowds, boxes thinner than a pixel,
masks whose IoU SAM itself estimates below --quality, and those that fill less than a third of their
box. The list of 25 million boxes is never held whole.
"""
from __future__ import annotations

import json
from array import array
from pathlib import Path, PurePosixPath
from typing import Iterator, Sequence

import numpy as np

import icas

from .common import (child, first_folder, json_items, merge, missing, painted, read_json, size,
                     upright)

PUBLISHED = {"images": 1742289 + 80000, "train": 1742289, "test": 80000}
NEVER_PUBLISHED = {"objects365_v2_00908726.jpg", "objects365_v1_00320532.jpg",
                   "objects365_v1_00320534.jpg"}
FILL = 1 / 3  # least share of its box that a mask covers


def add_arguments(parser) -> None:
    parser.add_argument("--sam", required=True,
                        help="SAM checkpoint for transformers: a folder, or a name such as "
                             "facebook/sam-vit-huge")
    parser.add_argument("--quality", type=float, default=0.88,
                        help="least IoU that SAM estimates of a mask (default 0.88)")
    parser.add_argument("--batch-size", type=int, default=32, help="boxes at once (default 32)")
    parser.add_argument("--device", default="cuda", help="cuda, cpu, mps (default cuda)")


def records(root: Path, out: Path, sam: str, quality: float = 0.88, batch_size: int = 32,
            device: str = "cuda") -> Iterator[dict]:
    root, model = root.resolve(), None
    lists = {name: path for name in ("train", "val")
             if (path := annotations_of(root, name)).is_file()}
    if not lists:
        raise FileNotFoundError(f"{annotations_of(root, 'train')} is missing")
    remember_sam(out, sam)
    for name, path in lists.items():
        boxes, phase = Boxes(path), child(root, name)
        for _, info in json_items(path, "images"):
            listed = PurePosixPath(info["file_name"])
            if listed.name in NEVER_PUBLISHED:
                continue
            image = first_folder(phase, listed.parent.name, str(listed.parent)) / listed.name
            kept = out / "sam" / image.parent.name / f"{image.stem}.json"
            if not image.is_file():
                yield missing(image)
                continue
            if not kept.is_file():
                size(image)
                corners, labels = boxes.of(info["id"])
                if corners:
                    model = model or load_sam(sam, device)
                masks = masks_of(model, image, corners, labels, batch_size) if corners else []
                icas.write_text(kept, json.dumps(masks))
            good: dict[str, list[dict]] = {}
            for label, score, fill, code in read_json(kept):
                if score >= quality and fill >= FILL:
                    good.setdefault(label, []).append(code)
            split = "train" if name == "train" else "test"
            yield painted(image, split, {k: merge(codes) for k, codes in sorted(good.items())})


def annotations_of(root: Path, name: str) -> Path:
    return child(first_folder(root, "annotations", name), f"zhiyuan_objv2_{name}.json")


def remember_sam(out: Path, sam: str) -> None:
    """Masks of two checkpoints are never mixed in one folder."""
    place = out / "sam" / "checkpoint.json"
    if place.is_file() and read_json(place) != Path(sam).name:
        raise ValueError(f"--sam: the masks in {place.parent} are by {read_json(place)!r}, "
                         f"not {Path(sam).name!r}; choose another --out")
    icas.write_text(place, json.dumps(Path(sam).name))


class Boxes:
    """All boxes of a list by image, 28 bytes each (25 million of them in the train list)."""

    def __init__(self, path: Path):
        self.names: dict[int, str] = {}
        images, kinds, corners = array("q"), array("i"), array("f")
        for key, entry in json_items(path, "annotations", "categories"):
            if key == "categories":
                self.names[entry["id"]] = entry["name"]
                continue
            x, y, w, h = entry["bbox"]
            if not entry.get("iscrowd") and w >= 1 and h >= 1:
                images.append(entry["image_id"]), kinds.append(entry["category_id"])
                corners.extend((x, y, x + w, y + h))
        order = (np.argsort(np.frombuffer(images, np.int64), kind="stable") if images
                 else np.zeros(0, np.int64))
        self.images = np.frombuffer(images, np.int64)[order] if images else order
        self.kinds = np.frombuffer(kinds, np.int32)[order] if images else order
        self.corners = (np.frombuffer(corners, np.float32).reshape(-1, 4)[order] if images
                        else np.zeros((0, 4), np.float32))

    def of(self, image: int) -> tuple[list[list[float]], list[str]]:
        """Corners (x0, y0, x1, y1) and labels of an image's boxes."""
        start, stop = np.searchsorted(self.images, [image, image + 1])
        labels = [self.names[int(k)] for k in self.kinds[start:stop]]
        return self.corners[start:stop].tolist(), labels


def load_sam(checkpoint: str, device: str):
    """(model, processor) of transformers."""
    import torch
    from transformers import SamModel, SamProcessor
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device: {device} is not there; --device cpu takes minutes an image "
                         "with sam-vit-huge")
    model = SamModel.from_pretrained(checkpoint).to(device).eval()
    return model, SamProcessor.from_pretrained(checkpoint)


def masks_of(sam, image: Path, corners: Sequence[Sequence[float]], labels: Sequence[str],
             batch_size: int) -> list[list]:
    """[label, IoU that SAM estimates, share of the box that is filled, run lengths] of each box.
    The image is encoded once."""
    import torch
    model, processor = sam
    found: list[list] = []
    pixels = upright(image).convert("RGB")
    kind = model.device.type
    with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        inputs = processor(pixels, input_boxes=[list(corners)], return_tensors="pt")
        boxes = inputs["input_boxes"].to(model.device, torch.float32)
        embedding = model.get_image_embeddings(inputs["pixel_values"].to(model.device))
        for start in range(0, len(corners), batch_size):
            some = slice(start, start + batch_size)
            output = model(image_embeddings=embedding, input_boxes=boxes[:, some],
                           multimask_output=False)
            resize = processor.image_processor.post_process_masks
            masks = resize(output.pred_masks.float(), inputs["original_sizes"],
                           inputs["reshaped_input_sizes"])[0][:, 0].cpu().numpy()
            scores = output.iou_scores[0, :, 0].float().tolist()
            for box, label, mask, score in zip(corners[some], labels[some], masks, scores):
                x0, y0, x1, y1 = box
                rows, columns = ((max(0, int(a)), int(np.ceil(b))) for a, b in ((y0, y1), (x0, x1)))
                fill = float(mask[slice(*rows), slice(*columns)].sum() / ((x1 - x0) * (y1 - y0)))
                found.append([label, round(score, 4), round(fill, 4), icas.run_lengths(mask)])
    return found
