#!/usr/bin/env python3
"""Train the in-context decoder: the generic stage, then the anomaly stage (Sec. 3.3).

    python train.py --stage generic --data DIR/voc/manifest.jsonl DIR/ccp/manifest.jsonl --out runs/generic
    python train.py --stage anomaly --data DIR/leather/manifest.jsonl --init runs/generic/last.safetensors --out runs/anomaly
    python train.py --stage anomaly --data ... --cache .cache/views --layers 3 --batch-size 8 --steps 3000   # on a CPU

With --cache the frozen encoder sees each augmented view once and its features are kept (fp16), so that a CPU can train.
A manifest is one JSON record a line: {"image", "mask", "labels": {"value": "name"}, "split", "group"}, paths relative to it.
"""
from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

import icas


# ---- Manifests -------------------------------------------------------------------------------------------------------


def manifest_lines(path: Path, limit: int | None) -> Iterator[tuple[str, str]]:
    """(place, line) of a manifest; of a file with more than about `limit` lines, that many spread evenly over its bytes."""
    with open(path, "rb") as file:
        size, head = path.stat().st_size, file.read(1 << 16)
        length = len(head) / max(1, head.count(b"\n"))
        if limit is None or size / length <= limit:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                yield f"{path}:{number}", line.decode("utf-8")
            return
        for start in range(0, size, -(-size // limit)):
            file.seek(max(0, start - 1))
            file.readline()  # the rest of the line that `start` falls into
            if line := file.readline():
                yield f"{path}, byte {start}", line.decode("utf-8")


def read_manifest(path: str | Path, split: str | None = None, limit: int | None = None) -> list[dict]:
    """Records of one manifest, in file order, with absolute `image` and `mask` paths and the place in `where`.

    limit  reads about so many of a longer manifest, in seconds however long it is.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "manifest.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"data: no manifest at {path}; give a manifest.jsonl or the folder that holds one")
    records = []
    for where, line in manifest_lines(path, limit):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not a JSON record ({error})") from error
        for key in ("image", "mask"):
            if isinstance(record.get(key), str):
                record[key] = str(path.parent / record[key])
                if not Path(record[key]).is_file():
                    raise FileNotFoundError(f"{where}: {key} file is missing: {record[key]}")
        if split is None or record.get("split", split) == split:
            records.append(record | {"where": where, "set": path.parent.name})
    if not records:
        raise ValueError(f"{path}: the manifest has no record" + (f" of split {split!r}" if split else ""))
    return records


def read_record(record: dict) -> tuple[Tensor, Tensor]:
    """image (3, H, W) float in [0, 1], label map (H, W) uint8: zeros without a mask, 1 for every mark of a "*" label (data_prep)."""
    image = icas.to_rgb(record["image"]).permute(2, 0, 1).float() / 255
    if "mask" not in record:
        labels = np.zeros(image.shape[1:], np.uint8)
    elif isinstance(record["mask"], dict):
        from pycocotools import mask as coco
        labels = np.zeros(image.shape[1:], np.uint8)
        for value, code in record["mask"].items():
            part = coco.decode(code)
            if part.shape != labels.shape:
                raise ValueError(f"{record.get('where', record['image'])}: mask {value!r} is {part.shape}, its image {labels.shape}")
            labels[part > 0] = int(value)
    else:
        labels = np.array(Image.open(record["mask"]))
        labels = labels.max(axis=-1) if labels.ndim == 3 else labels
    if "box" in record:
        x0, y0, x1, y1 = record["box"]
        if labels.shape == image.shape[1:]:
            image, labels = image[:, y0:y1, x0:x1], labels[y0:y1, x0:x1]
    if "*" not in record.get("labels", {}) and labels.max(initial=0) > 255:
        raise ValueError(f"{record.get('where', record['image'])}: mask has the value {labels.max()}; a label map has one byte a pixel")
    labels = torch.from_numpy((labels > 0).astype(np.uint8) if "*" in record.get("labels", {}) else labels.astype(np.uint8))
    if labels.shape != image.shape[1:]:
        raise ValueError(f"{record.get('where', record['image'])}: mask is {tuple(labels.shape)}, its image {tuple(image.shape[1:])}")
    return image, labels


def named(record: dict) -> dict[str, str]:
    """{value: label} of a record, as `read_record` gives the values."""
    labels = record.get("labels", {})
    return {"1": labels["*"]} if "*" in labels else labels


# ---- Views: augmentation (R15) and synthetic defects -------------------------------------------------------------------


def augment(image: Tensor, labels: Tensor, size: int, rng: np.random.Generator, turns: bool) -> tuple[Tensor, Tensor]:
    """One square view: crop or zoom out, flip, quarter turn (anomaly data), colour. returns (3, size, size) and (size, size)."""
    h, w = labels.shape
    if rng.random() < 0.2:  # zoom out to as little as 0.4: mirrored copies fill the frame
        pad_y, pad_x = (min(n - 1, round(n * rng.uniform(0.1, 0.75))) for n in (h, w))
        image = F.pad(image[None], (pad_x, pad_x, pad_y, pad_y), mode="reflect")[0]
        labels = F.pad(labels[None, None].float(), (pad_x, pad_x, pad_y, pad_y), mode="reflect")[0, 0].byte()
        h, w = labels.shape
    for attempt in range(10):
        side, aspect = min(h, w) * rng.uniform(0.45, 1.0), np.exp(rng.uniform(-0.2, 0.2))
        ch, cw = min(h, round(side * aspect)), min(w, round(side / aspect))
        if rng.random() < 0.3 or attempt == 9:
            ch, cw = h, w
        y, x = rng.integers(h - ch + 1), rng.integers(w - cw + 1)
        crop = labels[y:y + ch, x:x + cw]
        # keep the object: a tenth of what is marked, in at least 12 px
        if not labels.any() or int((crop > 0).sum()) >= max(12, 0.1 * int((labels > 0).sum())):
            break
    image, labels = image[:, y:y + ch, x:x + cw], crop
    if rng.random() < 0.5:
        image, labels = image.flip(-1), labels.flip(-1)
    if turns:
        quarter = int(rng.integers(4))
        image, labels = image.rot90(quarter, (-2, -1)), labels.rot90(quarter, (-2, -1))
    image = F.interpolate(image[None], size=(size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)
    labels = F.interpolate(labels[None, None].float(), size=(size, size), mode="nearest-exact")[0, 0].byte()
    return colour(image, rng), labels


def colour(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Light, shade, contrast, tint, blur and noise; (3, H, W) in [0, 1]."""
    if rng.random() < 0.1:
        image = 1 - image
    if rng.random() < 0.15:
        image = image[rng.permutation(3)]
    if rng.random() < 0.3:  # light from one side
        angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.6)
        y, x = (torch.linspace(-0.5, 0.5, n) for n in image.shape[-2:])
        image = image * (1 + depth * (np.sin(angle) * y[:, None] + np.cos(angle) * x))
    gain = torch.from_numpy(rng.uniform(0.75, 1.3) * rng.uniform(0.93, 1.07, (3, 1, 1))).float()
    image = (image.clamp(0, 1) ** rng.uniform(0.6, 1.7)) * gain
    image = (image - image.mean()) * rng.uniform(0.5, 1.4) + image.mean()
    if rng.random() < 0.1:
        image = image.mean(dim=0, keepdim=True).expand(3, -1, -1)
    if rng.random() < 0.2:
        image = torch.from_numpy(ndimage.gaussian_filter(image.numpy(), (0, *[rng.uniform(0.5, 1.5)] * 2)))
    if rng.random() < 0.3:
        image = image + torch.from_numpy(rng.normal(0, rng.uniform(0, 0.04), image.shape)).float()
    return image.clamp(0, 1)


@dataclass(frozen=True)
class SyntheticDefect:
    """One kind of damage, drawn once and then put on several images, each time in a new shape and place."""
    kind: str            # one of KINDS
    size: float          # length or diameter as a share of the image's side
    width: float         # of lines, as a share of the side
    colour: tuple        # RGB in [0, 1]
    opacity: float       # 0.3 to 1
    softness: float      # blur of the outline, as a share of the side
    count: int           # instances an image, at most
    texture: int         # seed of the image that a foreign texture comes from
    relative: bool       # the colour shifts that of the surface, as shade and soot do, instead of covering it

    KINDS = ("scratch", "crack", "blob", "stain", "dent", "missing", "texture", "speckle", "smear", "pit", "scuff")

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "SyntheticDefect":
        kind = str(rng.choice(cls.KINDS))
        grey = rng.random()
        tint = tuple(np.clip(grey + rng.normal(0, 0.25 if rng.random() < 0.4 else 0.02, 3), 0, 1))
        small = {"scratch": (.15, .9), "crack": (.2, 1.2), "blob": (.02, .2), "stain": (.1, .5), "dent": (.05, .3),
                 "missing": (.06, .35), "texture": (.08, .45), "speckle": (.1, .4), "smear": (.1, .5),
                 "pit": (.01, .05), "scuff": (.15, .8)}[kind]
        return cls(kind, float(np.exp(rng.uniform(*np.log(small)))), float(np.exp(rng.uniform(np.log(.003), np.log(.025)))), tint,
                   rng.uniform(0.35, 1), rng.uniform(0, 0.006), int(rng.integers(1, 6)), int(rng.integers(1 << 30)),
                   bool(rng.random() < 0.4))

    def paint(self, image: Tensor, foreign: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Damage image (3, S, S) in [0, 1]; `foreign` is another one. returns the image and its bool mask (S, S)."""
        side = image.shape[-1]
        mask = np.zeros((side, side), bool)
        for _ in range(int(rng.integers(1, self.count + 1))):
            mask |= self._shape(side, rng)
        alpha = ndimage.gaussian_filter(mask.astype(np.float32), self.softness * side + 0.4)
        alpha = torch.from_numpy(alpha).clamp(0, 1) * self.opacity
        if self.kind == "texture":
            paint = foreign
        elif self.kind == "smear":
            paint = torch.from_numpy(ndimage.gaussian_filter(image.numpy(), (0, side * .03, side * .03)))
            paint = 0.8 * paint + 0.2 * torch.tensor(self.colour)[:, None, None].float()
        elif self.kind == "dent":  # light on one side, shade on the other
            height = ndimage.gaussian_filter(mask.astype(np.float32), self.size * side / 5)
            slope = np.gradient(height, axis=0) + np.gradient(height, axis=1)
            paint, alpha = image + torch.from_numpy(0.5 * slope / (np.abs(slope).max() + 1e-6)).float(), alpha.sign() * self.opacity
        else:
            paint = torch.tensor(self.colour)[:, None, None].float() + torch.from_numpy(rng.normal(0, 0.06, (3, 1, 1))).float()
            paint = paint + torch.from_numpy(rng.normal(0, 0.03, (3, side, side))).float()
            if self.relative:
                paint = image + 0.8 * (paint - 0.5)
        return (image * (1 - alpha) + paint * alpha).clamp(0, 1), torch.from_numpy(mask)

    def _shape(self, side: int, rng: np.random.Generator) -> np.ndarray:
        length, thick = self.size * side * rng.uniform(0.6, 1.6), max(0.6, self.width * side * rng.uniform(0.7, 1.4))
        seeds = np.ones((side, side), bool)
        yx, angle = rng.uniform(0.1, 0.9, 2) * side, rng.uniform(0, 2 * np.pi)
        if self.kind in ("scratch", "crack"):
            bend = rng.normal(0, 0.004) if self.kind == "scratch" else 0
            for _ in range(int(length)):
                angle += bend + (rng.normal(0, 0.25) if self.kind == "crack" else 0)
                yx = yx + (np.sin(angle), np.cos(angle))
                y, x = yx.astype(int)
                if 0 <= y < side and 0 <= x < side:
                    seeds[y, x] = False
            return ndimage.distance_transform_edt(seeds) <= thick / 2 if not seeds.all() else ~seeds
        if self.kind == "scuff":  # many short parallel strokes
            for _ in range(int(rng.integers(4, 15))):
                start, steps = yx + rng.normal(0, length / 5, 2), np.arange(int(length * rng.uniform(0.3, 1)))
                line = (start[:, None] + np.array([[np.sin(angle)], [np.cos(angle)]]) * steps).astype(int)
                line = line[:, ((line >= 0) & (line < side)).all(axis=0)]
                seeds[line[0], line[1]] = False
            return ndimage.distance_transform_edt(seeds) <= thick / 2 if not seeds.all() else ~seeds
        if self.kind == "speckle":
            spots = (yx[:, None] + rng.normal(0, length / 3, (2, 25))).astype(int)
            spots = spots[:, ((spots >= 0) & (spots < side)).all(axis=0)]
            seeds[spots[0], spots[1]] = False
            return ndimage.distance_transform_edt(seeds) <= thick if not seeds.all() else ~seeds
        y, x = np.mgrid[:side, :side] - yx[:, None, None]
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        radius = np.hypot(u, v * rng.uniform(1, 2.2)) / (length / 2 + 1)
        ragged = ndimage.gaussian_filter(rng.normal(size=(side, side)), max(1.5, length / 8))
        ragged *= {"blob": .1, "dent": .05, "missing": .15, "pit": .1}.get(self.kind, .45) / (ragged.std() + 1e-9)
        return radius + ragged < 1


# ---- Cached views ----------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """One augmented image: its features, or the pixels they are still to be made from."""
    features: np.ndarray | None   # (B, D, H0, W0) float16
    pixels: Tensor | None         # (3, S, S) in [0, 1]
    small: Tensor                 # (3, 8 H0, 8 W0) in [0, 1]
    labels: Tensor                # (S, S) uint8
    names: dict[str, int]         # label -> value that is present


class FreshViews:
    """Images of a manifest, augmented anew at every draw and encoded with the batch: no cache. One entry an image."""

    def __init__(self, name: str, records: list[dict], size: int, patch: int, turns: bool):
        self.name, self.records, self.size, self.grid, self.turns = name, records, size, size // patch, turns
        self.index = [{"names": named(r), "group": r["group"], "image": r["image"]} for r in records]

    def shown(self) -> list[dict[str, int]]:
        """Entry -> {label: value} that its mask shows. Reads the masks, so that a bad one is reported before training; of more than
        5,000 it believes the manifest."""
        if len(self.records) > 5000:
            return [{n: int(v) for v, n in named(r).items()} for r in self.records]
        shown = []
        for record in tqdm(self.records, desc=f"masks of {self.name}", leave=False, disable=not sys.stderr.isatty()):
            present = set(np.unique(read_record(record)[1].numpy()).tolist()) if "mask" in record else set()
            shown.append({n: int(v) for v, n in named(record).items() if int(v) in present})
        return shown

    def view(self, i: int, rng: np.random.Generator, label: str | None = None) -> View:
        image, labels = read_record(self.records[i])
        value = {n: int(v) for v, n in named(self.records[i]).items()}.get(label, 0)
        for _ in range(5):  # until the label is in the picture
            pixels, marks = augment(image, labels, self.size, rng, self.turns)
            if label is None or (marks == value).any():
                break
        return finish(pixels, marks, self.index[i]["names"], self.grid)


class FreshSynthetic:
    """Synthetic defects painted anew at every draw: the kinds of `build_synthetic`, without an end. Two entries a kind make its pairs."""

    def __init__(self, manifests: Sequence[str | Path], kinds: int, seed: int, size: int, patch: int):
        self.name, self.kinds, self.seed, self.size, self.grid = "synthetic", kinds, seed, size, size // patch
        self.pools = [read_manifest(m, limit=100_000) for m in manifests]
        self.index = [{"names": {"1": f"kind {i // 2}"}, "group": str(i), "image": "synthetic"} for i in range(2 * kinds)]

    def shown(self) -> list[dict[str, int]]:
        return [{f"kind {i // 2}": 1} for i in range(2 * self.kinds)]

    def view(self, i: int, rng: np.random.Generator, label: str | None = None) -> View:
        pixels, mask, _ = synthetic_view(self.pools, i // 2, rng, self.seed, self.size)
        return finish(pixels, mask.byte(), {"1": f"kind {i // 2}"}, self.grid)


def finish(pixels: Tensor, labels: Tensor, names: dict[str, str], grid: int) -> View:
    small = F.interpolate(pixels[None], size=(8 * grid, 8 * grid), mode="bilinear", antialias=True)[0]
    present = set(np.unique(labels.numpy()).tolist())
    return View(None, pixels, small, labels, {n: int(v) for v, n in names.items() if int(v) in present})


class ViewCache:
    """Augmented views of one source with the frozen encoder's features, kept on disk as three arrays and an index.

    features  (V, B, D, H0, W0) float16, the tapped blocks; images (V, 3, 8 H0, 8 W0) uint8; labels (V, S, S) uint8.
    index     one record a view: {"names": {value: label}, "group", "image"}.
    """

    def __init__(self, folder: Path):
        self.name = folder.name
        self.index = json.loads((folder / "index.json").read_text())
        self.features, self.images, self.labels = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("features", "images", "labels"))

    def shown(self) -> list[dict[str, int]]:
        """View -> {label: value} that it shows."""
        present = [set(np.unique(labels).tolist()) for labels in self.labels]
        return [{n: int(v) for v, n in record["names"].items() if int(v) in here} for record, here in zip(self.index, present)]

    def view(self, i: int, rng: np.random.Generator | None = None, label: str | None = None) -> View:
        labels = torch.from_numpy(self.labels[i].copy())
        present = set(np.unique(self.labels[i]).tolist())
        names = {n: int(v) for v, n in self.index[i]["names"].items() if int(v) in present}
        return View(self.features[i], None, torch.from_numpy(self.images[i].copy()) / 255, labels, names)

    @staticmethod
    def build(folder: Path, views: int, make, encoder: icas.Encoder, blocks: tuple[int, ...], size: int) -> None:
        """`make(i)` gives (image (3, S, S), labels (S, S), index record) of view i. Written whole or not at all."""
        part = folder.with_suffix(".part")
        part.mkdir(parents=True, exist_ok=True)
        grid, dim = size // encoder.patch_size, encoder.cls_token.shape[-1]
        arrays = {name: np.lib.format.open_memmap(part / f"{name}.npy", "w+", dtype, (views, *shape)) for name, dtype, shape in (
            ("features", np.float16, (len(blocks), dim, grid, grid)), ("images", np.uint8, (3, 8 * grid, 8 * grid)),
            ("labels", np.uint8, (size, size)))}
        index = []
        for i in tqdm(range(views), desc=folder.name, disable=not sys.stderr.isatty()):
            image, labels, record = make(i)
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=icas.fast_bf16("cpu")):
                maps = encoder(image[None], blocks)
            arrays["features"][i] = torch.cat(maps).half().numpy()
            small = F.interpolate(image[None], size=(8 * grid, 8 * grid), mode="bilinear", antialias=True)[0]
            arrays["images"][i] = (small * 255).round().byte().numpy()
            arrays["labels"][i] = labels.numpy()
            index.append(record)
        for array in arrays.values():
            array.flush()
        (part / "index.json").write_text(json.dumps(index))
        part.replace(folder)


def choose(manifest: Path, count: int, good: int, seed: int) -> list[dict]:
    """Up to `count` marked images of a manifest, and `good` unmarked ones (0: all), sorted; of very long manifests a sample."""
    records = read_manifest(manifest, limit=100_000)
    rng, chosen = np.random.default_rng([seed, sum(map(ord, records[0]["set"]))]), []
    marked, plain = [r for r in records if "mask" in r], [r for r in records if "mask" not in r and not r.get("anomalous")]
    for part, number in ((marked, count), (plain, good)):
        chosen += [part[i] for i in sorted(rng.permutation(len(part))[:number or len(part)])]
    return chosen


def build_set(folder: Path, records: list[dict], views: int, turns: bool, seed: int, encoder, blocks, size) -> None:
    """Cache `views` views of each record; view j of record i is a function of (seed, i, j)."""
    jobs = [r for r in records for _ in range(views)]

    def make(i: int):
        image, labels = augment(*read_record(jobs[i]), size, np.random.default_rng([seed, i]), turns)
        return image, labels, {"names": named(jobs[i]), "group": jobs[i]["group"], "image": jobs[i]["image"]}
    ViewCache.build(folder, len(jobs), make, encoder, blocks, size)


def synthetic_view(pools: list[list[dict]], kind: int, rng: np.random.Generator, seed: int, size: int) -> tuple[Tensor, Tensor, str]:
    """(3, S, S) image with a new defect of a kind, its bool mask, the kind's name. Even kinds stay on one data set, as real ones do."""
    defect = SyntheticDefect.draw(np.random.default_rng([seed, kind]))

    def surface(rng: np.random.Generator, pool: list[dict]) -> Tensor:
        return augment(*read_record(pool[rng.integers(len(pool))]), size, rng, True)[0]
    home = np.random.default_rng([seed, kind, 99]) if kind % 2 == 0 else rng
    base = surface(rng, pools[home.integers(len(pools))])
    foreign = np.random.default_rng(defect.texture)
    image, mask = defect.paint(base, surface(foreign, pools[foreign.integers(len(pools))]), rng)
    return image, mask, defect.kind


def build_synthetic(folder: Path, manifests: list[Path], kinds: int, views: int, seed: int, encoder, blocks, size) -> None:
    """Cache `views` images of each of `kinds` synthetic defects, on surfaces drawn from all manifests alike."""
    pools = [read_manifest(m, limit=100_000) for m in manifests]

    def make(i: int):
        kind, view = divmod(i, views)
        image, mask, name = synthetic_view(pools, kind, np.random.default_rng([seed, kind, view]), seed, size)
        return image, mask.byte(), {"names": {"1": f"{name}_{kind}"}, "group": f"{kind}_{view}", "image": "synthetic"}
    ViewCache.build(folder, kinds * views, make, encoder, blocks, size)


# ---- Pairs (R14) -----------------------------------------------------------------------------------------------------


class Pairs:
    """Batches of (reference, target); pair j of step i is a function of (seed, i, j) alone, whichever rank or micro-batch draws it."""

    def __init__(self, sources: list, weights: list[float], anomaly: set[str], batch_size: int, seed: int, hide: float = 0.0,
                 accumulate: int = 1, model: icas.ICAS | None = None, workers: int = 0):
        self.sources, self.batch_size, self.seed, self.anomaly, self.hide = sources, batch_size, seed, anomaly, hide
        self.weights, self.accumulate, self.model = np.array(weights) / sum(weights), accumulate, model
        self.by_label: list[dict[str, list[int]]] = []   # a source: label -> entries that show it
        self.values = [source.shown() for source in sources]
        for values in self.values:
            table: dict[str, list[int]] = {}
            for i, here in enumerate(values):
                for name in here:
                    table.setdefault(name, []).append(i)
            self.by_label.append({k: v for k, v in sorted(table.items()) if len(v) > 1})
        self.pool, self.ahead, self.waited = ThreadPoolExecutor(max(1, workers)), {}, 0.0

    def __call__(self, step: int) -> list[icas.Batch]:
        """This rank's share of a step, in `accumulate` micro-batches; the next step is drawn meanwhile."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for coming in (step, step + 1):
            if coming not in self.ahead:
                self.ahead[coming] = [self.pool.submit(self.draw, np.random.default_rng([self.seed, coming, j]))
                                      for j in range(rank, self.batch_size, world)]
        began = time.perf_counter()
        pairs = [future.result() for future in self.ahead.pop(step)]
        size = -(-len(pairs) // self.accumulate)
        batches = [collate(pairs[i:i + size], self.model) for i in range(0, len(pairs), size)]
        self.waited += time.perf_counter() - began
        return batches

    def draw(self, rng: np.random.Generator) -> dict:
        s = int(rng.choice(len(self.sources), p=self.weights))
        source, table = self.sources[s], self.by_label[s]
        counts = np.sqrt([len(v) for v in table.values()])
        label = list(table)[rng.choice(len(table), p=counts / counts.sum())]
        target = int(rng.choice(table[label]))
        group, image = source.index[target]["group"], source.index[target]["image"]
        alike = [i for i in table[label] if source.index[i]["image"] == image and image != "synthetic"]
        alike = [i for i in alike if i != target or not cached(source)]  # a fresh view of the same image is another view
        other = [i for i in table[label] if source.index[i]["group"] != group]
        pool = alike if alike and (not other or rng.random() < 0.35) else other
        reference = int(rng.choice(pool)) if pool else target
        mode, seen = rng.random(), source.view(target, rng, label)
        wanted = {seen.names[label]} if label in seen.names else set()
        shown = seen if not pool else source.view(reference, rng, label)
        value = shown.names.get(label, -1)
        if source.name in self.anomaly and mode < 0.15:   # normal references: everything unmarked, all defects are the answer
            foreground, background = torch.zeros(shown.labels.shape), (shown.labels == 0).float()
            wanted = set(seen.names.values())
        elif wanted and (mode < 0.3 or not pool):         # clicks on the target itself
            shown, inside = seen, (seen.labels == seen.names[label]).numpy()
            foreground, background = clicks(inside, int(rng.integers(1, 6)), rng), clicks(~inside, int(rng.integers(1, 6)), rng)
        else:
            foreground = (shown.labels == value).float()
            background = 1 - foreground
        return sides(shown, foreground, background) | {"target": seen, "wanted": wanted, "hidden": float(rng.random() < self.hide)}


def cached(source) -> bool:
    return isinstance(source, ViewCache)


def sides(shown: View, foreground: Tensor, background: Tensor) -> dict:
    """What a pair says of its reference: the view, token shares of its two sides, (S, S) each, and moments of their pixels."""
    grid, both = shown.small.shape[-1] // 8, torch.stack([foreground, background])
    fine = icas.token_share(both, 4 * grid, 4 * grid)
    coarse = icas.token_share(both, grid, grid)
    if not foreground.any():
        coarse[1] = (coarse[1] > 0.999).float()
    return {"reference": shown, "foreground": coarse[0], "background": coarse[1],
            "moments": icas.pixel_moments(shown.small[None], fine[:1], fine[1:])[0]}


def clicks(inside: np.ndarray, count: int, rng: np.random.Generator) -> Tensor:
    """(S, S) disks at `count` random marked pixels (R21); a region too small for one gives a single pixel."""
    side = len(inside)
    y, x = np.nonzero(inside)
    if not len(y):
        return torch.zeros(side, side)
    chosen = rng.integers(len(y), size=count)
    return icas.disks([(float(x[i]), float(y[i])) for i in chosen], side, side)


def segments(labels: Tensor, wanted: set[int], size: int) -> icas.Truths:
    """Truths of one target (R11): the prompted label, each other labelled segment, the unlabelled rest."""
    values = [v for v in torch.unique(labels).tolist() if v not in wanted]
    prompted = torch.isin(labels, torch.tensor(sorted(wanted), dtype=labels.dtype))
    masks = [prompted] * bool(prompted.any()) + [labels == v for v in values[:12]]
    masks = F.adaptive_avg_pool2d(torch.stack(masks).float(), size)
    return icas.Truths(masks, torch.tensor([0] * bool(prompted.any()) + [1] * len(values[:12])))


def collate(pairs: list[dict], model: icas.ICAS | None = None) -> icas.Batch:
    """Pairs as one batch, on the model's device; views without features are encoded here, all at once."""
    views, device = [p["target"] for p in pairs] + [p["reference"] for p in pairs], model.device if model else "cpu"
    if any(v.features is None for v in views):
        maps = model.describe(torch.stack([v.pixels for v in views]).to(device)).maps.float()
    else:
        maps = torch.from_numpy(np.stack([v.features for v in views])).to(device).float().flatten(1, 2)
    stack = lambda key: torch.stack([p[key] for p in pairs]).to(device)  # noqa: E731
    size = 4 * maps.shape[-1]
    truths = [segments(p["target"].labels, p["wanted"], size) for p in pairs]
    return icas.Batch(icas.Features(maps[:len(pairs)], torch.stack([v.small for v in views[:len(pairs)]]).to(device)), maps[len(pairs):],
                      stack("foreground"), stack("background"), stack("moments"),
                      torch.tensor([p.get("hidden", 0.0) for p in pairs], device=device), [icas.Truths(*(x.to(device) for x in t)) for t in truths])


# ---- Fusion (R18) ----------------------------------------------------------------------------------------------------


def held_pair(model: icas.ICAS, cache: ViewCache, label: str, a: int, b: int) -> tuple[icas.Batch, icas.Prompt]:
    """View a as the marked prompt of one label, view b as the target."""
    shown, target = cache.view(a), cache.view(b)
    foreground = (shown.labels == shown.names[label]).float()
    batch = collate([sides(shown, foreground, 1 - foreground) | {"target": target, "wanted": {target.names[label]}}], model)
    neck = model.neck(batch.reference).flatten(2).transpose(1, 2)
    return batch, icas.Prompt(model.tokens(batch.reference), neck, batch.foreground.flatten(1), batch.background.flatten(1), batch.moments)


def learn_fusion(model: icas.ICAS, caches: list[ViewCache], pairs: int, seed: int = 0) -> Tensor:
    """Weights of the fused log-odds (R18) for prompts that mark an anomaly, on sets that the decoder was not trained on.

    Maximises the soft IoU of each label, pooled over its pairs as the protocol does, and stays near equal weights (`icas.EQUAL`): with
    the penalty 1e-3 in place of 0.3 a left-out set loses 2 points. Prints each part alone, and the fusion with each set left out.
    """
    source, rng = Pairs(caches, [1.0] * len(caches), set(), 1, seed), np.random.default_rng(seed)
    terms, truths, owner, names = [], [], [], []
    for s, cache in enumerate(caches):
        for label, views in source.by_label[s].items():
            names.append((cache.name, label))
            for _ in range(pairs):
                a, b = rng.choice(views, 2, replace=False)
                if cache.index[a]["group"] == cache.index[b]["group"]:
                    continue
                with torch.no_grad():
                    batch, prompt = held_pair(model, cache, label, a, b)
                    terms.append(icas.evidence(icas._log_odds(model, batch.target, prompt, None)[1], True)[0, :, ::2, ::2].flatten(1))
                truths.append(batch.truths[0].masks[0][::2, ::2].flatten())
                owner.append(len(names) - 1)
    x, y, own = torch.stack(terms), torch.stack(truths), torch.tensor(owner)

    def pooled_iou(weight: Tensor, labels: list[int], hard: bool = True) -> Tensor:
        odds = torch.einsum("nkp,k->np", x, weight[:-1]) + weight[-1]
        p, t = ((odds > 0).float(), (y > 0.5).float()) if hard else (odds.sigmoid(), y)
        both, either = (p * t).sum(dim=1), (p + t - p * t).sum(dim=1)
        return torch.stack([both[own == i].sum() / either[own == i].sum() for i in labels])

    def learn(labels: list[int]) -> Tensor:
        equal = torch.tensor(icas.EQUAL)
        weight = equal.clone().requires_grad_()
        optimizer = torch.optim.Adam([weight], lr=0.02)
        for _ in range(250):
            optimizer.zero_grad()
            (-pooled_iou(weight, labels, hard=False).mean() + 0.3 * (weight - equal).square().sum()).backward()
            optimizer.step()
            weight.data[:-1].clamp_(min=0)
        return weight.detach()

    kept = sorted(set(owner))
    for k, part in enumerate(("S", "S mfm", "relation", "margin", "prototype", "fisher", "pixel")):
        print(f"fusion: {part} alone {100 * pooled_iou(torch.eye(8)[k], kept).mean():.1f}", file=sys.stderr)
    for left in dict.fromkeys(names[i][0] for i in kept):
        rest, mine = [i for i in kept if names[i][0] != left], [i for i in kept if names[i][0] == left]
        if rest:
            print(f"fusion: {left} left out {100 * pooled_iou(learn(rest), mine).mean():.1f}", file=sys.stderr)
    final = learn(kept)
    print(f"fusion: {100 * pooled_iou(final, kept).mean():.1f}, weights {[round(v, 3) for v in final.tolist()]}", file=sys.stderr)
    return final


# ---- Command line ----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["generic", "anomaly"], required=True, help="generic photographs first, then defects")
    parser.add_argument("--out", required=True, help="folder for last.safetensors, log.jsonl and (by default) the views")
    group = parser.add_argument_group("data")
    group.add_argument("--data", nargs="+", required=True, help="manifests, or folders that hold one")
    group.add_argument("--weights", nargs="+", type=float, help="how often each manifest is drawn from, then the synthetic (default 1)")
    group.add_argument("--images", type=int, default=0, help="marked images of each manifest at most (default 0: all)")
    group.add_argument("--good", type=int, default=0, help="unmarked images of each manifest at most (default 0: all)")
    group.add_argument("--synthetic", type=int, default=0, metavar="KINDS", help="kinds of synthetic defect (default 0: none)")
    group.add_argument("--cache", help="folder that keeps encoded views, so that a CPU can train; without it each draw is a new view")
    group.add_argument("--views", type=int, default=1, help="with --cache: views an image, three times as many a kind (default 1)")
    group.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="threads that read and augment")
    group.add_argument("--held-out", nargs="*", default=[], help="manifests not trained on: the fusion is learned there (--cache)")
    group.add_argument("--validate", nargs="*", default=[], help="manifests not trained on: mean IoU is measured there (--cache)")
    group.add_argument("--validate-every", type=int, default=500, help="steps between validations; the best is kept (default 500)")
    group = parser.add_argument_group("model (ignored with --init)")
    group.add_argument("--init", help="checkpoint to start from")
    group.add_argument("--encoder", default="checkpoints/dinov2-vits14.safetensors", help="weights, any layout of icas.convert")
    paper = icas.Config()
    group.add_argument("--encoder-name", default=paper.encoder, help="vits14, vitb14, vitl14, vitg14, each also with -reg (default vits14)")
    group.add_argument("--image-size", type=int, default=paper.image_size, help="pixels, a multiple of 14 (default 518)")
    group.add_argument("--blocks", type=int, nargs="*", default=[], help="tapped blocks, from 1 (default: two thirds of the depth, last)")
    for name in ("queries", "dim", "layers", "ffn_dim", "pixel_dim"):
        default = getattr(paper, name)
        group.add_argument("--" + name.replace("_", "-"), type=int, default=default, help=f"see icas.Config (default {default})")
    group = parser.add_argument_group("recipe (defaults: METHOD R16)")
    group.add_argument("--steps", type=int, help="optimizer steps (default 50000 generic, 5000 anomaly)")
    group.add_argument("--batch-size", type=int, default=32, help="pairs a step (default 32)")
    group.add_argument("--lr", type=float, default=1e-4, help="peak learning rate of AdamW (default 1e-4)")
    group.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step and rank (default 1)")
    group.add_argument("--hide-features", type=float, default=0.3, help="share of pairs whose raw features are hidden (default 0.3)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--log-every", type=int, default=20, help="steps between lines (default 20)")
    group.add_argument("--save-minutes", type=float, default=10, help="minutes between states to resume from (default 10)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default auto)")
    group.add_argument("--dry-run", action="store_true", help="print the recipe, the data and the memory, and end")
    return parser


def start_model(args: argparse.Namespace) -> icas.ICAS:
    device = icas._device(args.device)
    if device.type == "cuda" and dist.is_initialized():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if args.init:
        model = icas.load(args.init, encoder=args.encoder, device=device).requires_grad_(False)
    else:
        torch.manual_seed(args.seed)
        model = icas.ICAS(icas.Config(args.encoder_name, args.image_size, blocks=tuple(args.blocks), queries=args.queries, dim=args.dim,
                                      layers=args.layers, ffn_dim=args.ffn_dim, pixel_dim=args.pixel_dim))
        model.encoder.load_state_dict(icas.load_encoder(args.encoder))
        model.encoder_sha256 = icas._sha256(args.encoder)
        model = model.to(device).requires_grad_(False)
    if device.type == "cuda":
        model.encoder.compile()
        model.decoder.compile()
    return model


def open_sources(args: argparse.Namespace, model: icas.ICAS, manifests: Sequence[str], turns: bool, cache: bool) -> list:
    """One source of views a manifest, named after its folder; caches are built if they are not there yet (by rank 0)."""
    config, sources = model.config, []
    for manifest in manifests:
        name = (Path(manifest).parent if Path(manifest).suffix else Path(manifest)).resolve().name
        records = choose(Path(manifest), args.images, args.good, args.seed)
        if not cache:
            sources.append(FreshViews(name, records, config.image_size, config.patch_size, turns))
            continue
        folder = Path(args.cache) / name
        if rank() == 0 and not folder.is_dir():
            build_set(folder, records, args.views, turns, args.seed, model.encoder, config.blocks, config.image_size)
        wait()
        sources.append(ViewCache(folder))
    return sources


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def write_state(path: Path, state: dict) -> None:
    """Write beside, then rename; the one before is kept. A full disk costs this state, not the last one."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.is_file():
            path.replace(path.with_suffix(".old"))
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        print(f"train: the state could not be written ({error}); training goes on", file=sys.stderr)


def read_state(path: Path) -> dict | None:
    """The last whole state, or the one before it."""
    for candidate in (path, path.with_suffix(".old")):
        if candidate.is_file():
            try:
                return torch.load(candidate, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError) as error:
                print(f"train: {candidate} is damaged ({str(error).splitlines()[0]}); trying the one before", file=sys.stderr)
    return None


@torch.inference_mode()
def validate(model: icas.ICAS, caches: Sequence[ViewCache], pairs: int = 10, seed: int = 1) -> dict[str, float]:
    """Mean IoU of the fused score and of the training-free baselines, pooled over `pairs` pairs of each label, in percent."""
    counts: dict[tuple, np.ndarray] = {}
    for cache in caches:
        source = Pairs([cache], [1.0], set(), 1, seed)
        for label, views in source.by_label[0].items():
            rng = np.random.default_rng([seed, zlib.crc32(label.encode())])
            for _ in range(pairs):
                a, b = rng.choice(views, 2, replace=False)
                if cache.index[a]["group"] == cache.index[b]["group"]:
                    continue
                batch, prompt = held_pair(model, cache, label, a, b)
                odds, scores, _ = icas._log_odds(model, batch.target, prompt, None)
                truth = batch.truths[0].masks[0] > 0.5
                for name, found in (("icas", odds), ("nearest patch", scores.margin), ("prototype", scores.prototype)):
                    both = np.array([int(((found[0] > 0) & truth).sum()), int(((found[0] > 0) | truth).sum())])
                    counts[cache.name, label, name] = counts.get((cache.name, label, name), 0) + both
    return {name: float(np.mean([100 * v[0] / max(1, v[1]) for k, v in counts.items() if k[2] == name]))
            for name in ("icas", "nearest patch", "prototype")}


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    started = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if icas._device(args.device).type == "cuda" else "gloo")
    try:
        return run(args)
    except (ValueError, TypeError, FileNotFoundError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    finally:
        if started:
            dist.destroy_process_group()


def run(args: argparse.Namespace) -> int:
    out, model = Path(args.out), start_model(args)
    if (args.held_out or args.validate) and not args.cache:
        raise ValueError("--held-out, --validate: they are measured on cached views; pass --cache DIR")
    both = {Path(m).resolve() for m in args.data} & {Path(m).resolve() for m in (*args.held_out, *args.validate)}
    if both:
        raise ValueError(f"--held-out, --validate: {sorted(map(str, both))[0]} is trained on too")
    turns, config = args.stage == "anomaly", model.config
    sources = open_sources(args, model, args.data, turns, bool(args.cache))
    if args.synthetic and args.cache:
        folder = Path(args.cache) / "synthetic"
        if rank() == 0 and not folder.is_dir():
            build_synthetic(folder, [Path(m) for m in args.data], args.synthetic, 3 * args.views, args.seed, model.encoder, config.blocks,
                            config.image_size)
        wait()
        sources.append(ViewCache(folder))
    elif args.synthetic:
        sources.append(FreshSynthetic(args.data, args.synthetic, args.seed, config.image_size, config.patch_size))
    weights = args.weights or [1.0] * len(sources)
    if len(weights) != len(sources):
        raise ValueError(f"--weights: expected {len(sources)} numbers, one for each of {[c.name for c in sources]}, got {len(weights)}")
    pairs = Pairs(sources, weights, {c.name for c in sources} if turns else set(), args.batch_size, args.seed, args.hide_features,
                  args.accumulate, model, args.workers)
    empty = [c.name for c, table in zip(sources, pairs.by_label) if not table]
    if empty:
        raise ValueError(f"--data: no label is in two images of {empty}; raise --views or leave them out")
    steps = args.steps or {"generic": 50_000, "anomaly": 5_000}[args.stage]
    if rank() == 0:
        describe(args, model, pairs, steps)
    if args.dry_run:
        return 0
    out.mkdir(parents=True, exist_ok=True)
    held = [open_sources(args, model, m, False, True) for m in (args.held_out, args.validate)]
    model.decoder.requires_grad_(True)
    optimizer, begin, best = icas.make_optimizer(model.decoder, args.lr, 0.05), 0, -1.0
    free = ("out", "workers", "log_every", "save_minutes", "dry_run", "device")   # these change no weight
    fixed = json.dumps({k: v for k, v in vars(args).items() if k not in free})
    state = read_state(out / "state.pt")
    if state:
        if state["arguments"] != fixed:
            raise ValueError(f"{out / 'state.pt'}: belongs to a run with other arguments; give another --out, or the same arguments")
        model.decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
        begin, best = state["step"], state["best"]
        print(f"resumed at step {begin}", file=sys.stderr)
    clock, recent, saved = time.time(), [], time.time()

    def report(step: int, parts: dict, optimizer: torch.optim.Optimizer) -> None:
        nonlocal clock, saved, best
        done = step + 1
        recent.append(parts)
        if args.validate and (done % args.validate_every == 0 or done == steps):
            model.decoder.eval()
            found = validate(model, held[1])
            model.decoder.train()
            if rank() == 0:
                print(f"step {done:>6}/{steps} | mean IoU " + ", ".join(f"{k} {v:.1f}" for k, v in found.items()), file=sys.stderr)
                write_log(out, {"step": done, "validation": found})
                if found["icas"] > best:
                    icas.save(model, out / "best.safetensors", {"arguments": vars(args), "step": done, "validation": found})
            best = max(best, found["icas"])
        if rank() == 0 and (done % args.log_every == 0 or done == steps):
            mean = {k: float(np.mean([p[k] for p in recent])) for k in parts}
            seconds = (time.time() - clock) / len(recent)
            share, left = pairs.waited / (seconds * len(recent)), seconds * (steps - done)
            print(f"step {done:>6}/{steps} | loss {mean['loss']:.3f} (" + " ".join(f"{k} {v:.2f}" for k, v in mean.items() if k != "loss")
                  + f") | lr {optimizer.param_groups[0]['lr']:.1e} | {1000 * seconds:.0f} ms, loader {100 * share:.0f} % | "
                  f"{2 * args.batch_size / seconds:.1f} images/s | {left / 60:.0f} min left", file=sys.stderr)
            write_log(out, {"step": done, "seconds_a_step": seconds, "loader_share": share, "lr": optimizer.param_groups[0]["lr"]} | mean)
            recent.clear()
            clock, pairs.waited = time.time(), 0.0
        if rank() == 0 and time.time() - saved > 60 * args.save_minutes and done < steps:
            write_state(out / "state.pt", {"decoder": model.decoder.state_dict(), "optimizer": optimizer.state_dict(), "step": done,
                                           "best": best, "arguments": fixed})
            saved = time.time()
    icas.fit(model, pairs, steps=steps, lr=args.lr, seed=args.seed, start=begin, optimizer=optimizer, callback=report)
    if rank():
        return 0
    if args.held_out:
        model.fusion_marked = learn_fusion(model, held[0], 25, args.seed).to(model.device)
    icas.save(model, out / "last.safetensors", {"arguments": vars(args)})
    for name in ("state.pt", "state.old"):
        (out / name).unlink(missing_ok=True)
    print(out / "last.safetensors")
    return 0


def write_log(out: Path, line: dict) -> None:
    with open(out / "log.jsonl", "a") as log:
        log.write(json.dumps(line) + "\n")


def describe(args: argparse.Namespace, model: icas.ICAS, pairs: Pairs, steps: int) -> None:
    """The resolved recipe, the data, and how much memory a step takes about."""
    count = sum(p.numel() for p in model.decoder.parameters())
    tokens = (model.config.image_size // model.config.patch_size) ** 2
    # weights, gradients and two moments; per pair: features, relation maps, pixel maps of every layer's masks, in float32
    config = model.config
    numbers = 768 * len(config.blocks) + 16 * (config.pixel_dim + 4 * config.relation_dim) + 4 * config.queries * config.layers
    memory = 16 * count + 4 * args.batch_size // args.accumulate * tokens * numbers
    print(f"{args.stage}: {steps} steps of {args.batch_size} pairs, AdamW {args.lr:g} with 100 steps of warm-up and linear decay, "
          f"{count / 1e6:.1f} M parameters on {model.device}, {'bf16' if icas.fast_bf16(model.device) else 'float32'}, "
          f"about {memory / 2 ** 30:.1f} GiB a rank beside the encoder", file=sys.stderr)
    for source, table, weight in zip(pairs.sources, pairs.by_label, pairs.weights):
        many = sorted(table.items(), key=lambda item: -len(item[1]))
        unit = "views" if cached(source) else "images"
        print(f"  {source.name}: {100 * weight:.0f} % of pairs, {len(source.index)} {unit}, {len(table)} labels ("
              + ", ".join(f"{len(v)} {k}" for k, v in many[:6]) + (", ..." if len(many) > 6 else "") + ")", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
