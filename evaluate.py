#!/usr/bin/env python3
"""The paper's benchmarks and the development table, through icas' public functions.

    python evaluate.py --task development --out runs/dev                 # what choices read
    python evaluate.py --task semantic --data DIR/set --out runs/a       # Tables 1, 6, 10
    python evaluate.py --task fewshot --data elpv --out runs/b           # Table 3; 4: openset
    python evaluate.py --task speed --out runs/c                         # Table 14
    python evaluate.py --replay runs/a/results.json --out runs/again     # the same episodes
    torchrun --nproc-per-node 2 evaluate.py ...                          # the same figures, faster

--data takes manifests or folders that hold one, folders in the MVTec AD layout, flat good/ bad/
mask/ folders, "elpv". Episodes are checked for leaks before any is scored. OUT/results.json keeps
figures, in percent, episodes, arguments and versions; OUT/parts what is finished, to go on.
"""
from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
import timeit
from pathlib import Path
from typing import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from scipy import ndimage
from sklearn.metrics import (auc, average_precision_score, precision_recall_curve,
                             roc_auc_score)

import icas
from data_prep.episodes import (KEPT, Store, check, development_sources, plan, read_sources,
                                segments)
from data_prep.peers import PEERS, peer_scores
from data_prep.views import rank, ranks, world

RATES = (0.01, 0.05, icas.RATE, 0.2)   # false positive rates asked of `detect`, with its own


def find(store: Store, name: str, episode: dict, ready: icas.Prepared | None):
    """icas' Segmentation of a test image, or its Detection, with parts."""
    image, clicks = store.image(name), store.clicks(name, episode)
    return (icas.segment(image, ready, **clicks, parts=True, model=store.model)
            if segments(episode) else icas.detect(image, ready, parts=True))


# ---- Metrics -------------------------------------------------------------------------------------

def sortable(values: np.ndarray) -> np.ndarray:
    """float -> uint16 in the order of their float16: exact bins without a range."""
    bits = (values.astype(np.float16) + np.float16(0)).view(np.uint16)   # -0 becomes 0
    return np.where(bits & 0x8000, ~bits, bits | 0x8000)


