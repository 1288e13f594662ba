#!/usr/bin/env python3
"""The paper's benchmarks, beside training-free baselines on the same features, reproducible to the list of files.

    python evaluate.py --task semantic    --data DIR/magnetic_tile --out runs/tile        # Tables 1, 6, 10: one marked defect as prompt
    python evaluate.py --task interactive --data DIR/magnetic_tile --out runs/clicks      # Tables 2, 5: clicks on the image itself
    python evaluate.py --task fewshot     --data elpv --out runs/elpv                     # Table 3: 1, 2, 4, 8 good parts
    python evaluate.py --task openset     --data my_parts --out runs/mine                 # Table 4: good parts and one marked defect
    python evaluate.py --task speed --encoder vitl14 --out runs/speed                     # Table 14: beside SAM ViT-H
    python evaluate.py --replay runs/tile/results.json --out runs/again                   # the same prompts and tests
    torchrun --nproc-per-node 4 evaluate.py ...                                           # the same figures, shared out

--data takes manifests or folders that hold one (see data_prep), folders in the MVTec AD layout, flat good/ bad/ mask/ folders, and
"elpv" (the PyPI package). Protocols are those of METHOD 4. A run first draws its episodes (prompts and tests, from sorted names,
by seed alone), checks them for leaks, then scores them. OUT/results.json keeps figures, episodes, arguments, versions and hashes;
finished categories are kept in OUT/parts and not computed again.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import resource
import sys
import time
import zlib
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy import ndimage
from scipy.integrate import trapezoid
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve
from torch import Tensor
from tqdm import tqdm

import icas
from data_prep.manifest import named, read_manifest, read_pixels, read_record
from train import rank, world

# The paper's cells for orientation: as printed, but where METHOD 3 says that a printed mean is not the mean of its cells
PAPER = {"semantic": "paper, MVTec AD: 52.3 with ViT-L (printed 51.1), 42.4 with ViT-S",
         "fewshot": {"elpv": {2: 84.2, 4: 84.0, 8: 88.0}, "kolektorsdd": {2: 98.4, 4: 98.8, 8: 99.4}},
         "openset": {"elpv": 88.1, "kolektorsdd": 98.5}}
# The fused score, its seven parts, and what a user could have without training, which sees the prompt as it lies; "plain": not debiased
SEGMENTERS = ("icas", "S_s", "S_s mfm", "relation net", "margin", "prototypes", "fisher", "pixel", "nearest patch", "prototype",
              "nearest patch, plain", "prototype, plain")
PEERS = {"semantic": SEGMENTERS[-4:], "interactive": SEGMENTERS[-4:]}
# icas, without the marked anomaly (open-set), its two distances each alone, and both without `icas.local`; with --ablation the decoder's
# scores alone and as a factor; then the peers
DETECTORS = ("icas", "without the anomaly", "nearest neighbour", "subspace residual", "without the median", "S_n", "S_n mfm", "times S_n",
             "times S_n mfm", "nearest patch", "AnomalyDINO recipe", "SubspaceAD recipe")
PEERS |= {"fewshot": DETECTORS[-3:], "openset": DETECTORS[-3:]}
RATES = (0.01, 0.05, 0.1, 0.2)   # false positive rates that are asked of `icas.detect` and compared with what is observed


# ---- Data ----------------------------------------------------------------------------------------------------------------


def read_source(source: str, strips: int = 1) -> dict[str, list[dict]]:
    """Category -> its records, sorted by name: absolute paths, "name" relative to the source, "split", "group", "labels".

    strips  cuts every image into so many equal parts along its longer side (KolektorSDD's few-shot protocol: 3).
    """
    path = Path(source)
    if path.is_file() or (path / "manifest.jsonl").is_file():
        root, records = (path.parent if path.is_file() else path), read_manifest(path)
        default = root.resolve().name
    else:
        if source == "elpv":
            from data_prep import elpv as reader
            records, root, default = list(reader.records()), None, "elpv"
        elif path.is_dir():
            from data_prep import folder as reader
            records, root, default = list(reader.records(path)), path, path.resolve().name
        else:
            raise FileNotFoundError(f"--data: no manifest or folder at {source!r}; or give 'elpv'")
    root = root or Path(os.path.commonpath([r["image"] for r in records]))
    categories: dict[str, list[dict]] = {}
    for record in records:
        name = Path(os.path.relpath(record["image"], root)).as_posix()
        name += "#{}-{}".format(*record["box"][:2]) if "box" in record else ""
        for cut in strips_of(record, strips, name):
            categories.setdefault(record.get("category") or default, []).append(
                {"split": "test", "group": name, "labels": {}} | record | cut)
    return {c: sorted(categories[c], key=lambda r: r["name"]) for c in sorted(categories)}


def strips_of(record: dict, strips: int, name: str) -> list[dict]:
    """What sets the equal parts of an image, or of its box, apart: name and box."""
    if strips == 1:
        return [{"name": name}]
    from data_prep.common import cuts, size
    h, w = size(Path(record["image"]))
    x0, y0, x1, y1 = record.get("box", [0, 0, w, h])
    boxes = cuts(y1 - y0, x1 - x0, strips)
    return [{"name": f"{name}#{i}", "box": [x0 + a, y0 + b, x0 + c, y0 + d]} for i, (a, b, c, d) in enumerate(boxes)]


def look(records: Sequence[dict]) -> None:
    """Add to each record what its mask really shows: "shows" {label: value}, and "bad"."""
    for record in tqdm(records, desc="masks", leave=False, disable=not sys.stderr.isatty() or rank() > 0):
        present = set(np.unique(read_record(record)[1].numpy()).tolist()) - {0} if "mask" in record else set()
        names = named(record)
        record["shows"] = {names.get(str(v), f"label {v}"): int(v) for v in sorted(present)}
        record["bad"] = bool(present) or bool(record.get("anomalous"))


def gather(part: dict) -> dict:
    """The union of every rank's dictionary, in sorted order."""
    parts = [part]
    if dist.is_initialized():
        parts = [None] * world()
        dist.all_gather_object(parts, part)
    return {key: value for key, value in sorted((item for p in parts for item in p.items()), key=lambda item: item[0])}


# ---- Episodes: who prompts, who is tested ----------------------------------------------------------------------------------


def stream(*key) -> np.random.Generator:
    """Random numbers that depend on the key alone, not on order or platform."""
    return np.random.default_rng(zlib.crc32("/".join(map(str, key)).encode()))


def draw(records: Sequence[dict], count: int, *key) -> list[dict]:
    """`count` records, no two of one group."""
    chosen, seen = [], set()
    for i in stream(*key).permutation(len(records)):
        if records[i]["group"] not in seen and len(chosen) < count:
            chosen.append(records[i])
            seen.add(records[i]["group"])
    return chosen


def unseen(records: Sequence[dict], prompts: Sequence[dict]) -> list[str]:
    """Names of the records that show no physical item of the prompts."""
    seen = {p["group"] for p in prompts}
    return [r["name"] for r in records if r["group"] not in seen]


def names(records: Sequence[dict]) -> list[str]:
    return [r["name"] for r in records]


def split_normals(records: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """Good records for prompts and for tests: the manifest's split, or 75 to 25 by group, the same for all seeds."""
    good = [r for r in records if not r["bad"]]
    train = [r for r in good if r["split"] == "train"]
    if not train or len(train) == len(good):
        groups = sorted({r["group"] for r in good})
        kept = {groups[i] for i in stream("split").permutation(len(groups))[:round(0.75 * len(groups))]}
        train = [r for r in good if r["group"] in kept]
    chosen = {r["name"] for r in train}
    return train, [r for r in good if r["name"] not in chosen]


def plan(task: str, records: Sequence[dict], args: argparse.Namespace) -> list[dict]:
    """Episodes of one category: {"seed", "label", "shots", "prompts", "normals", "tests", "good", ...}, all by name."""
    episodes = []
    if task in ("semantic", "interactive"):
        types = sorted({label for r in records for label in r["shows"]})
        good = [r for r in records if not r["bad"]]
        for seed in range(args.seeds):
            for label in types:
                shown = [r for r in records if label in r["shows"]]
                if task == "interactive":
                    episodes += [{"seed": seed, "label": label, "clicks": n, "tests": names(shown)} for n in args.clicks]
                    continue
                for shots in args.shots or [1]:
                    prompts = draw(shown, shots, seed, label, "prompt")
                    normals = draw(good, args.normals or 1, seed, label, "normal") if args.prompt != "anomaly" else []
                    tests, others = unseen(shown, prompts + normals), unseen(good, prompts + normals)
                    if len(prompts) < shots or not tests:
                        items = len({r["group"] for r in shown})
                        print(f"{label!r}: {items} items, too few for {shots} prompts and a test: left out", file=sys.stderr)
                        continue
                    episodes.append({"seed": seed, "label": label, "shots": shots, "normals": names(normals), "tests": tests,
                                     "prompts": names(prompts) if args.prompt != "normal" else [], "good": others if args.good else []})
        if not episodes:
            raise ValueError("--data: no defect type is marked in two images of different items; nothing can be evaluated")
        return episodes
    train, held = split_normals(records)
    bad = [r for r in records if r["bad"]]
    test = held + ([r for r in bad if r["split"] != "train"] or bad)
    if not train or len({r["bad"] for r in test}) < 2:
        raise ValueError(f"--data: {task} needs good images for prompts and both good and bad ones for the test; got {len(train)} for "
                         f"prompts, {sum(not r['bad'] for r in test)} good and {sum(r['bad'] for r in test)} bad; AUROC is undefined")
    for seed in range(args.seeds):
        if task == "fewshot":
            order = draw(train, max(args.shots or [8]), seed, "normals")
            for k in args.shots or [1, 2, 4, 8]:
                if len(order) < k:
                    raise ValueError(f"--shots {k}: only {len(order)} good items for prompts; ask for fewer")
                episodes.append({"seed": seed, "shots": k, "normals": names(order[:k]), "tests": unseen(test, order[:k])})
            continue
        normals = draw(train, args.normals or 8, seed, "normals")
        kinds = sorted({label for r in records for label in r["shows"]}) or ["anomalous"]
        kind = kinds[stream(seed, "kind").integers(len(kinds))]
        of_kind = [r for r in records if r["bad"] and (kind in r["shows"] or not r["shows"])]
        prompts = draw(of_kind, 1, seed, "anomaly")
        for setting in ("general", "hard") if len(kinds) > 1 else ("general",):
            left = [r for r in test if setting == "general" or not r["bad"] or r not in of_kind]
            episodes.append({"seed": seed, "setting": setting, "label": kind, "shots": len(normals), "prompts": names(prompts),
                             "normals": names(normals), "tests": unseen(left, prompts + normals)})
    return episodes


def check(episodes: Sequence[dict], records: Sequence[dict]) -> None:
    """A protocol that leaks or cannot be scored is refused, also when replayed from a file."""
    known = {r["name"]: r for r in records}
    for e in episodes:
        where = f"episode seed {e['seed']}, {e.get('label', 'normals')}"
        missing = [n for key in ("prompts", "normals", "tests", "good") for n in e.get(key, []) if n not in known]
        if missing:
            raise ValueError(f"{where}: {missing[0]!r} is not in the data")
        shown = {known[n]["group"] for key in ("prompts", "normals") for n in e.get(key, [])}
        leak = [n for key in ("tests", "good") for n in e.get(key, []) if known[n]["group"] in shown]
        if leak:
            raise ValueError(f"{where}: test {leak[0]!r} shows the same item as a prompt (group {known[leak[0]]['group']!r}): a leak")
        if not e["tests"]:
            raise ValueError(f"{where}: no test image")
        bad_prompt = [n for n in e.get("normals", []) if known[n]["bad"]]
        if bad_prompt:
            raise ValueError(f"{where}: {bad_prompt[0]!r} is a bad part but is given as a good one")
        if "setting" not in e:
            unmarked = [n for n in e.get("prompts", []) if e["label"] not in known[n]["shows"]]
            if unmarked:
                raise ValueError(f"{where}: the mask of prompt {unmarked[0]!r} is empty or shows another label")


# ---- Encoded images --------------------------------------------------------------------------------------------------------


class Store:
    """Images of one category, each encoded once, on demand; features are kept in half precision."""

    def __init__(self, model: icas.ICAS, records: Sequence[dict], batch_size: int = 1, turns: bool | None = None):
        self.model, self.records, self.kept, self.labels, self.turns = model, {r["name"]: r for r in records}, {}, {}, turns
        self.batch_size = 1 if model.device.type == "cpu" else batch_size  # on a CPU as fast, and no figure depends on it
        self.place = {name: i for i, name in enumerate(self.records)}

    def mine(self, tests: Sequence[str]) -> list[str]:
        """This rank's share of the test images: always the same ones, so that each is encoded by one rank only."""
        return [n for n in tests if self.place[n] % world() == rank()]

    def pixels(self, name: str) -> Tensor:
        """(H, W, 3) uint8; the label map is kept beside, it is small and asked for in every episode."""
        image, labels = read_pixels(self.records[name])
        self.labels[name] = labels.numpy()
        return image

    def encode(self, wanted: Sequence[str]) -> None:
        """Encode what is not there yet, tiles of one size together."""
        wanted = [n for n in dict.fromkeys(wanted) if n not in self.kept]
        for i in range(0, len(wanted), self.batch_size):
            cut = [(n, box, part) for n in wanted[i:i + self.batch_size]
                   for box, part in icas._cut(self.pixels(n).to(self.model.device), self.model.config)]
            for shape in {part.shape for _, _, part in cut}:
                alike = [c for c in cut if c[2].shape == shape]
                for j in range(0, len(alike), self.batch_size):
                    group = alike[j:j + self.batch_size]
                    features = self.model.describe(torch.cat([part for _, _, part in group]))
                    for k, (n, box, _) in enumerate(group):
                        self.kept.setdefault(n, []).append(icas.Tile(box, icas.Features(*(x[k:k + 1].half() for x in features))))
        for n in wanted:
            self.kept[n].sort(key=lambda tile: tile.box)

    def tiles(self, name: str) -> list[icas.Tile]:
        self.encode([name])
        return [t._replace(features=icas.Features(*(x.float() for x in t.features))) for t in self.kept[name]]

    def truth(self, name: str, label: str | None = None) -> np.ndarray:
        """(h, w) bool: one label, or everything that is marked."""
        if name not in self.labels:
            self.pixels(name)
        labels = self.labels[name]
        return labels > 0 if label is None else labels == self.records[name]["shows"].get(label, -1)

    def shots(self, name: str, label: str = "") -> list[icas.Shot]:
        """A prompt as `icas.encode` makes it: the marked label, or a good part, which is kept: seeds and shots share it."""
        if label:
            return self.views(name, torch.from_numpy(self.truth(name, label)), label)
        if ("good", name) not in self.kept:
            self.kept["good", name] = self.views(name, torch.zeros(self.truth(name).shape), "")
        return self.kept["good", name]

    def views(self, name: str, mask: Tensor, label: str) -> list[icas.Shot]:
        """Shots of an image in the turns that `icas.encode` gives it, or --turns; mask (h, w), all 0 with the label "" of a good part."""
        return icas._turned_shots(self.model, self.pixels(name), mask, label, str(self.place[name]), self.turns)

    def shown(self, episode: dict) -> list[icas.Shot]:
        """All that an episode shows: marked prompts, then good parts."""
        marked = [s for n in episode["prompts"] for s in self.shots(n, episode["label"])]
        return marked + [s for n in episode["normals"] for s in self.shots(n)]


def canvas(maps: Sequence[Tensor], tiles: Sequence[icas.Tile], shape: tuple[int, int]) -> np.ndarray:
    """(h, w) map of an image from its tiles'."""
    total, weight = torch.zeros(shape, device=maps[0].device), torch.zeros(shape, device=maps[0].device)
    for part, tile in zip(maps, tiles):
        icas._paste(total, weight, part, tile.box)
    return (total / weight).cpu().numpy()


# ---- Segmentation (Tables 1, 2, 5, 6, 10) ------------------------------------------------------------------------------------


class Shown(NamedTuple):
    """What an episode shows: the prompt, Q_r of its good parts, and for the peers the middle block's tokens of the images as they lie."""
    prompt: icas.Prompt
    reference_masks: Tensor | None
    upright: list[Tensor]       # (1, R, D) debiased, and not
    foreground: Tensor          # (1, R)
    background: Tensor


def clicked_maps(model: icas.ICAS, tiles: Sequence[icas.Tile], clicks: tuple[list, list], shape: tuple[int, int],
                 switches: dict) -> dict[str, np.ndarray]:
    """(h, w) score of each method for clicks: icas looks twice, as `icas.segment` does; its peers see the clicks."""
    look = lambda shots: segmentation_maps(model, tiles, show(model, shots), shape, switches | {"clicked": True})  # noqa: E731
    first = look(icas._interactive(tiles, shape, *clicks, None, None))
    second = look(icas._second_look(tiles, torch.from_numpy(first["icas"]), *clicks))
    return second | {m: first[m] for m in PEERS["interactive"]}


def segmentation_maps(model: icas.ICAS, tiles: Sequence[icas.Tile], shown: Shown, shape: tuple[int, int],
                      switches: dict) -> dict[str, np.ndarray]:
    """(h, w) score of each method for one target; above 0 is a defect."""
    parts: dict[str, list[Tensor]] = {m: [] for m in SEGMENTERS}
    marked = bool(shown.prompt.marked.any())
    foreground, background = icas._surely(shown.foreground, 0.5), icas._surely(shown.background, 0.999)
    for tile in tiles:
        odds, s = icas._log_odds(model, tile.features, shown.prompt, shown.reference_masks, **switches)
        single, matched = (s.semantic, s.semantic_mfm) if marked else (s.normal, s.normal_mfm.clamp(0, 1))
        maps = [odds, torch.logit(single, 1e-4), torch.logit(matched, 1e-4), s.relation, s.margin, s.prototype, s.fisher, s.pixel]
        for tokens, reference in zip(middle_tokens(model, tile.features.maps), shown.upright):
            near = icas.nearest_margin(tokens, reference, foreground, background)
            mean = icas.prototype_margin(tokens, reference, shown.foreground, background.float())
            maps += [F.interpolate(m.view(1, 1, *tile.features.maps.shape[-2:]), scale_factor=4, mode="bilinear")[0]
                     for m in (near[0] - near[1], mean)]
        for method, part in zip(SEGMENTERS, maps):
            parts[method].append(part[0])
    return {m: canvas(p, tiles, shape) for m, p in parts.items()}


def middle_tokens(model: icas.ICAS, maps: Tensor) -> list[Tensor]:
    """(B, T, D) unit tokens of the middle block, debiased and not."""
    middle = maps.float().chunk(len(model.config.blocks), dim=1)[model.middle]
    return [icas.unit_tokens(middle, basis) for basis in (model.bases(*maps.shape[-2:])[model.middle], None)]


def show(model: icas.ICAS, shots: Sequence[icas.Shot]) -> Shown:
    normals = [s for s in shots if not s.label]
    lying = [s for s in shots if not s.turn]
    upright = [torch.cat(tokens, dim=1) for tokens in zip(*(middle_tokens(model, s.maps[None].to(model.device)) for s in lying))]
    sides = (torch.cat([side.flatten() for side in some])[None].to(model.device)
             for some in ([s.foreground for s in lying], [s.background for s in lying]))
    return Shown(icas._join(model, shots), icas._reference_masks(model, normals), upright, *sides)


def clicks_on(truth: np.ndarray, count: int, *key) -> tuple[list, list]:
    """`count` positive and as many negative (x, y) clicks, uniform over the truth (eroded by a pixel) and over the rest (METHOD 4)."""
    rng = stream(*key)
    inner = ndimage.binary_erosion(truth)
    points = []
    for side in (inner if inner.any() else truth, ~truth):
        y, x = np.nonzero(side)
        points += [(float(x[i]), float(y[i])) for i in rng.integers(len(y), size=count)] if len(y) else []
    return points, [1] * count + [0] * (len(points) - count)


def score_segmentation(model: icas.ICAS, store: Store, episode: dict, switches: dict) -> dict:
    """(method, image) -> [intersection, union, pixels] of this rank's share of one episode; good images have no intersection."""
    counts, label = {}, episode["label"]
    if "clicks" not in episode:
        shown = show(model, store.shown(episode))
    mine = store.mine([*episode["tests"], *episode.get("good", [])])
    store.encode(mine)
    for name in mine:
        tiles, truth = store.tiles(name), store.truth(name, label)
        if "clicks" in episode:
            clicks = clicks_on(truth, episode["clicks"], episode["seed"], name, label, episode["clicks"])
            maps = clicked_maps(model, tiles, clicks, truth.shape, switches)
        else:
            maps = segmentation_maps(model, tiles, shown, truth.shape, switches)
        for method, found in maps.items():
            found = found > 0
            counts[method, name] = [int((found & truth).sum()), int((found | truth).sum()), truth.size]
    return counts


def iou_metrics(counts: dict, episode: dict) -> dict[str, dict]:
    """Method -> pooled IoU, FB-IoU, mean IoU of single images, and pooled IoU with the good images added; in percent (METHOD 4)."""
    result = {}
    for method in SEGMENTERS:
        rows = np.array([counts[method, n] for n in episode["tests"]], dtype=np.int64)
        inter, union, pixels = rows.sum(axis=0)
        clean = sum(counts[method, n][1] for n in episode.get("good", []))
        result[method] = {"iou": 100 * inter / max(1, union), "fb": [int(v) for v in (inter, union, pixels - union, pixels - inter)],
                          "image_iou": float(np.mean(100 * rows[:, 0] / np.maximum(1, rows[:, 1])))}
        if episode.get("good"):
            result[method]["iou_with_good"] = 100 * inter / max(1, union + clean)
    return result


def summarise_segmentation(scored: Sequence[tuple[dict, dict]]) -> dict:
    """Episodes' metrics -> per method: mean IoU over types, its spread over seeds, per type, FB-IoU, and per number of shots or clicks."""
    axis = "clicks" if "clicks" in scored[0][0] else "shots"
    seeds, labels = sorted({e["seed"] for e, _ in scored}), sorted({e["label"] for e, _ in scored})
    sizes, rows = sorted({e[axis] for e, _ in scored}), {}
    for method in SEGMENTERS:
        def mean(key: str, **where) -> float | None:
            values = [m[method][key] for e, m in scored if all(e[k] == v for k, v in where.items()) and key in m[method]]
            return float(np.mean(values)) if values else None
        by_seed = [mean("iou", seed=s) for s in seeds]
        fb = np.sum([m[method]["fb"] for _, m in scored], axis=0)
        rows[method] = {"mean_iou": mean("iou"), "std": float(np.std(by_seed)), "seeds": by_seed,
                        "iou": {t: mean("iou", label=t) for t in labels}, "image_iou": mean("image_iou"),
                        "fb_iou": float(50 * fb[0] / max(1, fb[1]) + 50 * fb[2] / max(1, fb[3])),
                        "iou_with_good": mean("iou_with_good"), axis: {str(n): mean("iou", **{axis: n}) for n in sizes}}
    return rows


# ---- Detection (Tables 3, 4) -------------------------------------------------------------------------------------------------


def rotations(pixels: Tensor, angles: Sequence[float]) -> list[Tensor]:
    """(H, W, 3) uint8 turned about its middle, borders mirrored."""
    turn = lambda a: torch.from_numpy(ndimage.rotate(pixels.numpy(), a, reshape=False, order=1, mode="reflect"))  # noqa: E731
    return [turn(a) if a else pixels for a in angles]


Detector = Callable[[icas.Features, str], Tensor]   # one tile's features, its name -> (H0, W0) map of how abnormal its tokens are


def turned(model: icas.ICAS, store: Store, name: str) -> tuple[Tensor, Tensor]:
    """(R, D) tokens of eight turns of a good part, as they are: of the last block, and the middle blocks' mean; kept in the store."""
    if ("turned", name) not in store.kept:
        maps = [t.features.maps for p in rotations(store.pixels(name), range(0, 360, 45)) for t in icas._describe(model, p)]
        both = [(last_block(model, m), middle_mean(model, m)) for m in maps]
        store.kept["turned", name] = tuple(torch.cat(tokens).half() for tokens in zip(*both))
    last, middle = store.kept["turned", name]
    return last.float(), middle.float()


def last_block(model: icas.ICAS, maps: Tensor) -> Tensor:
    return maps[0].chunk(len(model.config.blocks))[-1].flatten(1).T


def middle_mean(model: icas.ICAS, maps: Tensor) -> Tensor:
    return icas.middle_mean(maps, len(model.config.blocks))[0]


def peers(model: icas.ICAS, store: Store, normals: Sequence[str]) -> dict[str, Detector]:
    """The training-free detectors, as their authors describe them, on our encoder."""
    mean, basis = icas.subspace(torch.cat([turned(model, store, n)[1] for n in normals]), 0.99)

    def nearest(kind: str, tile: str, tokens: Tensor, known: Callable[[str], Tensor]) -> Tensor:
        """1 - best cosine (T,); that of a tile and a good part is computed once and kept: seeds and shots share them."""
        best = []
        for n in normals:
            if (kind, tile, n) not in store.kept:
                with model.autocast():
                    store.kept[kind, tile, n] = (tokens @ known(n).T).amax(dim=1).float()
            best.append(store.kept[kind, tile, n])
        return 1 - torch.stack(best).amax(dim=0)

    def nearest_last(features: icas.Features, tile: str) -> Tensor:
        tokens = F.normalize(last_block(model, features.maps), dim=-1)
        known = lambda n: F.normalize(turned(model, store, n)[0], dim=-1)  # noqa: E731
        return nearest("last", tile, tokens, known).view(features.maps.shape[-2:])

    def residual(features: icas.Features, tile: str) -> Tensor:
        return icas.residual(middle_mean(model, features.maps), mean, basis).view(features.maps.shape[-2:])

    def upright(features: icas.Features, tile: str) -> Tensor:
        debiased = lambda maps: model.tokens(maps)[model.middle][0]  # noqa: E731
        good = lambda n: torch.cat([debiased(t.features.maps) for t in store.tiles(n)])  # noqa: E731
        return nearest("upright", tile, debiased(features.maps), good).view(features.maps.shape[-2:])
    return {"nearest patch": upright, "AnomalyDINO recipe": nearest_last, "SubspaceAD recipe": residual}


def sortable(values: np.ndarray) -> np.ndarray:
    """float -> uint16 with the order of their float16: exact bins without a range."""
    bits = values.astype(np.float16).view(np.uint16)
    return np.where(bits & 0x8000, ~bits, bits | 0x8000)


def pseudo_shot(model: icas.ICAS, store: Store, name: str, good: icas.GoodParts) -> list[icas.Shot]:
    """A known bad part without a mask: its most abnormal 2 % of tokens stand for one."""
    tiles = store.tiles(name)
    maps = [icas.abnormal(far, torch.zeros_like(far[:, 0]))[0] for far in (icas.distances(model, t.features, good) for t in tiles)]
    found = canvas(maps, tiles, store.truth(name).shape)
    return store.views(name, torch.from_numpy(found >= np.quantile(found, 0.98)), "anomalous")


def detection_maps(model: icas.ICAS, features: icas.Features, tile: str, good: icas.GoodParts, normal: tuple | None,
                   others: dict[str, Detector]) -> dict[str, Tensor]:
    """Method -> (H0, W0) map of one tile. normal: the good parts as the decoder's prompt and Q_r, for the ablation."""
    far = icas.distances(model, features, good)
    work = lambda far, seen=torch.zeros_like(far[:, 0]): icas.abnormal(far, seen)  # noqa: E731
    maps = {"icas": work(far, icas.seen_before(model, features, good.defects)), "nearest neighbour": work(far[:, :1]),
            "subspace residual": work(far[:, 1:]), "without the median": far.mean(dim=1)}
    if good.defects:
        maps["without the anomaly"] = work(far)
    if normal:
        scores = icas._log_odds(model, features, *normal)[1]
        for name, fine in (("S_n", scores.normal), ("S_n mfm", scores.normal_mfm)):
            maps[name] = F.avg_pool2d(fine[:, None], 4)[:, 0]
            maps[f"times {name}"] = work(far * (1 + maps[name][:, None]))
    return {m: x[0] for m, x in maps.items()} | {m: detector(features, tile) for m, detector in others.items()}


def score_detection(model: icas.ICAS, store: Store, episode: dict, masks: bool, switches: dict) -> dict:
    """(method, image) -> {"score", for icas "above" {rate: bool}, and with masks "bad", "clean", "regions", "count": histograms for pixel
    AUROC and PRO}."""
    normals, label = episode["normals"], episode.get("label", "")
    known = icas.References([s for n in normals for s in store.shots(n)], model.encoder_sha256, model.config.blocks)
    shots = [s for n in episode.get("prompts", []) for s in
             (store.shots(n, label) if store.records[n]["shows"] else pseudo_shot(model, store, n, icas._known_good(model, known)))]
    good = icas._known_good(model, icas.References(shots + known.shots) if shots else known)
    normal = icas._prompts(model, known)[""] if switches["ablation"] else None
    others = peers(model, store, normals) if switches["peers"] else {}
    cuts = {rate: icas.normal_threshold(good, rate) for rate in RATES}
    found = {}
    mine = store.mine(episode["tests"])
    store.encode(mine)
    for name in mine:
        tiles = store.tiles(name)
        parts = [detection_maps(model, t.features, f"{name} {i}", good, normal, others) for i, t in enumerate(tiles)]
        if masks:
            truth = store.truth(name)
            regions, count = ndimage.label(truth, structure=np.ones((3, 3)))
            weights = 1 / np.bincount(regions.ravel(), minlength=count + 1)[regions[truth]]
        for method in parts[0]:
            maps = [p[method] for p in parts]
            entry = {"score": max(float(icas.top_share(m[None])) for m in maps)}
            if method == "icas":
                entry["above"] = {rate: entry["score"] > cut for rate, cut in cuts.items()}
            if masks:
                whole = canvas(maps, tiles, truth.shape)
                if method == "AnomalyDINO recipe":
                    whole = ndimage.gaussian_filter(whole, 4)
                bins = sortable(whole)
                entry |= {"bad": np.unique(bins[truth], return_counts=True), "clean": np.unique(bins[~truth], return_counts=True),
                          "regions": (bins[truth], weights), "count": count}
            found[method, name] = entry
    return found


def pixel_metrics(entries: Sequence[dict]) -> dict:
    """Pixel AUROC and PRO (area under the covered share of each truth region up to a pixel FPR of 0.3), in percent."""
    bad, clean, covered = (np.zeros(1 << 16) for _ in range(3))
    for e in entries:
        bad[e["bad"][0]] += e["bad"][1]
        clean[e["clean"][0]] += e["clean"][1]
        np.add.at(covered, *e["regions"])
    used = np.nonzero(bad + clean)[0]
    count = sum(e["count"] for e in entries)
    if not count or not clean.sum():
        return {}
    auroc = roc_auc_score(np.r_[np.ones(len(used)), np.zeros(len(used))], np.r_[used, used], sample_weight=np.r_[bad[used], clean[used]])
    fpr = np.r_[0, clean[used][::-1].cumsum() / clean.sum()]
    share = np.r_[0, covered[used][::-1].cumsum() / count]
    limit = 0.3
    end = np.interp(limit, fpr, share)
    inside = fpr <= limit
    pro = trapezoid(np.r_[share[inside], end], np.r_[fpr[inside], limit]) / limit
    return {"pixel_auroc": 100 * float(auroc), "pro": 100 * float(pro)}


def detection_metrics(found: dict, episode: dict, store: Store, masks: bool) -> dict[str, dict]:
    """Method -> image AUROC, AUPR, F1-max, and with masks pixel AUROC and PRO; of icas also the shares of good and of bad parts that its
    thresholds call bad; in percent."""
    truth = [int(store.records[n]["bad"]) for n in episode["tests"]]
    if len(set(truth)) < 2:
        raise ValueError(f"episode seed {episode['seed']}: all tests are {'bad' if truth[0] else 'good'}: AUROC is undefined")
    result = {}
    for method in (m for m in DETECTORS if (m, episode["tests"][0]) in found):
        entries = [found[method, n] for n in episode["tests"]]
        scores = [e["score"] for e in entries]
        precision, recall, _ = precision_recall_curve(truth, scores)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        result[method] = {"image_auroc": 100 * float(roc_auc_score(truth, scores)), "f1_max": 100 * float(f1.max()),
                          "aupr": 100 * float(average_precision_score(truth, scores))} | (pixel_metrics(entries) if masks else {})
    for rate in RATES:
        above = np.array([found["icas", n]["above"][rate] for n in episode["tests"]])
        result["icas"] |= {f"{what} at {rate:g}": 100 * float(above[np.array(truth) == bad].mean())
                           for bad, what in enumerate(("false positives", "found"))}
    return result


def summarise_detection(scored: Sequence[tuple[dict, dict]]) -> dict:
    """Episodes' metrics -> per method: mean and spread over seeds for each number of shots (few-shot) or setting (open-set)."""
    axis, rows = "setting" if "setting" in scored[0][0] else "shots", {}
    for method in scored[0][1]:
        rows[method] = {}
        for value in dict.fromkeys(e[axis] for e, _ in scored):
            mine = [m[method] for e, m in scored if e[axis] == value]
            rows[method][str(value)] = {k: float(np.mean([m[k] for m in mine])) for k in mine[0]} | {
                "std": float(np.std([m["image_auroc"] for m in mine])), "seeds": [m["image_auroc"] for m in mine]}
    return rows


# ---- Speed (Table 14) --------------------------------------------------------------------------------------------------------


def speed(model: icas.ICAS, sam: bool, repeats: int = 9) -> dict:
    """Median seconds of `segment` with encoded references, of the encoder alone, and of SAM ViT-H with one click, in turn."""
    size = model.config.image_size
    image, mask = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8), np.zeros((size, size), bool)
    mask[size // 4:size // 3, size // 4:size // 2] = True
    references, pixels, seconds = icas.encode([(image, mask)], model=model), torch.rand(1, 3, size, size, device=model.device), {}

    def encoder() -> None:
        with torch.inference_mode(), model.autocast():
            model.encoder(pixels, model.config.blocks)[0].sum().item()  # .item() waits for a GPU
    work = {"encoder": encoder, "segment": lambda: icas.segment(image, references, model=model)}
    parts = (("encoder", model.encoder), ("decoder", model.decoder))
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in parts}
    memory = {}

    def run(name: str, turns: int) -> None:
        for turn in range(turns + 1):
            start = time.perf_counter()
            work[name]()
            if turn:  # the first warms up
                seconds.setdefault(name, []).append(time.perf_counter() - start)
        memory[name] = round(torch.cuda.max_memory_allocated() / 2 ** 20) if model.device.type == "cuda" else round(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10))
    for name in list(work):
        run(name, repeats)
    if sam:
        from transformers import SamConfig, SamModel, SamVisionConfig
        vision = SamVisionConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, mlp_dim=5120,
                                 global_attn_indexes=[7, 15, 23, 31])
        other = SamModel(SamConfig(vision_config=vision.to_dict())).to(model.device).eval()
        count["SAM ViT-H"] = sum(p.numel() for p in other.parameters())
        wide, click = torch.rand(1, 3, 1024, 1024, device=model.device), torch.tensor([[[[512.0, 512.0]]]], device=model.device)

        def segment_anything() -> None:
            with torch.inference_mode(), model.autocast():
                other(pixel_values=wide, input_points=click).pred_masks.sum().item()
        work["SAM ViT-H"] = segment_anything
        run("SAM ViT-H", max(1, repeats // 4))
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    return {"seconds": median, "ratio": median["segment"] / median["encoder"], "parameters": count, "peak_memory_mib": memory,
            "image_size": size}


# ---- Tables and figures -------------------------------------------------------------------------------------------------------


def table(task: str, name: str, rows: dict) -> str:
    """Rows of methods, columns of types, shots or settings; in percent, with the paper's cell where it has one."""
    if task in PAPER and task in ("fewshot", "openset"):
        columns = list(rows["icas"])
        head = {"fewshot": "-shot", "openset": ""}[task]
        lines = [f"{'image AUROC, %':<22}" + "".join(f"{c + head:>16}" for c in columns)]
        for method, row in rows.items():
            lines.append(f"{method:<22}" + "".join(f"{row[c]['image_auroc']:>9.1f} ±{row[c]['std']:>5.1f}" for c in columns))
        cell = PAPER[task].get(name.lower())
        if cell:
            value = lambda c: cell.get(int(c)) if isinstance(cell, dict) else cell if c == "general" else None  # noqa: E731
            lines.append(f"{'paper, ViT-L':<22}" + "".join(f"{value(c):>9.1f}       " if value(c) else f"{'':>16}" for c in columns))
        for metric, title in (("aupr", "AUPR"), ("f1_max", "F1-max"), ("pixel_auroc", "pixel AUROC"), ("pro", "PRO")):
            if metric in rows["icas"][columns[0]]:
                lines.append(f"{title}, %")
                lines += [f"  {m:<20}" + "".join(f"{r[c].get(metric, math.nan):>9.1f}       " for c in columns) for m, r in rows.items()]
        for what, title in (("false positives", "good parts that icas calls bad"), ("found", "bad parts that icas calls bad")):
            lines.append(f"{title}, %, at a false positive rate of")
            lines += [f"  {f'{100 * rate:g} %':<20}" + "".join(f"{rows['icas'][c][f'{what} at {rate:g}']:>9.1f}       " for c in columns)
                      for rate in RATES]
        return "\n".join(lines)
    types = list(rows["icas"]["iou"])
    extra = [k for k in ("shots", "clicks") if len(rows["icas"].get(k, {})) > 1]
    lines = [f"{'mean IoU, %':<22}{'mean':>7}{'± seeds':>8}" + "".join(f"{t[:11]:>12}" for t in types)
             + f"{'FB-IoU':>9}{'an image':>9}{'with good':>10}" + "".join(f"{n + ' ' + k:>10}" for k in extra for n in rows["icas"][k])]
    for method, r in rows.items():
        good = f"{r['iou_with_good']:>10.1f}" if r["iou_with_good"] is not None else f"{'':>10}"
        lines.append(f"{method:<22}{r['mean_iou']:>7.1f}{r['std']:>8.1f}" + "".join(f"{r['iou'][t]:>12.1f}" for t in types)
                     + f"{r['fb_iou']:>9.1f}{r['image_iou']:>9.1f}" + good + "".join(f"{v:>10.1f}" for k in extra for v in r[k].values()))
    best = max(rows[m]["mean_iou"] for m in PEERS[task])
    lines.append(f"icas / best training-free: {rows['icas']['mean_iou'] / best:.2f}" if best else "no training-free method finds anything; "
                 "without a marked defect they have nothing to compare with, and the rows S_s are S_n")
    return "\n".join(lines + ([PAPER["semantic"]] if task == "semantic" else []))


@torch.inference_mode()
def figures(folder: Path, task: str, model: icas.ICAS, store: Store, episodes: Sequence[dict], details: Sequence[dict], name: str,
            switches: dict) -> list[Path]:
    """Pictures of one category: worst, middling and best images (segmentation), or ROC curves and worst images (detection)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    folder.mkdir(parents=True, exist_ok=True)
    made = []

    def keep(figure, title: str) -> None:
        path = folder / f"{name}_{title}.png"
        figure.savefig(path, dpi=110, bbox_inches="tight")
        plt.close(figure)
        made.append(path)

    def outline(axis, mask: np.ndarray, colour: str) -> None:
        if mask.any() and not mask.all():
            axis.contour(mask, levels=[0.5], colors=colour, linewidths=1.2)

    if task in ("semantic", "interactive"):
        first = {}
        for e, d in zip(episodes, details):
            first.setdefault(e["label"], (e, d))
        for label, (e, counts) in first.items():
            ious = sorted((counts["icas", n][0] / max(1, counts["icas", n][1]), n) for n in e["tests"])
            picks = dict.fromkeys([*ious[:3], *ious[len(ious) // 2:len(ious) // 2 + 2], *ious[-2:]])
            figure, axes = plt.subplots(1, len(picks) + 1, figsize=(2.6 * (len(picks) + 1), 3), squeeze=False)
            clicked = "clicks" in e
            shown = None if clicked else show(model, store.shown(e))
            first_name = (e.get("prompts") or e.get("normals") or e["tests"])[0]
            axes[0, 0].imshow(store.pixels(first_name).numpy())
            outline(axes[0, 0], store.truth(first_name, label), "red")
            axes[0, 0].set_title("prompt" if not clicked else "truth", fontsize=8)
            for axis, (value, n) in zip(axes[0, 1:], picks):
                tiles, truth = store.tiles(n), store.truth(n, label)
                axis.imshow(store.pixels(n).numpy())
                if clicked:
                    points, signs = clicks_on(truth, e["clicks"], e["seed"], n, label, e["clicks"])
                    for (x, y), sign in zip(points, signs):
                        axis.plot(x, y, "*" if sign else "x", color="lime" if sign else "orange", markersize=7)
                    found = clicked_maps(model, tiles, (points, signs), truth.shape, switches)["icas"] > 0
                else:
                    found = segmentation_maps(model, tiles, shown, truth.shape, switches)["icas"] > 0
                outline(axis, truth, "white")
                outline(axis, found, "deepskyblue")
                axis.set_title(f"IoU {100 * value:.0f}", fontsize=8)
            for axis in axes[0]:
                axis.axis("off")
            order = "worst three, two in the middle, best two"
            figure.suptitle(f"{name}, {label}: red = prompt, white = truth, blue = found; {order}", fontsize=8)
            keep(figure, label.replace(" ", "_").replace("/", "_"))
        e = episodes[0]
        tile = store.tiles(e["tests"][0])[0]   # Fig. 5: where greedy query selection looks
        tokens = model.tokens(tile.features.maps)[model.middle]
        h0, w0 = tile.features.maps.shape[-2:]
        picked = icas.greedy_queries(tokens, min(model.config.queries, tokens.shape[1]))[0].cpu().numpy()
        y0, y1, x0, x1 = tile.box
        figure, axis = plt.subplots(figsize=(4, 4))
        axis.imshow(store.pixels(e["tests"][0]).numpy())
        axis.scatter(x0 + (picked % w0 + 0.5) * (x1 - x0) / w0, y0 + (picked // w0 + 0.5) * (y1 - y0) / h0, s=9, c="cyan",
                     edgecolors="black", linewidths=0.4)
        axis.axis("off")
        axis.set_title("greedy query selection", fontsize=8)
        keep(figure, "gqs")
        return made
    last = len(episodes) - 1
    e, found = episodes[last], details[last]
    truth = [int(store.records[n]["bad"]) for n in e["tests"]]
    figure, axis = plt.subplots(figsize=(4, 4))
    for method in (m for m in ("icas", *PEERS[task]) if (m, e["tests"][0]) in found):
        fpr, tpr, _ = roc_curve(truth, [found[method, n]["score"] for n in e["tests"]])
        axis.plot(fpr, tpr, label=method)
    axis.set(xlabel="false positive rate", ylabel="true positive rate", title=f"{name}, seed {e['seed']}, {e['shots']} good parts")
    axis.legend(fontsize=7)
    keep(figure, "roc")
    order = sorted(e["tests"], key=lambda n: found["icas", n]["score"])
    worst = [n for n in order if store.records[n]["bad"]][:5] + [n for n in reversed(order) if not store.records[n]["bad"]][:5]
    figure, axes = plt.subplots(2, 5, figsize=(13, 5.6))
    for axis, n in zip(axes.flat, worst):
        axis.imshow(store.pixels(n).numpy())
        if store.records[n]["bad"]:
            outline(axis, store.truth(n), "white")
        axis.set_title(f"{'bad' if store.records[n]['bad'] else 'good'}, score {found['icas', n]['score']:.3f}", fontsize=8)
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle(f"{name}: bad parts with the lowest scores, good parts with the highest", fontsize=9)
    keep(figure, "worst")
    return made


def false_positives(folder: Path, results: dict) -> list[Path]:
    """One picture: the false positive rate that was asked for against the one that was observed, a panel a category."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 4), squeeze=False, layout="constrained")
    for axis, (name, rows) in zip(axes[0], results.items()):
        for column, row in rows["icas"].items():
            axis.plot(RATES, [row[f"false positives at {rate:g}"] / 100 for rate in RATES], marker="o",
                      label=f"{column} good part{'' if column == '1' else 's'}" if column.isdigit() else column)
        axis.plot(RATES, RATES, color="grey", linestyle=":", label="as asked")
        axis.set(xlabel="false positive rate asked for", ylabel="observed on good parts", title=name)
        axis.legend(fontsize=7)
    path = folder / "false_positives.png"
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return [path]


def write_page(path: Path, task: str, text: str, pictures: Sequence[Path]) -> None:
    """One HTML page with the tables and the pictures."""
    import html
    images = "\n".join(f'<figure><img src="{os.path.relpath(p, path.parent)}" loading="lazy"><figcaption>{html.escape(p.stem)}'
                       "</figcaption></figure>" for p in pictures)
    path.write_text(f"""<!doctype html><meta charset="utf-8"><title>icas, {task}</title>
<style>body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #222; background: #fff }}
pre {{ background: #f4f5f7; padding: 1rem; overflow-x: auto; border-radius: 6px }} figure {{ margin: 1.5rem 0 }}
img {{ max-width: 100%; border-radius: 4px }} figcaption {{ color: #666; font-size: 13px }}</style>
<h1>icas: {task}</h1><pre>{html.escape(text)}</pre>{images}""", encoding="utf-8")


# ---- Command line --------------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["semantic", "interactive", "fewshot", "openset", "speed"])
    parser.add_argument("--out", required=True, help="folder for results.json, tables.txt and parts/")
    group = parser.add_argument_group("data and protocol")
    group.add_argument("--data", nargs="+", default=[], metavar="DATA", help="manifest, folder, or elpv")
    group.add_argument("--replay", metavar="FILE", help="results.json of another run: its task, data and episodes")
    group.add_argument("--seeds", type=int, default=5, help="draws of prompts (default 5)")
    group.add_argument("--shots", type=int, nargs="+", help="marked prompts (semantic, default 1) or good parts (fewshot, default 1 2 4 8)")
    group.add_argument("--clicks", type=int, nargs="+", default=[1, 3, 5], help="positive clicks, and as many negative (default 1 3 5)")
    group.add_argument("--prompt", choices=["anomaly", "normal", "both"], default="anomaly", help="semantic: what is shown (Table 9)")
    group.add_argument("--normals", type=int, help="good parts beside the anomaly (default: semantic 1, openset 8)")
    group.add_argument("--good", action=argparse.BooleanOptionalAction, default=True, help="semantic: score the good images too")
    group.add_argument("--strips", type=int, default=1, help="cut images into so many strips (KolektorSDD few-shot: 3)")
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="checkpoint (default: the shipped one)")
    group.add_argument("--encoder", choices=[n + r for n in icas.ENCODERS for r in ("", "-reg")],
                       help="speed only: the paper's shapes on this encoder with random weights, in place of a checkpoint")
    group.add_argument("--sam", action=argparse.BooleanOptionalAction, default=True, help="speed: time SAM ViT-H too (needs transformers)")
    group.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True,
                       help="fewshot, openset: the training-free methods too; without them many good parts take minutes, not hours")
    group.add_argument("--batch-size", type=int, default=8, help="images encoded at once on a GPU (default 8; on a CPU one by one)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default auto)")
    group = parser.add_argument_group("switches of the method (Tables 7, 12, and METHOD's readings)")
    group.add_argument("--mfm", action=argparse.BooleanOptionalAction, default=True, help="mask-level feature matching")
    group.add_argument("--gqs", action=argparse.BooleanOptionalAction, default=True, help="greedy query selection")
    group.add_argument("--turns", action=argparse.BooleanOptionalAction, help="show all prompts in eight flips and quarter turns, or as they "
                       "lie (default: marked ones in eight, good parts in four)")
    group.add_argument("--queries", type=int, help="K, content queries (default: the checkpoint's)")
    group.add_argument("--debias", type=int, help="positional directions projected out (default: the checkpoint's; 0: none)")
    group.add_argument("--ablation", action="store_true", help="fewshot, openset: the decoder's S_n and S_n^mfm too, alone and as a factor")
    group.add_argument("--plain-sum", action="store_true", help="the paper's unnormalised S + S^mfm in place of the fused score")
    parser.add_argument("--figures", metavar="DIR", help="write pictures and DIR/index.html")
    return parser


