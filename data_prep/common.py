"""What every reader uses: files, images and masks, long JSON files, splits, counts, and the
manifest's writer and stream."""
from __future__ import annotations

import json
import os
import zlib
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Callable, Iterable, Iterator

import numpy as np
from PIL import ExifTags, Image, ImageOps

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


# ---- Files ---------------------------------------------------------------------------------------


def images(folder: Path) -> list[Path]:
    """Images right in a folder, sorted by name; macOS's ._ files and broken links are none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}")
    found = sorted(p for p in folder.iterdir()
                   if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())
    odd = [p for p in found if p.name != os.fsencode(p.name).decode("utf-8", "replace")]
    if odd:
        raise ValueError(f"{os.fsencode(odd[0])!r}: the file name is not UTF-8; rename it")
    return found


def by_stem(folder: Path) -> dict[str, Path]:
    """{name without its ending: path} of the images in a folder; empty where there is no folder."""
    return {p.stem: p for p in images(folder)} if folder.is_dir() else {}


def folders(root: Path) -> list[Path]:
    """Sub-folders, sorted, without hidden ones. Links count, but not those that lead back up."""
    above = {root.resolve(), *root.resolve().parents}
    return sorted(p for p in root.iterdir() if not p.name.startswith((".", "__")) and p.is_dir()
                  and not (p.is_symlink() and p.resolve() in above))


def child(folder: Path, path: str) -> Path:
    """folder/path, or what differs from it in capitals only: archives and file systems do.

    An exact spelling comes first, and stands where nothing is found.
    """
    if (folder / path).exists():
        return folder / path
    for name in PurePosixPath(path).parts:
        exact, wanted = folder / name, name.lower()
        if not exact.exists() and folder.is_dir():
            exact = min((p for p in folder.iterdir() if p.name.lower() == wanted), default=exact)
        folder = exact
    return folder


def first_folder(root: Path, *paths: str) -> Path:
    """The first `child` that is a folder, the last one if none is."""
    for path in paths:
        if (folder := child(root, path)).is_dir():
            break
    return folder


def missing(path: Path) -> dict:
    """Stands in for the record of a file that a list names and that is not there; `write_manifest`
    counts and names these."""
    return {"missing": str(path)}


def read_text(path: Path) -> str:
    """A small text file; utf-8, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error})") from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a whole JSON file ({error}); get it again") from error


def json_items(path: Path, *keys: str, chunk: int = 1 << 22) -> Iterator[tuple[str, Any]]:
    """(key, element) of the lists under `keys` in a JSON file that is one object: flat memory,
    however long the lists are.

    Objects365's annotations alone would take some 40 GB as Python objects.
    """
    decoder, text, at, end = json.JSONDecoder(), "", 0, False
    with open(path, encoding="utf-8-sig") as file:
        def more() -> None:
            nonlocal text, at, end
            block = file.read(max(chunk, len(text) - at))
            text, at, end = text[at:] + block, 0, not block

        def peek() -> str:
            nonlocal at
            while True:
                while at < len(text) and text[at] in " \t\r\n,:":
                    at += 1
                if at < len(text):
                    return text[at]
                if end:
                    raise ValueError("it ends too early")
                more()

        def value() -> Any:
            nonlocal at
            peek()
            while True:
                try:
                    found, stop = decoder.raw_decode(text, at)
                    # a number that touches the end of the block may go on in the next
                    if stop < len(text) or end:
                        at = stop
                        return found
                except json.JSONDecodeError:
                    if end:
                        raise
                more()

        try:
            if peek() != "{":
                raise ValueError("expected an object")
            at += 1
            while peek() != "}":
                key = value()
                if peek() != "[":
                    value()
                    continue
                at += 1
                while peek() != "]":
                    element = value()
                    if key in keys:
                        yield key, element
                at += 1
        except (json.JSONDecodeError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path}: not a whole JSON file ({error}); get it again") from error


# ---- Images and masks ----------------------------------------------------------------------------


