"""AITEX (AFID): 4096 x 256 scans of seven fabrics, https://www.aitex.es/afid
(Silvestre-Blanes et al., 2019)

    ROOT/Defect_images/nnnn_ddd_ff.png           image, defect code, fabric
    ROOT/Mask_images/nnnn_ddd_ff_mask.png        also ..._mask1.png and ..._mask2.png of one image
    ROOT/NODefect_images/FABRIC/nnnn_000_ff.png

Windows of 256 px, InCTRL's protocol: of defective images only those with marked pixels, of good
ones all but those of one colour (the white that fills up short scans). The last window of a scan
that is not a multiple of 256 wide overlaps the one before. Several masks of one image become one.
The archives hold 247 scans, 106 bad and 141 good (the page says 245: 105 and 140); 0100_025_08 has
no mask and that of 0106_010_03 marks nothing, so that 245 give windows. One scan is 3796 wide. From
two audits of the archives on GitHub (search for 0100_025_08).
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

import numpy as np

from .common import child, folders, images, missing, read_mask, size, upright, write_png

PUBLISHED = {"groups": 245}
CODES = {"002": "broken end", "006": "broken yarn", "010": "broken pick", "016": "weft curling",
         "019": "fuzzy ball", "022": "cut selvage", "023": "crease", "025": "warp ball",
         "027": "knots", "029": "contamination", "030": "nep", "036": "weft crack"}


def windows(h: int, w: int) -> list[list[int]]:
    """Boxes [x0, y0, x1, y1] of at most 256 x 256 that cover the scan's length."""
    starts = list(range(0, w - 255, 256)) or [0]
    starts += [w - 256] if starts[-1] + 256 < w else []
    return [[x, 0, min(x + 256, w), min(h, 256)] for x in starts]


def records(root: Path, out: Path) -> Iterator[dict]:
    root = root.resolve()
    masks: dict[str, list[Path]] = {}
    marked = child(root, "Mask_images")
    for mask in images(marked):
        masks.setdefault(mask.stem.rpartition("_mask")[0], []).append(mask)
    for image in images(child(root, "Defect_images")):
        mine = masks.get(image.stem, [])
        if image.stem != "0100_025_08" and mine:
            yield from defective(image, mine, out)
        elif image.stem != "0100_025_08":
            yield missing(marked / f"{image.stem}_mask.png")
    for fabric in folders(child(root, "NODefect_images")):
        for image in images(fabric):
            yield from good(image)


def scan(image: Path) -> dict:
    """What the windows of a scan share."""
    fabric = image.stem.split("_")[-1]
    return {"image": str(image), "labels": {}, "split": "test", "group": image.stem,
            "category": f"fabric {fabric}"}


def defective(image: Path, masks: list[Path], out: Path) -> Iterator[dict]:
    """White is the defect (the data's page); values between are cut in the middle, in a copy of the
    mask."""
    label = np.maximum.reduce([read_mask(m, image) > 127 for m in masks])
    code = (image.stem.split("_") + [""])[1]
    whole = write_png(out / "masks" / f"{image.stem}.png", label * 255)
    marks = {"mask": str(whole), "labels": {"*": CODES.get(code, f"defect {code}")}}
    for x0, y0, x1, y1 in windows(*label.shape):
        if label[y0:y1, x0:x1].any():
            yield scan(image) | marks | {"box": [x0, y0, x1, y1]}


def good(image: Path) -> Iterator[dict]:
    size(image)
    grey = np.array(upright(image).convert("L"))
    for x0, y0, x1, y1 in windows(*grey.shape):
        if np.ptp(grey[y0:y1, x0:x1]) > 0:
            yield scan(image) | {"box": [x0, y0, x1, y1]}
