"""Who prompts and who is tested: the episodes of the paper's protocols, drawn by seed alone."""
from __future__ import annotations

import os
import sys
import zlib
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Sequence

import numpy as np
from scipy import ndimage

import icas

from .common import cuts, size
from .manifest import in_box, named, read_labels, read_manifest, read_pixels

KEPT = 800   # images that a `Store` keeps encoded, with ViT-S 12 MB each; for tiny marks 33 MB
GENERIC = ("bsds500", "camvid", "ccp", "dsb2018", "voc")   # photographs without defects


def development_sources(given: Sequence[str]) -> list[str]:
    """The manifests, by default those of ../shared/data, that choices may look at: no test set."""
    root = Path(__file__).resolve().parents[2] / "shared" / "data"
    paths = given or [str(p.parent) for p in sorted(root.glob("*/manifest.jsonl"))]
    seen = [p for p in paths if Path(p).name not in GENERIC
            and "test" not in {r.get("split", "test") for r in read_manifest(p)}]
    if not seen:
        raise ValueError("--data: no manifest of dev or train pictures alone; give one")
    return seen


def read_sources(sources: Sequence[str], strips: int = 1, loud: bool = True) -> dict[str, list]:
    """`read_source` of several; no category may come twice."""
    found: dict[str, list[dict]] = {}
    for source in sources:
        for category, records in read_source(source, strips).items():
            if category in found:
                raise ValueError(f"--data: category {category!r} comes twice, again in {source!r}")
            found[category] = records
            empty = sum("mask" in r and not r["bad"] for r in records)
            if loud:
                print(f"{category}: {len(records)} images, {sum(r['bad'] for r in records)} bad"
                      + f"; {empty} masks are empty: counted as good" * (empty > 0),
                      file=sys.stderr)
    return found


def read_source(source: str, strips: int = 1) -> dict[str, list[dict]]:
    """Category -> its records, sorted by name, with absolute paths.

    source  a manifest or a folder that holds one, a folder in the MVTec AD layout, a flat good/
            bad/ mask/ folder, or "elpv". A record gets "name" (relative to the source), "split",
            "group", "labels", "shows" {label: value} as its mask really shows, and "bad".
    strips  cuts every image into so many equal parts along its longer side.
    """
    path = Path(source)
    if path.is_file() or (path / "manifest.jsonl").is_file():
        root, records = (path.parent if path.is_file() else path), read_manifest(path)
        default = root.resolve().name
    elif source == "elpv":
        from . import elpv as reader
        records, root, default = list(reader.records()), None, "elpv"
    elif path.is_dir():
        from . import folder as reader
        records, root, default = list(reader.records(path)), path, path.resolve().name
    else:
        raise FileNotFoundError(f"--data: no manifest or folder at {source!r}; or give 'elpv'")
    root = root or Path(os.path.commonpath([r["image"] for r in records]))
    categories: dict[str, list[dict]] = {}
    for record in records:
        name = Path(os.path.relpath(record["image"], root)).as_posix()
        name += "#{}-{}".format(*record["box"][:2]) if "box" in record else ""
        for cut in strips_of(record, strips, name):
            whole = {"split": "test", "group": name, "labels": {}} | record | cut
            category = categories.setdefault(record.get("category") or default, [])
            category.append(whole | shown(whole))
    for category, found in categories.items():
        (name, count), = Counter(names(found)).most_common(1)
        if count > 1:
            raise ValueError(f"--data: {source!r} has {name!r} of {category!r} in two records; "
                             "give an image one, with all that is marked on it")
    return {c: sorted(categories[c], key=lambda r: r["name"]) for c in sorted(categories)}


def strips_of(record: dict, strips: int, name: str) -> list[dict]:
    """What sets the equal parts of an image, or of its box, apart: name and box."""
    if strips == 1:
        return [{"name": name}]
    h, w = size(Path(record["image"]))
    x0, y0, x1, y1 = record.get("box", [0, 0, w, h])
    return [{"name": f"{name}#{i}", "box": [x0 + a, y0 + b, x0 + c, y0 + d]}
            for i, (a, b, c, d) in enumerate(cuts(y1 - y0, x1 - x0, strips))]


