"""AITEX (AFID): 4096 x 256 scans of seven fabrics, https://www.aitex.es/afid (Silvestre-Blanes et al., 2019)

    ROOT/Defect_images/nnnn_ddd_ff.png           image, defect code, fabric
    ROOT/Mask_images/nnnn_ddd_ff_mask.png        also ..._mask1.png and ..._mask2.png of one image
    ROOT/NODefect_images/FABRIC/nnnn_000_ff.png

Windows of 256 px (METHOD 4): of defective images only those with marked pixels, of good ones all. Several masks of one image become one.
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

import numpy as np

from .common import folders, images, read_mask, size, write_mask

PUBLISHED: dict[str, int] = {}  # 245 scans (140 good, 105 bad); windows depend on where the defects lie
CODES = {"002": "broken end", "006": "broken yarn", "010": "broken pick", "016": "weft curling", "019": "fuzzy ball", "022": "cut selvage",
         "023": "crease", "025": "warp ball", "027": "knots", "029": "contamination", "030": "nep", "036": "weft crack"}


def windows(h: int, w: int) -> list[list[int]]:
    return [[x, 0, x + 256, min(h, 256)] for x in range(0, w - 255, 256)]


def records(root: Path, out: Path) -> Iterator[dict]:
    root = root.resolve()
    masks = images(root / "Mask_images")
    for image in images(root / "Defect_images"):
        number, code, fabric = image.stem.split("_")[:3]
        mine = [m for m in masks if m.stem == f"{image.stem}_mask" or m.stem.startswith(f"{image.stem}_mask")]
        if not mine:
            continue  # 0100_025_08.png was published without a mask
        label = np.maximum.reduce([(read_mask(m, image) > 127).astype(np.uint8) for m in mine])
        path = mine[0] if len(mine) == 1 else write_mask(out / "masks" / f"{image.stem}.png", label * 255)
        for x0, y0, x1, y1 in windows(*label.shape):
            if label[y0:y1, x0:x1].any():
                yield {"image": str(image), "mask": str(path.resolve()), "labels": {"*": CODES.get(code, f"defect {code}")},
                       "split": "test", "group": number, "category": f"fabric {fabric}", "box": [x0, y0, x1, y1]}
    for fabric in folders(root / "NODefect_images"):
        for image in images(fabric):
            number, _, kind = image.stem.split("_")[:3]
            for box in windows(*size(image)):
                yield {"image": str(image), "labels": {}, "split": "test", "group": number, "category": f"fabric {kind}", "box": box}