def start(args: argparse.Namespace) -> tuple[icas.ICAS, str]:
    """The model with the switches set, and the checkpoint's path."""
    import dataclasses
    if args.encoder:
        return icas.ICAS(icas.Config(encoder=args.encoder)).to(icas._device(args.device)).eval().requires_grad_(False), ""
    path = args.model or icas._shipped_path()
    model = icas.load(path, device=args.device)
    changed = {"queries": args.queries, "debias": args.debias, "plain_sum": args.plain_sum or None}
    changed = {k: v for k, v in changed.items() if v is not None}
    if "queries" in changed and model.config.learned_queries:
        raise ValueError("--queries: this checkpoint has learned queries; their number is fixed")
    model.config = model.decoder.config = dataclasses.replace(model.config, **changed)
    return model, path


@torch.inference_mode()
def run_category(task: str, model: icas.ICAS, records: list[dict], episodes: list[dict], switches: dict, name: str,
                 pictures: Path | None, batch_size: int, turns: bool | None) -> tuple[dict, list[Path]]:
    """Rows of one category, and its pictures."""
    store, masks = Store(model, records, batch_size, turns), any(r["shows"] for r in records)
    scored, details, last = [], [], {}
    for e in tqdm(episodes, desc=f"{task} {name}", disable=not sys.stderr.isatty() or rank() > 0):
        if task in ("semantic", "interactive"):
            found = gather(score_segmentation(model, store, e, switches))
            scored.append((e, iou_metrics(found, e)))
        else:
            shown = {k: e.get(k) for k in ("normals", "prompts", "label")}
            if last != shown or not set(e["tests"]) <= {n for _, n in found}:   # open-set: the hard tests are some of the general ones
                found, last = gather(score_detection(model, store, e, masks, switches)), shown
            scored.append((e, detection_metrics(found, e, store, masks)))
        details.append(found if pictures else {})
    rows = (summarise_segmentation if task in ("semantic", "interactive") else summarise_detection)(scored)
    made = figures(pictures, task, model, store, episodes, details, name, switches) if pictures and rank() == 0 else []
    return rows, made