def shown(record: dict) -> dict:
    """What a record's mask really shows: {"shows": {label: value}, "bad": bool}."""
    labels, names = read_labels(record), named(record)
    present = set() if labels is None else set(np.unique(in_box(record, labels)).tolist()) - {0}
    return {"shows": {names.get(str(v), f"label {v}"): int(v) for v in sorted(present)},
            "bad": bool(present) or bool(record.get("anomalous"))}


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


def names(records: Sequence[dict]) -> list[str]:
    return [r["name"] for r in records]


def unseen(records: Sequence[dict], prompts: Sequence[dict]) -> list[str]:
    """Names of the records that show no physical item of the prompts."""
    seen = {p["group"] for p in prompts}
    return [r["name"] for r in records if r["group"] not in seen]


def split_normals(records: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """Good records for prompts and for tests: the manifest's split, or 75 to 25 by group."""
    good = [r for r in records if not r["bad"]]
    train = [r for r in good if r["split"] == "train"]
    if not train or len(train) == len(good):
        groups = sorted({r["group"] for r in good})
        order = stream("split").permutation(len(groups))
        kept = {groups[i] for i in order[:round(0.75 * len(groups))]}
        train = [r for r in good if r["group"] in kept]
    chosen = {r["name"] for r in train}
    return train, [r for r in good if r["name"] not in chosen]


def plan(task: str, records: Sequence[dict], seeds: int = 5, shots: Sequence[int] | None = None,
         clicks: Sequence[int] = (1, 3, 5), prompt: str = "anomaly", normals: int | None = None,
         good: bool = True) -> list[dict]:
    """Episodes of one category, all by name: {"seed", "shots", "prompts", "normals", "tests", ...}.

    semantic     a random marked image (`shots` of them) of each label; tests: the label's others,
                 and with `good` the good images apart. prompt: "anomaly", "normal" or "both".
    interactive  `clicks` on each image itself.
    fewshot      k of the good images for prompts; tests: held good ones and all bad ones. With
                 k = 0 all images are tests, and compared with each other.
    openset      `normals` good images and one bad one, whose label is left out in "hard" (AHL).
    """
    if task == "development":
        return plan_development(records)
    if task in ("fewshot", "openset"):
        return plan_detection(task, records, seeds, shots, normals)
    episodes, plain = [], [r for r in records if not r["bad"]]
    for seed in range(seeds):
        for label in sorted({label for r in records for label in r["shows"]}):
            marked = [r for r in records if label in r["shows"]]
            if task == "interactive":
                episodes += [{"seed": seed, "label": label, "clicks": n, "tests": names(marked)}
                             for n in clicks]
                continue
            for count in shots or [1]:
                first = draw(marked, count, seed, label, "prompt")
                second = []
                if prompt != "anomaly":
                    second = draw(plain, normals or 1, seed, label, "normal")
                    if len(second) < (normals or 1):
                        raise ValueError(f"--normals: {len(second)} good items for {normals or 1} "
                                         "prompts; ask for fewer")
                tests, others = unseen(marked, first + second), unseen(plain, first + second)
                if len(first) < count or not tests:
                    print(f"{label!r}: {len({r['group'] for r in marked})} items, too few for "
                          f"{count} prompts and a test: left out", file=sys.stderr)
                    continue
                episodes.append({"seed": seed, "label": label, "shots": count, "tests": tests,
                                 "prompts": names(first) if prompt != "normal" else [],
                                 "normals": names(second), "good": others if good else []})
    if not episodes:
        raise ValueError("--data: no defect type is marked in two images of different items; "
                         "nothing can be evaluated")
    return episodes


def plan_detection(task: str, records: Sequence[dict], seeds: int, shots: Sequence[int] | None,
                   normals: int | None) -> list[dict]:
    train, held = split_normals(records)
    bad = [r for r in records if r["bad"]]
    test = held + ([r for r in bad if r["split"] != "train"] or bad)
    if not train or len({r["bad"] for r in test}) < 2:
        bad_ones = sum(r["bad"] for r in test)
        raise ValueError(f"--data: {task} needs good images for prompts and both good and bad ones "
                         f"for the test; got {len(train)} for prompts, {len(test) - bad_ones} good "
                         f"and {bad_ones} bad; AUROC is undefined")
    episodes = []
    for seed in range(seeds):
        if task == "fewshot":
            order = draw(train, max(shots or [8]), seed, "normals")
            for k in shots or [1, 2, 4, 8]:
                if len(order) < k:
                    raise ValueError(f"--shots {k}: only {len(order)} good items for prompts; ask "
                                     "for fewer")
                shown = order[:k]
                episodes.append({"seed": seed, "shots": k, "normals": names(shown),
                                 "tests": unseen(test, shown) if shown else names(records)})
            continue
        shown = draw(train, normals or 8, seed, "normals")
        kinds = sorted({label for r in records for label in r["shows"]}) or ["anomalous"]
        kind = kinds[stream(seed, "kind").integers(len(kinds))]
        of_kind = [r for r in bad if kind in r["shows"] or not r["shows"]]
        prompts = draw(of_kind, 1, seed, "anomaly")
        for setting in ("general", "hard") if len(kinds) > 1 else ("general",):
            left = [r for r in test if setting == "general" or not r["bad"] or r not in of_kind]
            episodes.append({"seed": seed, "setting": setting, "label": kind, "shots": len(shown),
                             "prompts": names(prompts), "normals": names(shown),
                             "tests": unseen(left, prompts + shown)})
    return episodes


def plan_development(records: Sequence[dict]) -> list[dict]:
    """What the development table measures: of a dev set segmentation of all images in 3 draws, and
    detection with 1, 4 and 8 good parts if there are as many in 5, without peers; of a training set
    1 draw of up to 3 labels with 12 + 12 tests, without peers."""
    if not any(r["split"] == "dev" for r in records):
        few = plan("semantic", records, seeds=1)[:3]
        return [e | {"peers": False} | {k: icas.evenly(e[k], 12) for k in ("tests", "good")}
                for e in few]
    train, held = split_normals(records)
    shots = [k for k in (1, 4, 8) if k <= len({r["group"] for r in train})] if held else []
    good = plan("fewshot", records, seeds=5, shots=shots) if shots else []
    return plan("semantic", records, seeds=3) + [e | {"peers": False} for e in good]


class Store:
    """The images of one category by name, as episodes show them, each encoded once, on demand."""

    def __init__(self, model: icas.ICAS, records: Sequence[dict], turns: bool | None = None):
        self.model, self.turns, self.records = model, turns, {r["name"]: r for r in records}
        for name in ("labels", "image", "good"):
            setattr(self, name, lru_cache(KEPT)(getattr(self, name)))

    def forget(self) -> None:   # a cache of its own methods keeps a store alive
        for known in (self.image, self.good, self.labels):
            known.cache_clear()

    def image(self, name: str) -> icas.EncodedImage:
        return icas.encode_image(self.pixels(name), model=self.model)

    def good(self, name: str) -> icas.References:
        return icas.encode([], [self.pixels(name)], turns=self.turns, model=self.model)

    def shown(self, episode: dict) -> icas.Prepared | None:
        """What an episode shows on other images; `detect` is not shown the marked ones."""
        if "clicks" in episode:
            return None
        if not segments(episode) and not episode["normals"]:
            return icas.mutual(list(map(self.pixels, episode["tests"])), model=self.model)
        label, prompts = episode.get("label"), episode["prompts"] if segments(episode) else []
        marked = [(self.pixels(n), self.truth(n, label), label) for n in prompts]
        shown = icas.encode(marked, turns=self.turns, model=self.model)
        return icas.prepare(sum(map(self.good, episode["normals"]), shown), model=self.model)

    def pixels(self, name: str) -> np.ndarray:
        """(H, W, 3) uint8."""
        return read_pixels(self.records[name])[0].numpy()

    def labels(self, name: str) -> np.ndarray:
        """(H, W) uint8."""
        return read_pixels(self.records[name])[1].numpy()

    def truth(self, name: str, label: str | None = None) -> np.ndarray:
        """(H, W) bool: where a label is marked, or any."""
        value = self.records[name]["shows"].get(label, -1)
        return self.labels(name) > 0 if label is None else self.labels(name) == value

    def clicks(self, name: str, episode: dict) -> dict[str, list]:
        """`points` and `point_labels` of an interactive episode on one image; else {}."""
        if "clicks" not in episode:
            return {}
        count, label, seed = (episode[k] for k in ("clicks", "label", "seed"))
        points, labels = clicks_on(self.truth(name, label), count, seed, name, label, count)
        return {"points": points, "point_labels": labels}


def clicks_on(truth: np.ndarray, count: int, *key) -> tuple[list, list]:
    """`count` positive (x, y) clicks, uniform over (H, W) bool truth eroded by a pixel, as many
    negative ones, uniform over the rest, and their labels."""
    rng, inner, points = stream(*key), ndimage.binary_erosion(truth), []
    for side in (inner if inner.any() else truth, ~truth):
        points += points_in(side, count, rng)
    return points, [1] * count + [0] * (len(points) - count)


def points_in(inside: np.ndarray, count: int, rng: np.random.Generator) -> list:
    """`count` random (x, y) of the pixels of (H, W) bool; none where it is empty."""
    y, x = np.nonzero(inside)
    chosen = rng.integers(len(y), size=count) if len(y) else []
    return [(float(x[i]), float(y[i])) for i in chosen]


def segments(episode: dict) -> bool:
    """Whether an episode asks for the pixels of a label, not for which images are bad."""
    return "label" in episode and "setting" not in episode


def check(episodes: Sequence[dict], records: Sequence[dict]) -> None:
    """Raise ValueError for episodes that leak or cannot be scored, also replayed ones."""
    if not episodes:
        raise ValueError("--replay: that run had no episodes of this data")
    known = {r["name"]: r for r in records}
    for e in episodes:
        where = f"episode seed {e['seed']}, {e.get('label', 'normals')}"
        keys = ("prompts", "normals", "tests", "good")
        missing = [n for key in keys for n in e.get(key, []) if n not in known]
        if missing:
            raise ValueError(f"{where}: {missing[0]!r} is not in the data")
        shown = {known[n]["group"] for key in keys[:2] for n in e.get(key, [])}
        leak = [n for key in keys[2:] for n in e.get(key, []) if known[n]["group"] in shown]
        if leak:
            raise ValueError(f"{where}: test {leak[0]!r} shows the same item as a prompt (group "
                             f"{known[leak[0]]['group']!r}): a leak")
        if not e["tests"]:
            raise ValueError(f"{where}: no test image")
        bad = [n for n in e.get("normals", []) if known[n]["bad"]]
        if bad:
            raise ValueError(f"{where}: {bad[0]!r} is a bad part but is given as a good one")
        unmarked = [n for n in e.get("prompts", []) if e["label"] not in known[n]["shows"]]
        if unmarked and segments(e):
            raise ValueError(f"{where}: the mask of prompt {unmarked[0]!r} is empty or shows "
                             "another label")
        if not segments(e) and len({known[n]["bad"] for n in e["tests"]}) < 2:
            kind = "bad" if known[e["tests"][0]]["bad"] else "good"
            raise ValueError(f"{where}: all tests are {kind}: AUROC is undefined")
