"""What every reader uses: listing files, the manifest's writer and reader, splits, counts."""
from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Iterable, Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


def images(folder: Path) -> list[Path]:
    """Images right in a folder, sorted by name; macOS's ._ files and broken links are not images."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}")
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())


def folders(root: Path) -> list[Path]:
    """Sub-folders, sorted; hidden ones and links are left out (a link may lead back up)."""
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.is_symlink() and not p.name.startswith((".", "__")))


def size(path: Path) -> tuple[int, int]:
    """(h, w) of an image file, read whole so that a truncated one is found now and not in the middle of a training."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.height, image.width
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: not a readable image ({error}); get it again") from error


def read_mask(path: Path, image: Path) -> np.ndarray:
    """(h, w) array of a mask file, of the image's size: grey levels, palette indices or 16-bit values; RGB must be grey."""
    shape = size(image)
    size(path)
    with Image.open(path) as mask:
        array = np.array(mask.convert("RGB") if mask.mode in ("RGBA", "CMYK") else mask)
    if array.ndim == 3:
        if (array != array[..., :1]).any():
            raise ValueError(f"{path}: expected one value a pixel, got colours")
        array = array[..., 0]
    if array.shape != shape:
        raise ValueError(f"{path}: mask is {array.shape}, its image {image} {shape}")
    return array


def write_mask(path: Path, labels: np.ndarray) -> Path:
    """Write an 8-bit label map unless it is there already; whole or not at all."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        Image.fromarray(labels.astype(np.uint8)).save(part, format="PNG")
        part.replace(path)
    return path


def split_of(group: str, share: float = 0.75) -> str:
    """ "train" for about `share` of all groups, decided by the group's name alone: no order, no seed, nothing to keep in step."""
    return "train" if zlib.crc32(group.encode()) / 2 ** 32 < share else "test"


def write_manifest(records: Iterable[dict], out: Path) -> dict[str, int]:
    """Write OUT/manifest.jsonl from records with absolute paths; a stopped run leaves none. Returns counts; memory stays flat."""
    out.mkdir(parents=True, exist_ok=True)
    base, part = out.resolve(), out / "manifest.jsonl.part"
    counts: dict[str, int] = {}
    seen: dict[str, set] = {"categories": set(), "labels": set()}
    before = None
    with open(part, "w", encoding="utf-8") as file:
        for record in records:
            paths = {k: os.path.relpath(record[k], base).replace(os.sep, "/") for k in ("image", "mask") if isinstance(record.get(k), str)}
            file.write(json.dumps(record | paths, ensure_ascii=False) + "\n")
            bad = "mask" in record or record.get("anomalous", False)
            for key in ("images", record["split"], "masks" if "mask" in record else "", "bad" if bad else "good",
                        f"{record['split']} {'bad' if bad else 'good'}"):
                if key:
                    counts[key] = counts.get(key, 0) + 1
            counts["groups"] = counts.get("groups", 0) + (record["group"] != before)   # readers give a group's records one after another
            before = record["group"]
            seen["categories"].add(record.get("category", ""))
            seen["labels"].update(record.get("labels", {}).values())
    if not counts:
        part.unlink()
        raise ValueError(f"{out}: no record was found; is --root the downloaded folder?")
    part.replace(out / "manifest.jsonl")
    return counts | {k: len(v - {""}) for k, v in seen.items()}


def stream(path: Path) -> Iterator[dict]:
    """Records of a manifest one by one, however many there are."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def check(counts: dict[str, int], published: dict[str, int], partial: bool) -> list[str]:
    """Lines that compare what was found with what was published. Raises ValueError on a difference unless `partial`."""
    lines = [f"{key}: {counts.get(key, 0)}" + ("" if want == counts.get(key, 0) else f", published {want}")
             for key, want in published.items()]
    wrong = [line for line in lines if "published" in line]
    if wrong and not partial:
        raise ValueError("counts differ from the published ones: " + "; ".join(wrong) + ". Get what is missing, or pass --partial")
    return lines
