"""Objects365 v2, boxes only; SAM turns them into masks (Sec. 3.3). https://www.objects365.org/download.html

    ROOT/{train,val}/patch0/objects365_v2_00900001.jpg, ROOT/annotations/zhiyuan_objv2_{train,val}.json (COCO's format, boxes x y w h)

Each image's masks are kept in OUT/sam/PATCH/NAME.json as soon as they are made: a run that was stopped goes on there. Masks whose IoU SAM
itself estimates below --quality, and those that fill less than a third of their box, are left out.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np

from .coco import record, rle
from .common import size

PUBLISHED = {"images": 1742289 + 80000}


def add_arguments(parser) -> None:
    parser.add_argument("--sam", default="facebook/sam-vit-huge", help="SAM checkpoint for transformers: a name or a folder")
    parser.add_argument("--quality", type=float, default=0.88, help="least IoU that SAM estimates of a mask (default 0.88)")
    parser.add_argument("--batch-size", type=int, default=32, help="boxes at once (default 32)")
    parser.add_argument("--device", default="cuda", help="cuda, cpu, mps (default cuda)")


def records(root: Path, out: Path, sam: str = "facebook/sam-vit-huge", quality: float = 0.88, batch_size: int = 32,
            device: str = "cuda") -> Iterator[dict]:
    root, model = root.resolve(), None
    for split, name in (("train", "train"), ("test", "val")):
        path = root / "annotations" / f"zhiyuan_objv2_{name}.json"
        if not path.is_file():
            continue
        data = json.loads(path.read_text())
        names = {c["id"]: c["name"] for c in data["categories"]}
        boxes: dict[int, list[dict]] = {}
        for entry in data["annotations"]:
            if not entry.get("iscrowd"):
                boxes.setdefault(entry["image_id"], []).append(entry)
        for info in data["images"]:
            image = root / name / Path(info["file_name"]).parent.name / Path(info["file_name"]).name
            kept = out / "sam" / image.parent.name / f"{image.stem}.json"
            if not kept.is_file():
                mine = boxes.get(info["id"], [])
                found = {}
                if mine:
                    model = model or load_sam(sam, device)
                    found = masks_of(model, image, [e["bbox"] for e in mine], [names[e["category_id"]] for e in mine], quality, batch_size)
                size(image)
                kept.parent.mkdir(parents=True, exist_ok=True)
                part = kept.with_suffix(".part")
                part.write_text(json.dumps(found))
                part.replace(kept)
            yield record(image, split, json.loads(kept.read_text()))


def load_sam(checkpoint: str, device: str):
    """(model, processor) of transformers."""
    from transformers import SamModel, SamProcessor
    return SamModel.from_pretrained(checkpoint).to(device).eval(), SamProcessor.from_pretrained(checkpoint)


def masks_of(sam, image: Path, boxes: Sequence[Sequence[float]], labels: Sequence[str], quality: float, batch_size: int) -> dict[str, dict]:
    """Label -> RLE of the union of its boxes' masks; boxes (x, y, w, h) in pixels. The image is encoded once."""
    import torch
    from PIL import Image
    model, processor = sam
    with Image.open(image) as opened:
        pixels = opened.convert("RGB")
    whole: dict[str, np.ndarray] = {}
    corners = [[x, y, x + w, y + h] for x, y, w, h in boxes]
    with torch.inference_mode():
        inputs = processor(pixels, return_tensors="pt").to(model.device)
        embedding = model.get_image_embeddings(inputs["pixel_values"])
        for start in range(0, len(corners), batch_size):
            part = corners[start:start + batch_size]
            prompt = processor(pixels, input_boxes=[part], return_tensors="pt")
            output = model(image_embeddings=embedding, input_boxes=prompt["input_boxes"].to(model.device, torch.float32), multimask_output=False)
            resize = processor.image_processor.post_process_masks
            masks = resize(output.pred_masks.float().cpu(), prompt["original_sizes"], prompt["reshaped_input_sizes"])[0][:, 0].numpy()
            scores = output.iou_scores[0, :, 0].tolist()
            for (x0, y0, x1, y1), label, mask, score in zip(part, labels[start:], masks, scores):
                inside = mask[int(y0):int(np.ceil(y1)), int(x0):int(np.ceil(x1))].sum()
                if score >= quality and inside >= (x1 - x0) * (y1 - y0) / 3:
                    whole[label] = whole.get(label, False) | mask
    return {label: rle(mask) for label, mask in sorted(whole.items())}
