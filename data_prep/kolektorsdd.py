"""KolektorSDD: 399 images of 50 commutators, 52 with cracks, https://www.vicos.si/resources/kolektorsdd

    ROOT/kos01/Part0.jpg, ROOT/kos01/Part0_label.bmp (0 where there is nothing)

kos26 and kos34 repeat the images of kos01 and kos27 under other labels, and kos21/Part7 is kos21/Part6: left out. `--strips 3` cuts
each image into three equal parts along its longer side, as the few-shot protocol does.
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

from .common import folders, images, read_mask

PUBLISHED = {"images": 383}  # without the repeated ones; times --strips
REPEATED = {"kos26", "kos34"}


def add_arguments(parser) -> None:
    parser.add_argument("--strips", type=int, default=1, help="equal parts of each image (few-shot protocol: 3)")


def records(root: Path, out: Path, strips: int = 1) -> Iterator[dict]:
    PUBLISHED["images"] = 383 * strips
    for item in folders(root.resolve()):
        if not item.name.startswith("kos") or item.name in REPEATED:
            continue
        for image in images(item):
            if image.stem.endswith("_label") or (item.name, image.stem) == ("kos21", "Part7"):
                continue
            mask = next((p for p in images(item) if p.stem == image.stem + "_label"), None)
            if mask is None:
                raise FileNotFoundError(f"{image.with_name(image.stem + '_label.bmp')} is missing")
            array = read_mask(mask, image)
            h, w = array.shape
            for part in range(strips):
                start, stop = max(h, w) * part // strips, max(h, w) * (part + 1) // strips
                y0, y1, x0, x1 = (start, stop, 0, w) if h >= w else (0, h, start, stop)
                record = {"image": str(image), "labels": {}, "split": "test", "group": item.name}
                if strips > 1:
                    record["box"] = [x0, y0, x1, y1]
                yield record | {"mask": str(mask), "labels": {"*": "crack"}} if array[y0:y1, x0:x1].any() else record