def size(path: Path, wide: bool = False) -> tuple[int, int]:
    """(h, w) of an image file that the scripts can read: whole, upright, and of 8 bits a channel,
    unless `wide`, as masks may be.

    JPEG and PNG are whole when their end mark is there, which costs no decoding; all others are
    read through.
    """
    from icas import cut_to_8   # here, for it takes seconds, which --help need not wait
    try:
        with Image.open(path) as image:
            if cut_to_8(image):
                raise ValueError("colours of 16 bits a channel; save it with 8")
            if not wide and (image.mode in ("I", "F") or image.mode.startswith("I;16")):
                raise ValueError("16 bits or more a pixel, where black and white are anyone's "
                                 "guess; save it with 8")
            if not is_whole(path, image.format):
                image.load()
            return upright_size(image)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error}); get it again") from error


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(h, w) of an opened file's picture, turned as its EXIF says; decodes if it says so late."""
    if image.format == "TIFF" or image.format == "PNG" and exif_is_last(image.filename):
        image.load()  # Pillow turns a TIFF itself: when it opens or when it loads, by its version
    exif = Image.Image.getexif(image)  # a PNG's own getexif would decode it
    turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return image.size if turned else image.size[::-1]


def exif_is_last(path: str | Path) -> bool:
    """Whether a PNG's EXIF comes behind its pixels, where opening it does not look."""
    pixels = False
    with open(path, "rb", buffering=0) as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:  # a chunk's length and kind; content and CRC follow
            if head[4:] == b"eXIf":
                return pixels
            pixels |= head[4:] == b"IDAT"
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    return False


def upright(path: Path) -> Image.Image:
    """The picture of a file, read, and turned as its EXIF says."""
    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error}); get it again") from error


def is_whole(path: Path, format: str | None) -> bool:
    """Whether the end mark is there; Pillow reads a JPEG whose rest is zeros without a word, so
    that is an error."""
    mark = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(format or "")
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 64))
        tail = file.read()
    if mark and not tail.strip(b"\0"):
        tail = path.read_bytes().rstrip(b"\0")[-64:]
        if mark not in tail:
            raise ValueError("it ends in zeros, as unfinished downloads do")
    return bool(mark) and mark in tail


def read_mask(path: Path, image: Path) -> np.ndarray:
    """(h, w) array of a mask file, of the image's size: grey levels, palette indices or 16-bit
    values; RGB must be grey."""
    shape, mask = size(image), upright(path)
    array = mask_values(mask, path)
    if mask.format == "JPEG" and ((array > 0) & (array < 255)).any():
        raise ValueError(f"{path}: JPEG blurs a mask's outline into values between 0 and 255; "
                         "save it as PNG")
    if array.ndim == 3:
        if (array != array[..., :1]).any():
            raise ValueError(f"{path}: expected one value a pixel, got colours")
        array = array[..., 0]
    if array.shape != shape:
        raise ValueError(f"{path}: mask is {array.shape}, its image {image} {shape}")
    return array


def mask_values(mask: Image.Image, name: str | Path) -> np.ndarray:
    """(h, w) array of an opened mask, (h, w, 3) of one in colours; a palette gives its indices.

    Alpha that is the same everywhere says nothing and is dropped; any other raises ValueError.
    """
    mask = mask.convert({"La": "LA", "RGBa": "RGBA", "CMYK": "RGB"}.get(mask.mode, mask.mode))
    array = np.array(mask)
    if mask.mode in ("LA", "PA", "RGBA"):
        if np.ptp(array[..., -1]):
            raise ValueError(f"{name}: a mask with an alpha channel does not say what is marked; "
                             "save it as a grey PNG")
        array = array[..., 0] if array.shape[-1] == 2 else array[..., :3]
    return array


def starts_black(path: Path) -> bool:
    """Whether value 0 of a palette PNG is shown black: an optimiser may have swapped what is marked
    and what is not."""
    with Image.open(path) as mask:
        return mask.mode not in ("P", "PA") or (mask.getpalette() or [0, 0, 0])[:3] == [0, 0, 0]


def write_png(path: Path, array: np.ndarray) -> Path:
    """Write an 8-bit grey PNG, whole or not at all, unless the same picture is there already."""
    array = array.astype(np.uint8)
    if not path.is_file() or not np.array_equal(np.array(Image.open(path)), array):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        Image.fromarray(array).save(part, format="PNG")
        part.replace(path)
    return path.resolve()


def merge(codes: list[dict]) -> dict:
    """The union of run lengths of one size."""
    from pycocotools import mask as coco
    return codes[0] if len(codes) == 1 else as_text(coco.merge(codes))


def as_text(code: dict) -> dict:
    """pycocotools gives `counts` as bytes, JSON needs text."""
    return {"size": [int(n) for n in code["size"]], "counts": code["counts"].decode("ascii")}


def area(code: dict) -> int:
    from pycocotools import mask as coco
    return int(coco.area(code))


