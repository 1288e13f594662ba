"""Views of a manifest's images: drawn when they are asked for, or encoded once and kept."""
from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import icas

from .augment import SyntheticDefect, augment, clean_crop, cut_out, poisson_blend
from .manifest import (by_category, group, in_box, named, read_labels, read_manifest,
                       read_record)

Rng = np.random.Generator


class View(NamedTuple):
    """One augmented image: its features, or the pixels they are still to be made from."""
    pixels: Tensor | None     # (3, S, S) in [0, 1]
    labels: Tensor            # (S, S) uint8
    names: dict[str, int]     # label -> value that is present
    maps: Tensor | None = None     # (blocks * D, H0, W0) float16
    detail: Tensor | None = None   # (280, H1, W1) float16; without detail None


def shown_names(names: dict[str, str], labels: np.ndarray | Tensor) -> dict[str, int]:
    """label -> value, of those that a label map shows."""
    present = np.bincount(np.asarray(labels).ravel(), minlength=256)
    return {name: int(value) for value, name in names.items() if present[int(value)]}


def record_names(record: dict) -> dict[str, int]:
    """label -> value, of those that the mask of a record shows."""
    labels = read_labels(record)
    return {} if labels is None else shown_names(by_category(record), in_box(record, labels))


def group_by(items: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    table: dict[str, list[int]] = {}
    for key, i in items:
        table.setdefault(key, []).append(i)
    return dict(sorted(table.items()))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def ranks(device: str) -> Iterator[None]:
    """The process group of torchrun, if it started this; on CUDA each rank has its own GPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    cuda = icas.check_device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # a day: one rank may read masks, or score its images, for long while the others wait
    dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(days=1))
    try:
        yield
    finally:
        dist.destroy_process_group()


def content(record: dict) -> list:
    """What a record's views depend on, but for the place of its files."""
    image, mask = (zlib.crc32(Path(x).read_bytes()) if isinstance(x, str) else x
                   for x in (record["image"], record.get("mask")))
    return [Path(record["image"]).name, image, mask, named(record), record.get("box")]


def encode(model: icas.ICAS, views: Sequence[View]) -> icas.Features:
    return model.describe(torch.stack([v.pixels for v in views]).to(model.device))


class FreshViews:
    """Views of a manifest's images: each draw a new one, or with `views` so many an image, each a
    function of the seed and its number, which `keep` can keep. With `anomaly` pictures may be
    turned, and one more view of each marked one shows what is not marked."""

    def __init__(self, name: str, records: list[dict], size: int, anomaly: bool,
                 views: int = 0, seed: int = 0, strong: bool = False):
        self.name, self.size, self.seed, self.turns = name, size, seed, anomaly
        self.strong, self.fixed, self.folder = strong, views > 0, None
        self.records = [r for r in records for _ in range(max(1, views))]
        self.records += [r | {"clean": True} for r in records if anomaly and "mask" in r]
        self.index = [{"names": by_category(r), "group": group(r), "image": r["image"],
                       "category": r.get("category", ""), "clean": "clean" in r}
                      for r in self.records]
        self.trusted = not self.fixed and len(records) > 5000   # without a look at every mask
        # these two decide what `keep` keeps
        self.recipe, self.sources = [views, seed, size, anomaly, strong], records

    def draw(self, i: int, rng: Rng | None) -> tuple[Tensor, Tensor]:
        """(3, S, S) pixels and (S, S) labels of entry i."""
        rng = rng or np.random.default_rng([self.seed, i])
        seen = read_record(self.records[i])
        seen = clean_crop(*seen, rng) if self.index[i]["clean"] else seen
        return augment(*seen, self.size, rng, self.turns, self.strong)

    def view(self, i: int, rng: Rng | None = None, label: str = "") -> View:
        """View i; a fresh one is drawn again, up to five times, until it shows the label."""
        names = self.index[i]["names"]
        if self.folder:
            labels, *features = self.kept(i, "labels", "maps", "detail")
            return View(None, labels, shown_names(names, labels), *features)
        for _ in range(5):
            pixels, labels = self.draw(i, None if self.fixed else rng)
            shown = shown_names(names, labels)
            if self.fixed or not label or label in shown:
                break
        return View(pixels, labels, shown)

    def kept(self, i: int, *names: str) -> list[Tensor]:
        with safe_open(self.folder / f"{i}.safetensors", "pt") as file:
            return [file.get_tensor(name) for name in names if name in file.keys()]

    def names(self, i: int) -> dict[str, int]:
        """label -> value, of those that entry i shows."""
        if self.folder:
            return shown_names(self.index[i]["names"], *self.kept(i, "labels"))
        if self.fixed:
            return self.view(i).names
        if self.index[i]["clean"]:
            return {}
        if self.trusted:
            return {name: int(value) for value, name in self.index[i]["names"].items()}
        return record_names(self.records[i])

    def sort(self, workers: int) -> None:
        """Find entries by what they show, for pairs."""
        with ThreadPoolExecutor(max(1, workers)) as pool:
            self.shown = list(pool.map(self.names, range(len(self.index))))
        table = group_by((name, i) for i, names in enumerate(self.shown) for name in names)
        # a pair needs two views, which one entry gives if it is not fixed
        self.by_label = {k: some for k, some in table.items() if len(some) > self.fixed}
        self.images = {k: len({self.index[i]["image"] for i in some})
                       for k, some in self.by_label.items()}
        self.often = np.cumsum(np.sqrt([len(entries) for entries in self.by_label.values()]))
        records = list(enumerate(self.index))
        self.good = group_by((r.get("category", ""), i) for i, r in records if not self.shown[i])
        self.alike = group_by((r["image"], i) for i, r in records)

    def views_of(self, entry: int, label: str) -> list[int]:
        """Entries of the same image that show the label; the entry too if each draw is another."""
        return [i for i in self.alike[self.index[entry]["image"]]
                if label in self.shown[i] and (i != entry or not self.fixed)]

    def others(self, entries: Sequence[int], *than: int) -> list[int]:
        """Those of the entries that show another physical item than these."""
        groups = [self.index[i]["group"] for i in than]
        return [i for i in entries if self.index[i]["group"] not in groups]

    def another(self, entries: Sequence[int], than: int, rng: Rng) -> int | None:
        """A random one of `others`, or None; of many entries it looks at a few."""
        few = [entries[k] for k in rng.integers(len(entries), size=20)] if entries else []
        rest = self.others(few, than) or self.others(entries, than)
        return rest[rng.integers(len(rest))] if rest else None

    def keep(self, cache: str, model: icas.ICAS, workers: int) -> None:
        """Encode the views that are not in the cache yet, and read all from there. Each is a file,
        whole or not there, in a folder named after what decides it; ranks share the work."""
        made = json.dumps([self.recipe, list(map(content, self.sources)), model.kind]).encode()
        folder = Path(cache, f"{self.name}-{hashlib.sha256(made).hexdigest()[:12]}")
        folder.mkdir(parents=True, exist_ok=True)
        missing = [i for i in range(rank(), len(self.index), world())
                   if not (folder / f"{i}.safetensors").is_file()]
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for n in tqdm(range(0, len(missing), 16), self.name, disable=not sys.stderr.isatty()):
                views = list(pool.map(self.view, missing[n:n + 16]))
                made = encode(model, views).to("cpu", torch.half).tensors()
                for j, (i, view) in enumerate(zip(missing[n:], views)):
                    tensors = {"labels": view.labels} | {name: x[j] for name, x in made.items()}
                    part = folder / f"{i}.part"
                    save_file({name: x.contiguous() for name, x in tensors.items()}, part)
                    part.replace(part.with_suffix(".safetensors"))
        if dist.is_initialized():
            dist.barrier()
        self.folder = folder


class FreshSynthetic(FreshViews):
    """Synthetic defects on surfaces drawn from all manifests alike: two entries a kind, each draw
    of them new, or with `views` three times as many that stay the same; and one of the surface
    alone. Of every third kind is a real defect, blended in. Three in ten surfaces show a defect of
    another kind, which is not labelled."""

    def __init__(self, manifests: Sequence[str], kinds: int, size: int, views: int = 0,
                 seed: int = 0, strong: bool = False):
        super().__init__("synthetic", [], size, True, views, seed, strong)
        self.entries, self.trusted = 3 * views or 2, not self.fixed
        self.pools = [[r for r in read_manifest(m, limit=100_000) if not r.get("anomalous")]
                      for m in manifests]
        self.marked = [r for r in ([r for r in pool if "mask" in r] for pool in self.pools) if r]
        self.defects = [SyntheticDefect.draw(np.random.default_rng([seed, k]))
                        for k in range(kinds)]
        self.index = [{"names": {"1": f"{d.kind}_{k}"}, "group": f"{k}_{j}", "image": f"{k}_{j}",
                       "category": str(k), "clean": j == self.entries}
                      for k, d in enumerate(self.defects) for j in range(self.entries + 1)]
        self.recipe += ["blended", kinds, [len(pool) for pool in self.pools]]
        self.sources = sum(self.pools, [])

    def surface(self, source: Rng, rng: Rng) -> Tensor:
        """(3, S, S): an image of the data set that `source` draws; a real defect on it is one more
        thing that is not labelled."""
        pool = self.pools[source.integers(len(self.pools))]
        record = read_record(pool[rng.integers(len(pool))])
        return augment(*record, self.size, rng, True, self.strong)[0]

    def draw(self, i: int, rng: Rng | None) -> tuple[Tensor, Tensor]:
        """A new defect of the entry's kind. Even kinds stay on one data set, as real ones do."""
        kind, j = divmod(i, self.entries + 1)
        rng = rng or np.random.default_rng([self.seed, kind, j])
        home = rng if kind % 2 else np.random.default_rng([self.seed, kind, 99])
        base, other = self.surface(home, rng), int(rng.integers(len(self.defects)))
        if other != kind and rng.random() < 0.3:
            base, _ = self.damage(other, base, rng)
        if self.index[i]["clean"]:
            return base, torch.zeros(base.shape[1:], dtype=torch.uint8)
        pixels, mask = self.damage(kind, base, rng)
        return pixels, mask.byte()

    def damage(self, kind: int, base: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """(3, S, S) with a defect of a kind, and its (S, S) bool mask."""
        source = np.random.default_rng(self.defects[kind].texture)
        if kind % 3 or not self.marked:
            foreign = base
            if self.defects[kind].kind == "texture":
                foreign = self.surface(source, source)
            return self.defects[kind].paint(base, foreign, rng)
        pool = self.marked[source.integers(len(self.marked))]
        image, labels = read_record(pool[source.integers(len(pool))])
        if not labels.any():
            return base, torch.zeros(base.shape[1:], dtype=torch.bool)
        chosen = labels == source.choice(labels[labels > 0].unique())
        patch, mask = cut_out(image, chosen, self.size, source, rng)
        y, x = (int(rng.integers(self.size - n + 1)) for n in mask.shape)
        place = ..., slice(y, y + mask.shape[0]), slice(x, x + mask.shape[1])
        pixels, marked = base.clone(), torch.zeros(base.shape[1:], dtype=torch.bool)
        pixels[place] = poisson_blend(base[place], patch, mask)
        marked[place] = mask
        return pixels, marked