def rounded(value):
    """Floats to ten digits: sums over ranks differ in the last bit."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.10g}") if isinstance(value, float) else value


def run(args: argparse.Namespace) -> int:
    out, began = Path(args.out), time.time()
    replayed = None
    if args.replay:
        replayed = json.loads(Path(args.replay).read_text())
        args.task, args.data, args.strips = replayed["task"], args.data or replayed["arguments"]["data"], replayed["arguments"]["strips"]
    model, path = start(args)
    machine = {"device": str(model.device), "bf16": icas.fast_bf16(model.device), "threads": torch.get_num_threads(),
               "cores": os.cpu_count()}
    if args.task == "speed":
        record = speed(model, args.sam) | machine
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(record, indent=1))
        print(json.dumps(record))
        return 0
    categories = {}
    for source in args.data:
        for category, records in read_source(source, args.strips).items():
            if category in categories:
                raise ValueError(f"--data: category {category!r} comes twice, the second time from {source!r}")
            categories[category] = records
    segmenting = args.task in ("semantic", "interactive")
    switches = {"mfm": args.mfm, "gqs": args.gqs} if segmenting else {"ablation": args.ablation, "peers": args.peers}
    checkpoint, results, pictures, plans = icas._sha256(path) if path else "", {}, [], {}
    for name, records in categories.items():
        look(records)
        empty = sum("mask" in r and not r["shows"] for r in records)
        if rank() == 0:
            kinds = sorted({t for r in records for t in r["shows"]})
            print(f"{name}: {len(records)} images, {sum(not r['bad'] for r in records)} good, {sum(r['bad'] for r in records)} bad"
                  + (": " + ", ".join(f"{sum(t in r['shows'] for r in records)} {t}" for t in kinds) if kinds else "")
                  + (f"; {empty} masks are empty: counted as good" if empty else ""), file=sys.stderr)
        plans[name] = replayed["episodes"][name] if replayed else plan(args.task, records, args)
        check(plans[name], records)
    for name, records in categories.items():
        chosen = {k: v for k, v in vars(args).items() if k in ("turns", "queries", "debias", "plain_sum", "strips")} | switches
        key = json.dumps([args.task, plans[name], chosen, args.figures, checkpoint, icas.__version__, icas._sha256(icas.__file__)],
                         sort_keys=True)
        part = out / "parts" / f"{args.task}-{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if part.is_file():
            kept = json.loads(part.read_text())
            results[name], made = kept["rows"], [Path(p) for p in kept["pictures"]]
        else:
            folder = Path(args.figures) if args.figures else None
            results[name], made = run_category(args.task, model, records, plans[name], switches, name, folder, args.batch_size, args.turns)
            if rank() == 0:
                part.parent.mkdir(parents=True, exist_ok=True)
                whole = part.with_suffix(".part")
                whole.write_text(json.dumps({"rows": results[name], "pictures": [str(p) for p in made]}))
                whole.replace(part)
        pictures += made
    if rank():
        return 0
    first = next(iter(results.values()))
    if segmenting:
        row = lambda m: {"mean_iou": float(np.mean([r[m]["mean_iou"] for r in results.values()])), "iou": first[m]["iou"]}  # noqa: E731
        head = row("icas") | {"baselines": {m: row(m) for m in PEERS[args.task]}}
    else:
        mean = lambda m: {c: float(np.mean([r[m][c]["image_auroc"] for r in results.values() if c in r[m]]))  # noqa: E731
                          for c in first[m]}
        head = {"image_auroc": mean("icas"), "baselines": {m: {"image_auroc": mean(m)} for m in PEERS[args.task] if m in first}}
    text = "\n\n".join(f"{name}\n{table(args.task, name, rows)}" for name, rows in results.items())
    record = rounded(head | {"task": args.task, "data": results, "episodes": plans}) | {
        "arguments": vars(args), "checkpoint_sha256": checkpoint, "seconds": round(time.time() - began),
        "versions": {"icas": icas.__version__, "torch": torch.__version__, "python": platform.python_version()}} | machine
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(record, indent=1))
    (out / "tables.txt").write_text(text + "\n")
    if args.figures:
        pictures += false_positives(Path(args.figures), results) if not segmenting else []
        write_page(Path(args.figures) / "index.html", args.task, text, pictures)
    print(text)
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = parser()
    args = arguments.parse_args(argv)
    if not args.task and not args.replay:
        arguments.error("--task or --replay is needed")
    if not args.replay and (args.task == "speed") == bool(args.data):
        arguments.error("--data: speed takes none, every other task at least one")
    started = "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized()
    if started:
        dist.init_process_group("gloo")
    try:
        return run(args)
    except (ValueError, TypeError, FileNotFoundError, json.JSONDecodeError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    finally:
        if started:
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