def painted(image: Path, split: str, masks: dict[str, dict]) -> dict:
    """The record of an image with {label: run lengths}, the largest first: what is painted later
    lies on top."""
    record = {"image": str(image), "labels": {}, "split": split, "group": image.stem}
    if not masks:
        return record
    order = sorted(masks, key=lambda name: (-area(masks[name]), name))
    numbered = {str(i): name for i, name in enumerate(order, start=1)}
    return record | {"mask": {i: masks[name] for i, name in numbered.items()}, "labels": numbered}


def cuts(h: int, w: int, strips: int) -> list[list[int]]:
    """Boxes [x0, y0, x1, y1] of equal strips along the longer side."""
    edges = [max(h, w) * i // strips for i in range(strips + 1)]
    return [[0, a, w, b] if h >= w else [a, 0, b, h] for a, b in zip(edges, edges[1:])]


# ---- Splits --------------------------------------------------------------------------------------


def split_of(group: str, share: float = 0.75) -> str:
    """ "train" for about `share` of all groups, decided by the group's name alone: no order, no
    seed, nothing to keep in step."""
    return "train" if zlib.crc32(group.encode()) / 2 ** 32 < share else "test"


# ---- Manifest ------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def relative(folder: str, base: str) -> str:
    return os.path.relpath(folder, base).replace(os.sep, "/")


def write_manifest(
        records: Iterable[dict], out: Path,
        accept: Callable[[dict[str, int], list[str]], None] = lambda counts, missed: None,
        ) -> dict[str, int]:
    """Write OUT/manifest.jsonl from records with absolute paths, in flat memory. returns counts.

    accept  is called with the counts and the first missing files before the manifest gets its name;
            what it raises leaves none.
    Counts: images, masks, good, bad, missing, groups (that follow each other), the same by split
    ("train bad") and category.
    """
    out.mkdir(parents=True, exist_ok=True)
    base, part = str(out.resolve()), out / "manifest.jsonl.part"
    counts: dict[str, int] = {}
    labels: set[str] = set()
    missed: list[str] = []
    before = None
    try:
        with open(part, "w", encoding="utf-8") as file:
            for record in records:
                if "missing" in record:
                    counts["missing"] = counts.get("missing", 0) + 1
                    missed += [record["missing"]] if len(missed) < 5 else []
                    continue
                file.write(line_of(record, base))
                for key in kinds_of(record) + (["groups"] if record["group"] != before else []):
                    counts[key] = counts.get(key, 0) + 1
                labels.update(record.get("labels", {}).values())
                before = record["group"]
        if not set(counts) - {"missing"}:
            raise ValueError(f"{out}: no record was found; is --root the downloaded folder?"
                             + "".join(f" {m} is missing" for m in missed[:1]))
        categories = sum(key.startswith("category ") for key in counts)
        counts |= {"labels": len(labels), "categories": categories}
        accept(counts, missed)
        part.replace(out / "manifest.jsonl")
    finally:
        part.unlink(missing_ok=True)
    return counts


def line_of(record: dict, base: str) -> str:
    """One line of a manifest in folder `base`: `image` and `mask` relative to it."""
    paths = {}
    for key in ("image", "mask"):
        if isinstance(record.get(key), str):
            folder, name = os.path.split(record[key])
            paths[key] = f"{relative(folder, base)}/{name}"
    return json.dumps(record | paths, ensure_ascii=False) + "\n"


def kinds_of(record: dict) -> list[str]:
    """What a record counts as."""
    kind = "bad" if "mask" in record or record.get("anomalous") else "good"
    kinds = ["images", kind, record["split"], f"{record['split']} {kind}"]
    kinds += ["masks"] * ("mask" in record)
    return kinds + ([f"category {record['category']}"] if "category" in record else [])


def stream(path: Path) -> Iterator[dict]:
    """Records of a manifest one by one, however many there are."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def check(counts: dict[str, int], published: dict[str, int], missed: list[str], partial: bool,
          ) -> list[str]:
    """Lines that compare what was found with what was published. Raises ValueError on a difference
    unless `partial`."""
    lines = []
    for key, want in published.items():
        found = counts.get(key, 0)
        lines.append(f"{key}: {found}" + ("" if want == found else f", published {want}"))
    wrong = [line for line in lines if "published" in line]
    if missed:
        more = counts["missing"] - len(missed)
        wrong.append(f"{counts['missing']} files are missing: " + ", ".join(missed)
                     + (f" and {more} more" if more else ""))
        lines.append(wrong[-1])
    if wrong and not partial:
        raise ValueError("counts differ from the published ones: " + "; ".join(wrong)
                         + ". Get what is missing, or pass --partial")
    return lines