def pixel_bins(values: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(3, 65536) clean pixels, marked ones, shares of regions by score; values, truth (h, w)."""
    regions, bins = ndimage.label(truth, np.ones((3, 3)))[0][truth], sortable(values)
    every, marked = (np.bincount(b, minlength=1 << 16) for b in (bins.ravel(), bins[truth]))
    shares = np.bincount(bins[truth], 1 / np.bincount(regions)[regions], minlength=1 << 16)
    return np.stack([every - marked, marked, shares])


def score(store: Store, episodes: Sequence[dict], peers: bool) -> list[dict[str, dict]]:
    """Of each episode method -> {"images": {name: [intersection, union, pixels], of a detection the
    score}, "bins": sum of `pixel_bins`, without a segmentation's good images and bad ones without
    a mask}. Each image is encoded once for all of them."""
    own, found = set(list(store.records)[rank()::world()]), [{} for _ in episodes]
    shown = [(set(e["tests"] + e.get("good", [])), e, store.shown(e),
              peer_scores(store, e) if peers and e.get("peers", True) else None) for e in episodes]
    every = sorted(own & set().union(*(names for names, *_ in shown)))
    for name in every if segments(episodes[0]) else icas.progress(every, "images"):
        for methods, (names, *how) in zip(found, shown):
            if name in names:
                add_image(methods, store, name, *how)
        if len(every) > KEPT:   # no other loop over them would find one again
            store.image.cache_clear()
    parts, whole = [found] * world(), [{} for _ in episodes]
    if world() > 1:
        dist.all_gather_object(parts, found)
    for methods, part in (pair for part in parts for pair in zip(whole, part)):
        for method, f in part.items():
            known = methods.setdefault(method, {"images": {}, "bins": 0})
            known |= {"images": known["images"] | f["images"], "bins": known["bins"] + f["bins"]}
    for methods, (_, e, ready, _) in zip(whole, shown):
        if not segments(e):
            methods["icas"]["cuts"] = {r: icas.upper_limit(ready.good.scores, r) for r in RATES}
    return whole


def add_image(found: dict[str, dict], store: Store, name: str, episode: dict,
              ready: icas.Prepared | None, find_peers: Callable | None) -> None:
    """Add what icas, its parts and the peers say of an image to what `score` returns."""
    masks, apart = segments(episode), episode.get("good", [])
    image, result = store.image(name), find(store, name, episode, ready)
    truth = store.truth(name, episode["label"] if masks else None)
    tokens, grid = find_peers(name) if find_peers else {}, image.features.maps.shape[-2:]
    maps = {method: icas.to_shape(x.view(1, *grid).cpu().numpy(), image.shape)[0]
            for method, x in tokens.items()}
    if masks:
        maps = result.parts | maps
        hard = {method: x > 0 for method, x in maps.items()} | {"icas": result.mask}
        entries = {method: [int((x & truth).sum()), int((x | truth).sum()), truth.size]
                   for method, x in hard.items()}
    else:
        if tokens:
            maps["AnomalyDINO recipe"] = ndimage.gaussian_filter(maps["AnomalyDINO recipe"], 4)
        maps["icas"] = result.map
        entries = {"icas": result.score} | result.parts | {
            method: float(x.topk(max(1, round(len(x) * 0.01))).values.mean())   # AnomalyDINO's
            for method, x in tokens.items()}
    record = store.records[name]
    counted = name not in apart and record["bad"] == bool(record["shows"])
    for method, entry in entries.items():
        f = found.setdefault(method, {"images": {}, "bins": np.zeros((3, 1 << 16))})
        f["images"][name] = entry
        if counted and method in maps:
            f["bins"] += pixel_bins(maps[method], truth)


def pixel_metrics(bins: np.ndarray) -> dict[str, float]:
    """AP, AUROC and PRO (the regions' mean covered share, to a false positive rate of 0.3)."""
    clean, marked, shares = np.pad(bins[:, ::-1].cumsum(axis=1), ((0, 0), (1, 0)))
    if not marked[-1] or not clean[-1]:
        return {}
    precision, recall = marked[1:] / np.maximum(marked + clean, 1)[1:], marked / marked[-1]
    rate, covered, limit = clean / clean[-1], shares / shares[-1], 0.3
    low = rate <= limit
    pro = auc(np.r_[rate[low], limit], np.r_[covered[low], np.interp(limit, rate, covered)])
    return {"ap": 100 * float(precision @ np.diff(recall)), "pixel_auroc": 100 * auc(rate, recall),
            "pro": 100 * pro / limit}


def metrics(found: dict, episode: dict, records: dict[str, dict]) -> dict[str, dict]:
    """Method -> pixel metrics, and of a segmentation the IoU pooled over images, that with the good
    ones added, the mean IoU of single ones and what FB-IoU is made of; of a detection image AUROC,
    AUPR, F1-max and what icas' thresholds call bad among the good and among the bad."""
    result = {}
    for method, f in found.items():
        row = result[method] = pixel_metrics(f["bins"])
        entries = np.array([f["images"][n] for n in episode["tests"]])
        if segments(episode):
            both, either, pixels = entries.sum(axis=0).tolist()
            false = sum(f["images"][n][1] for n in episode.get("good", []))
            image_iou = 100 * float((entries[:, 0] / np.maximum(1, entries[:, 1])).mean())
            row |= {"iou": 100 * both / max(1, either),
                    "iou_with_good": 100 * both / max(1, either + false), "image_iou": image_iou,
                    "fb": [both, either, pixels - either, pixels - both]}
        else:
            truth = np.array([records[n]["bad"] for n in episode["tests"]])
            precision, recall, _ = precision_recall_curve(truth, entries)
            f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
            row |= {"image_auroc": 100 * float(roc_auc_score(truth, entries)),
                    "aupr": 100 * float(average_precision_score(truth, entries)),
                    "f1_max": 100 * float(f1.max())}
            for rate, cut in f.get("cuts", {}).items():
                above = 100 * (entries > cut)
                row |= {f"false positives at {rate:g}": float(above[~truth].mean()),
                        f"found at {rate:g}": float(above[truth].mean())}
    return result


def summarise(scored: Sequence[tuple[dict, dict]]) -> dict[str, dict]:
    """(episode, its metrics) each -> method: means, over seeds apart with their spread; mean IoU by
    type and by number of clicks or shots; of detection a row by number of shots, or setting."""
    axis, rows = next(k for k in ("clicks", "setting", "shots") if k in scored[0][0]), {}
    labels, counts = ([*dict.fromkeys(e.get(k) for e, _ in scored)] for k in ("label", axis))

    def mean(method: str, figure: str, **where) -> dict:
        some = [(e["seed"], m[method]) for e, m in scored
                if method in m and where.items() <= e.items()]
        if not some:   # as of peers without good parts, of novelty where most of a prompt is marked
            return {}
        row = {k: np.mean([m[k] for _, m in some], axis=0).tolist() for k in some[0][1]
               if all(k in m for _, m in some)}
        by_seed = [float(np.mean([m[figure] for s, m in some if s == seed]))
                   for seed in sorted({s for s, _ in some})]
        return row | {"std": float(np.std(by_seed)), "seeds": by_seed}
    for method in dict.fromkeys(method for _, found in scored for method in found):
        if segments(scored[0][0]):
            row = mean(method, "iou")
            fb = row.pop("fb")
            rows[method] = {"mean_iou": row.pop("iou")} | row | {
                "fb_iou": 50 * fb[0] / max(1, fb[1]) + 50 * fb[2] / max(1, fb[3]),
                "iou": {n: x["iou"] for n in labels if (x := mean(method, "iou", label=n))},
                axis: {str(n): x["iou"] for n in counts if (x := mean(method, "iou", **{axis: n}))}}
        else:
            rows[method] = {str(n): row for n in counts
                            if (row := mean(method, "image_auroc", **{axis: n}))}
    return rows


def measure(store: Store, episodes: Sequence[dict], peers: bool, log: Path) -> dict[str, dict]:
    """Rows of one category; those of segmentation and of detection are joined. `log` keeps the
    metrics of what is finished, for a run that goes on: of segmentation each episode, of detection
    all together."""
    marked, rest = ([e for e in episodes if segments(e) == kind] for kind in (True, False))
    groups, done, rows = [[e] for e in marked] + [rest] * bool(rest), icas.read_lines(log), {}
    for group in icas.progress(groups[len(done):], log.stem):
        found = score(store, group, peers)
        done += [metrics(f, e, store.records) for f, e in zip(found, group)]
        if rank() == 0:
            icas.write_lines(log, done)
    scored = list(zip(marked + rest, done))
    for some in filter(None, (scored[:len(marked)], scored[len(marked):])):
        for method, row in summarise(some).items():
            rows[method] = rows.get(method, {}) | row
    return rows


def figures(sets: Sequence[dict], method: str, columns: Iterable[str]) -> dict:
    """Means over sets of a method's mean IoU, that with the good images, AP and image AUROC by
    number of good parts, or setting; None: not measured."""
    rows = [found[method] for found in sets if method in found]

    def mean(figure: str, column: str = "") -> float | None:
        found = [row.get(column, {}) if column else row for row in rows]
        found = [row[figure] for row in found if figure in row]
        return float(np.mean(found)) if found else None
    return {"mean_iou": mean("mean_iou"), "mean_iou_with_good": mean("iou_with_good"),
            "ap": mean("ap"), "image_auroc": {n: mean("image_auroc", n) for n in columns}}


# ---- Speed, table, pictures, command line --------------------------------------------------------

@torch.inference_mode()
def speed(model: icas.ICAS, sam: bool) -> dict:
    """Median seconds of `segment` with a prepared prompt of a large and of a small mark, of the
    encoder alone, of SAM's ViT-H."""
    size, device = model.config.image_size, model.device
    image, a = torch.rand(1, 3, size, size, device=device), size // 4
    boxes = (a, a, a + a // 3, 2 * a), (a, a, a + a // 9, a + a // 9)
    large, small = (icas.prepare(icas.encode([(image[0], box)], model=model), model=model)
                    for box in boxes)
    autocast = model.autocast()   # `segment` has its own
    work = {"encoder": autocast(lambda: model.encoder(image, model.config.blocks)[0].sum().item()),
            "segment": lambda: icas.segment(image[0], large),   # .item() waits for a GPU
            "segment, small mark": lambda: icas.segment(image[0], small)}
    modules = {"encoder": model.encoder, "decoder": model.decoder}
    if sam:
        from transformers import SamConfig, SamModel
        vision = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16,
                  "mlp_dim": 5120, "global_attn_indexes": [7, 15, 23, 31]}
        other = modules["SAM"] = SamModel(SamConfig(vision_config=vision)).to(device).eval()
        wide, click = torch.rand(1, 3, 1024, 1024), torch.full((1, 1, 1, 2), 512.0)
        work["SAM"] = autocast(
            lambda: other(wide.to(device), click.to(device)).pred_masks.sum().item())
    # in turn: all see the same load; the first warms up
    rounds = [[timeit.timeit(call, number=1) for call in work.values()] for _ in range(8)]
    seconds = dict(zip(work, np.median(rounds[1:], axis=0).tolist()))
    parameters = {name: sum(p.numel() for p in m.parameters()) for name, m in modules.items()}
    return {"seconds": seconds, "ratio": seconds["segment"] / seconds["encoder"],
            "parameters": parameters, "image_size": size}


def table(rows: dict[str, dict]) -> str:
    """A line a method, of detection one for each number of shots or setting; figures in columns."""
    lines = {}
    for method, row in rows.items():
        for key, part in ({"": row} if "mean_iou" in row else row).items():
            cells = {f"{k} {n}".strip(): v for k, x in part.items()
                     for n, v in (x.items() if isinstance(x, dict) else [("", x)])}
            cells |= {f"ap {n}": own["ap"] for n, own in part.get("sets", {}).items()}
            lines[f"{method} {key}"] = {k: f"{v:.1f}" for k, v in cells.items()
                                        if isinstance(v, float)}
    head = dict.fromkeys(k for cells in lines.values() for k in cells)
    lines = {"": {h: h for h in head}} | lines
    wide = {h: max(5, len(h)) for h in head}
    return "\n".join(f"{name:<24}" + "".join(f"  {cells.get(h, ''):>{wide[h]}}" for h in head)
                     for name, cells in lines.items())


def picture(path: Path, store: Store, episode: dict) -> None:
    """The last test image as it is marked, and as icas marks it."""
    name = episode["tests"][-1]
    x, truth = find(store, name, episode, store.shown(episode)), store.truth(name)
    marks = (0.0 * truth, truth), (x.label_scores.max(axis=0), x.mask, 0, 2 * x.threshold)
    icas.write_image(path, np.hstack([icas.overlay(store.pixels(name), *m) for m in marks]))


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(description=__doc__,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add, switch = whole.add_argument, argparse.BooleanOptionalAction
    one = whole.add_mutually_exclusive_group(required=True).add_argument
    one("--task", choices=["development", "semantic", "interactive", "fewshot", "openset", "speed"])
    one("--replay", metavar="FILE", help="results.json of another run: its task, data, episodes")
    add("--out", required=True, help="folder for results.json, tables.txt and parts/")
    add("--figures", metavar="DIR", help="write pictures and DIR/index.html")
    add("--data", nargs="+", default=[], help="manifests, folders, elpv (development has its own)")
    add("--seeds", type=int, default=5, help="draws of prompts (default 5)")
    add("--shots", type=int, nargs="+", help="marked prompts (1) or good parts (1 2 4 8; 0: none)")
    add("--clicks", type=int, nargs="+", default=[1, 3, 5], help="positive, and as many negative")
    add("--prompt", choices=["anomaly", "normal", "both"], default="anomaly", help="of semantic")
    add("--normals", type=int, help="good parts beside the anomaly (semantic 1, openset 8)")
    add("--good", action=switch, default=True, help="semantic: score the good images too")
    add("--strips", type=int, default=1, help="cut images into so many (KolektorSDD few-shot: 3)")
    add("--turns", action=switch, help="good parts in eight turns, or all prompts as they lie")
    add("--peers", action=switch, default=True, help="the training-free methods beside icas")
    add("--model", metavar="FILE", help="checkpoint (default: the shipped one)")
    add("--encoder", help="file of a DINOv2; of speed also a name, as vitl14: untrained")
    add("--sam", action=switch, default=True, help="speed: SAM ViT-H too (needs transformers)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default auto)")
    add("--config", nargs="+", default=[], metavar="KEY=VALUE", help="of icas.Config, as debias=0")
    return whole


def start(args: argparse.Namespace) -> icas.ICAS:
    """The model with the switches set."""
    if args.task == "speed" and args.encoder and not Path(args.encoder).is_file():
        model = icas.ICAS(icas.Config(encoder=args.encoder)).to(icas.check_device(args.device))
        return model.eval().requires_grad_(False)
    model = icas.load(args.model, encoder=args.encoder, device=args.device)
    changes = {name: json.loads(value) for name, value in (x.split("=", 1) for x in args.config)}
    model.config = model.decoder.config = dataclasses.replace(model.config, **changes)
    return model


def run(args: argparse.Namespace) -> None:
    """Write results.json, tables.txt and figures into OUT."""
    out, began, sets = Path(args.out), time.time(), {}
    if args.replay:
        replayed = json.loads(Path(args.replay).read_text())
        args.task, args.strips = replayed["task"], replayed["arguments"]["strips"]
        args.data = args.data or replayed["arguments"]["data"]
    if args.task == "development":
        args.data = development_sources(args.data)
    model, sources = start(args), read_sources(args.data, args.strips, loud=rank() == 0)
    plans = replayed.get("episodes", {}) if args.replay else {
        name: plan(args.task, records, args.seeds, args.shots, args.clicks, args.prompt,
                   args.normals, args.good) for name, records in sources.items()}
    for name, records in sources.items():
        check(plans.get(name, []), records)
    files = [icas.__file__, __file__, args.model or icas.find_shipped(icas.CHECKPOINT),
             *sorted(Path(__file__).parent.glob("data_prep/*.py"))]
    free = ("out", "replay", "device", "data", "seeds", "figures")   # they change no metric
    fixed = [{k: v for k, v in vars(args).items() if k not in free}, model.kind,
             icas.fast_bf16(model.device), list(map(icas.sha256, files))]
    for name, records in sources.items():
        digest = hashlib.sha256(json.dumps([plans[name], fixed]).encode()).hexdigest()[:16]
        log = out / "parts" / f"{args.task}-{name.replace('/', '_')}-{digest}.jsonl"
        store = Store(model, records, args.turns)
        sets[name] = measure(store, plans[name], args.peers, log)
        drawn = [e for e in plans[name] if args.figures and rank() == 0 and e["seed"] == 0]
        for i, e in enumerate(drawn):
            picture(Path(args.figures) / f"{log.stem} {i}.png", store, e)
        store.forget()
    if rank() > 0:
        return
    methods = dict.fromkeys(method for own in sets.values() for method in own)
    text = "\n\n".join(f"{name}\n{table(own)}" for name, own in sets.items())
    if args.task == "speed":
        text = json.dumps(result := speed(model, args.sam))
    elif args.task == "development":
        dev = [sets[name] for name, r in sources.items() if any(x["split"] == "dev" for x in r)]
        result = {"episodes": plans, "development": {m: figures(dev, m, "148") | {"sets": {
            name: figures([own], m, "148") for name, own in sets.items() if m in own}}
            for m in methods}}
        text = table(result["development"])
    else:
        rows = list(sets.values())
        columns = dict.fromkeys(k for row in rows for k, v in row["icas"].items()
                                if isinstance(v, dict) and "seeds" in v)
        result = figures(rows, "icas", columns) | {"data": sets, "episodes": plans, "baselines": {
            m: figures(rows, m, columns) for m in PEERS if m in methods}}
    versions = {"icas": icas.__version__, "torch": torch.__version__, "python": sys.version}
    result = {"seconds": round(time.time() - began), "task": args.task, "arguments": vars(args),
              "versions": versions, "encoder_sha256": model.encoder_sha256,
              "device": str(model.device), "bf16": icas.fast_bf16(model.device)} | result
    # ten digits: sums over ranks differ in the last bit
    result = json.loads(json.dumps(result), parse_float=lambda x: float(f"{float(x):.10g}"))
    icas.write_text(out / "results.json", json.dumps(result, indent=1))
    icas.write_text(out / "tables.txt", text + "\n")
    if args.figures:
        names = sorted(p.name for p in Path(args.figures).glob("*.png"))
        shown = "".join(f'<p>{name}<br><img src="{name}">' for name in names)
        icas.write_text(Path(args.figures) / "index.html",
                        f"<h1>icas</h1><pre>{text}</pre>{shown}")
    print(text)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 wrong use."""
    arguments = parser()
    args = arguments.parse_args(argv)
    if not args.replay and args.task != "development" and (args.task == "speed") == bool(args.data):
        arguments.error("--data: speed takes none, every other task at least one")
    try:
        with ranks(args.device):
            run(args)
        return 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
