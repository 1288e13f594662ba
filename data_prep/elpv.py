"""ELPV: 2,624 electroluminescence images of solar cells with the probability that they are
defective, no masks.

https://github.com/zae-bayern/elpv-dataset, from the PyPI package elpv-dataset:
data/images/cell0001.png ... and data/labels.csv with lines `path  probability  type` (mono or
poly). Probability 0 against 1; the two middle ones are dropped, InCTRL's protocol.
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

from .common import read_text, size

PUBLISHED = {"images": 2223, "good": 1508, "bad": 715}


def records(root: Path | None = None, out: Path | None = None) -> Iterator[dict]:
    """Records with absolute paths, from the package, or from a clone's `elpv_dataset` folder."""
    if root is None:
        try:
            import elpv_dataset
        except ImportError as error:
            raise ValueError("elpv: the package is missing; pip install elpv-dataset") from error
        root = Path(elpv_dataset.__file__).parent
    places = Path(root) / "data", Path(root), Path(root) / "src" / "elpv_dataset" / "data"
    data = next((p for p in places if (p / "labels.csv").is_file()), None)
    if data is None:
        raise FileNotFoundError(f"elpv: no data/labels.csv below {root}")
    for line in read_text(data / "labels.csv").splitlines():
        name, probability, _ = line.split()
        if float(probability) in (0, 1):
            image = data / name
            if not image.is_file():
                raise FileNotFoundError(f"elpv: {image} is missing")
            size(image)
            record = {"image": str(image), "labels": {}, "split": "test", "group": image.stem}
            yield record | ({"anomalous": True} if float(probability) else {})
