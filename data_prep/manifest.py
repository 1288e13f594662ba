"""Reading manifests: records, images and label maps, of any number of lines. The format is in
`data_prep/__init__.py`."""
from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

import icas

from .common import mask_values, size


def manifest_lines(path: Path, limit: int | None) -> Iterator[tuple[str, str]]:
    """(place, line) of a manifest; of a file with more than about `limit` lines, that many spread
    evenly over its bytes."""
    with open(path, "rb") as file:
        whole, head = path.stat().st_size, file.read(1 << 16)
        length = len(head) / max(1, head.count(b"\n"))
        if limit is None or whole / length <= limit:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                yield f"{path}:{number}", line.decode("utf-8", "replace")
            return
        before = -1
        for start in range(0, whole, -(-whole // limit)):
            file.seek(max(0, start - 1))
            if start:
                file.readline()  # the rest of the line that `start` falls into
            if (at := file.tell()) > before and (line := file.readline()):
                yield f"{path}, byte {at}", line.decode("utf-8", "replace")
            before = at


def manifest_file(path: str | Path) -> Path:
    """The manifest given, or that of the folder given."""
    path = Path(path)
    return path / "manifest.jsonl" if path.is_dir() else path


def read_manifest(path: str | Path, limit: int | None = None) -> list[dict]:
    """Records of one manifest, in file order, with absolute `image` and `mask` paths and the place
    in `where`.

    limit  reads about so many of a longer manifest, in seconds however long it is.
    """
    path = manifest_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"data: no manifest at {path}; give a manifest.jsonl or the folder "
                                "that holds one")
    records = []
    for where, line in manifest_lines(path, limit):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not a JSON record ({error})") from error
        check_record(record, where)
        for key in ("image", "mask"):
            if isinstance(record.get(key), str):
                record[key] = str(path.parent / record[key])
                if not Path(record[key]).is_file():
                    raise FileNotFoundError(f"{where}: {key} file is missing: {record[key]}")
        records.append(record | {"where": where, "set": path.parent.name})
    if not records:
        raise ValueError(f"{path}: the manifest has no record")
    return records


def check_record(record: object, where: str) -> None:
    """Raise ValueError if a record lacks the form of a manifest's (data_prep)."""
    if not isinstance(record, dict) or not isinstance(record.get("image"), str):
        raise ValueError(f'{where}: expected a record with "image": PATH, got {str(record)[:80]}')
    labels, mask = record.get("labels", {}), record.get("mask", "")
    if not isinstance(labels, dict) or not all(
            isinstance(name, str) and (v == "*" or v.isdecimal() and int(v) < 256)
            for v, name in labels.items()):
        raise ValueError(f'{where}: labels: expected {{"VALUE": "NAME"}}, a value being "*" or '
                         f'1 to 255, got {str(labels)[:80]}')
    if not isinstance(mask, (str, dict)):
        raise ValueError(f"{where}: mask: expected a path or {{VALUE: COCO RLE}}, "
                         f"got {str(mask)[:80]}; or none")


def check_sizes(records: Sequence[dict], workers: int) -> None:
    """Raise ValueError for the first record whose image or mask `size` refuses, or whose sizes
    differ. Reads little but headers."""
    def read_size(path: str, where: str, wide: bool = False) -> tuple[int, int]:
        try:
            return size(Path(path), wide)
        except ValueError as error:
            raise ValueError(f"{where}: {path!r} is not a readable image "
                             f"({error.__cause__})") from error

    def check(record: dict) -> None:
        where, mask = place(record), record.get("mask", {})
        given = read_size(record["image"], where)
        others = ([read_size(mask, where, wide=True)] if isinstance(mask, str)
                  else [tuple(code["size"]) for code in mask.values()])
        for other in others:
            if other != given:
                raise ValueError(f"{where}: mask is {other}, its image {given}")
    with ThreadPoolExecutor(max(1, workers)) as pool:
        list(pool.map(check, records))


def place(record: dict) -> str:
    return record.get("where", record["image"])


def read_labels(record: dict) -> np.ndarray | None:
    """(H, W) uint8 label map of the whole image, 1 for every mark of a "*" label; None without a
    mask."""
    if "mask" not in record:
        return None
    if isinstance(record["mask"], dict):
        from pycocotools import mask as coco
        labels = np.zeros(next(iter(record["mask"].values()))["size"], np.uint8)
        for value, code in record["mask"].items():
            part = coco.decode(code)
            if part.shape != labels.shape:
                raise ValueError(f"{place(record)}: mask {value!r} is {part.shape}, another "
                                 f"{labels.shape}")
            labels[part > 0] = 1 if value == "*" else int(value)
        return labels
    where = place(record)
    labels = mask_values(icas.open_image(record["mask"], where)[0],
                         f"{where}: {record['mask']!r}")
    if labels.ndim == 3:
        labels = labels.max(axis=-1)
    if "*" in record.get("labels", {}):
        return (labels > 0).astype(np.uint8)
    if labels.max(initial=0) > 255:
        raise ValueError(f"{where}: mask has the value {labels.max()}; a label map has one byte a "
                         "pixel")
    return labels.astype(np.uint8)


def read_record(record: dict) -> tuple[Tensor, Tensor]:
    """image (3, H, W) float in [0, 1], label map (H, W) uint8: zeros without a mask, 1 for every
    mark of a "*" label (data_prep)."""
    image = icas.to_rgb(record["image"], place(record)).permute(2, 0, 1).float() / 255
    labels = read_labels(record)
    labels = (torch.zeros(image.shape[1:], dtype=torch.uint8) if labels is None
              else torch.from_numpy(labels))
    if labels.shape != image.shape[1:]:
        raise ValueError(f"{place(record)}: mask is {tuple(labels.shape)}, "
                         f"its image {tuple(image.shape[1:])}")
    return in_box(record, image), in_box(record, labels)


def read_pixels(record: dict) -> tuple[Tensor, Tensor]:
    """The same as (H, W, 3) uint8 and (H, W) uint8."""
    image, labels = read_record(record)
    return (image * 255).round().byte().permute(1, 2, 0), labels


def in_box(record: dict, array):
    """The part of a (..., H, W) array that counts."""
    x0, y0, x1, y1 = record.get("box", [None] * 4)
    return array[..., y0:y1, x0:x1]


def named(record: dict) -> dict[str, str]:
    """{value: label} of a record, as `read_record` gives the values."""
    labels = record.get("labels", {})
    return {"1": labels["*"]} if "*" in labels else labels


def choose(manifest: str | Path, count: int, good: int, seed: int) -> list[dict]:
    """Up to `count` marked images of a manifest, and `good` unmarked ones (0: all), sorted; of very
    long manifests a sample."""
    records = read_manifest(manifest, limit=100_000)
    rng, chosen = np.random.default_rng([seed, sum(map(ord, records[0]["set"]))]), []
    marked = [r for r in records if "mask" in r]
    plain = [r for r in records if "mask" not in r and not r.get("anomalous")]
    for part, number in ((marked, count), (plain, good)):
        chosen += [part[i] for i in sorted(rng.permutation(len(part))[:number or len(part)])]
    return chosen


def by_category(record: dict) -> dict[str, str]:
    """{value: label}; a scratch on another object is another label: pairs share object and type."""
    return {v: f"{record['category']} {name}" if "category" in record else name
            for v, name in named(record).items()}


def group(record: dict) -> str:
    return record.get("group", record["image"])
