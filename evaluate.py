#!/usr/bin/env python3
"""Evaluate a checkpoint by the semantic protocol (Tables 1, 6, 10), beside training-free baselines on the same features.

    python evaluate.py --task semantic --data DIR/magnetic_tile/manifest.jsonl --seeds 5 --out runs/magnetic_tile
    python evaluate.py --task speed --out runs/speed                           # seconds an image, the shipped model
    python evaluate.py --task speed --encoder vitl14 --out runs/speed          # the paper's shapes, random weights

One random prompt for each (object, defect type) and seed; test on every other image of that type that shows another physical item
(`group`). Intersections and unions are summed over the images of a type at the mask's own resolution; an object is the mean of its
types. DIR/results.json holds the figures, the arguments and the exact lists of files.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import icas
from train import read_manifest, read_record

# Rows of the table: ours, the parts that are fused, and what a user could have without training
METHODS = ("icas", "S_s", "S_s mfm", "relation net", "fisher", "nearest patch", "prototype")
BASELINES = ("nearest patch", "prototype")


def labels_of(records: list[dict], encoded: dict[str, tuple]) -> dict[str, list[dict]]:
    """Defect type -> records whose mask shows it, in file order."""
    types: dict[str, list[dict]] = {}
    for record in records:
        present = set(np.unique(encoded[record["image"]][1]).tolist())
        for value, name in record.get("labels", {}).items():
            if int(value) in present:
                types.setdefault(name, []).append(record)
    return dict(sorted(types.items()))


def predictions(model: icas.ICAS, tiles: list, prompt: icas.Prompt, shape: tuple[int, int], options: dict) -> dict[str, np.ndarray]:
    """(h, w) bool mask of each method for one target."""
    canvas = {m: torch.zeros(shape) for m in METHODS}
    weight = {m: torch.zeros(shape) for m in METHODS}
    for tile in tiles:
        odds, scores, _ = icas._log_odds(model, tile.features, prompt, None, **options)
        maps = (odds, torch.logit(scores.semantic, 1e-4), torch.logit(scores.semantic_mfm, 1e-4), scores.relation, scores.fisher,
                scores.margin, scores.prototype)
        for method, part in zip(METHODS, maps):
            icas._paste(canvas[method], weight[method], part[0], tile.box)
    return {m: (canvas[m] > 0).numpy() for m in METHODS}


@torch.inference_mode()
def semantic(model: icas.ICAS, manifest: str, seeds: int, options: dict) -> dict:
    """Mean IoU of every method on one manifest: {"mean_iou", "iou", "baselines", "seeds", "files"}."""
    records = [r for r in read_manifest(manifest) if "mask" in r]
    encoded = {}
    for record in tqdm(records, desc="encode", disable=not sys.stderr.isatty()):
        image, labels = read_record(record)
        tiles = icas._describe(model, (image * 255).round().byte().permute(1, 2, 0))
        tiles = [t._replace(features=icas.Features(t.features.maps.half(), t.features.small.half())) for t in tiles]
        encoded[record["image"]] = tiles, labels.numpy()
    types = labels_of(records, encoded)
    print(f"{manifest}: {len(records)} marked images, " + ", ".join(f"{n} {t}" for t, n in ((t, len(r)) for t, r in types.items())),
          file=sys.stderr)
    full = lambda t: t._replace(features=icas.Features(*(x.float() for x in t.features)))  # noqa: E731
    iou = {m: {t: [] for t in types} for m in METHODS}
    files = []
    for seed in range(seeds):
        for number, (name, shown) in enumerate(tqdm(types.items(), desc=f"seed {seed}", disable=not sys.stderr.isatty())):
            rng = np.random.default_rng([seed, number])
            chosen = shown[rng.integers(len(shown))]
            tests = [r for r in shown if r["group"] != chosen["group"]]
            if not tests:
                raise ValueError(f"{manifest}: {name!r} has no test image of another group than the prompt's; it cannot be evaluated")
            value = {r["image"]: next(int(v) for v, n in r["labels"].items() if n == name) for r in shown}
            tiles, labels = encoded[chosen["image"]]
            mask = torch.from_numpy(labels == value[chosen["image"]]).float()
            prompt = icas._join(model, icas._shots([full(t) for t in tiles], mask, 1 - mask, name))
            inter, union = {m: 0 for m in METHODS}, {m: 0 for m in METHODS}
            for record in tests:
                tiles, labels = encoded[record["image"]]
                truth = labels == value[record["image"]]
                for method, found in predictions(model, [full(t) for t in tiles], prompt, truth.shape, options).items():
                    inter[method] += int((found & truth).sum())
                    union[method] += int((found | truth).sum())
            for method in METHODS:
                iou[method][name].append(100 * inter[method] / max(1, union[method]))
            files.append({"seed": seed, "label": name, "prompt": Path(chosen["image"]).name, "tests": [Path(r["image"]).name for r in tests]})
    by_type = {m: {t: float(np.mean(v)) for t, v in iou[m].items()} for m in METHODS}
    by_seed = {m: [float(np.mean([iou[m][t][s] for t in types])) for s in range(seeds)] for m in METHODS}
    means = {m: float(np.mean(by_seed[m])) for m in METHODS}
    return {"mean_iou": means["icas"], "std": float(np.std(by_seed["icas"])), "iou": by_type["icas"],
            "baselines": {m: {"mean_iou": means[m], "iou": by_type[m]} for m in BASELINES},
            "parts": {m: {"mean_iou": means[m], "iou": by_type[m]} for m in METHODS if m not in ("icas", *BASELINES)},
            "seeds": by_seed, "files": files}


def speed(model: icas.ICAS, repeats: int = 9) -> dict:
    """Median seconds of `segment` with encoded references, and of the encoder alone, on one square image, in turn."""
    size = model.config.image_size
    image, mask = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8), np.zeros((size, size), bool)
    mask[size // 4:size // 3, size // 4:size // 2] = True
    references, pixels, seconds = icas.encode([(image, mask)], model=model), torch.rand(1, 3, size, size, device=model.device), {}

    def encoder() -> None:
        with torch.inference_mode(), model.autocast():
            model.encoder(pixels, model.config.blocks)[0].sum().item()  # .item() waits for a GPU
    for turn in range(repeats + 1):
        for name, work in (("encoder", encoder), ("segment", lambda: icas.segment(image, references, model=model))):
            start = time.perf_counter()
            work()
            if turn:  # the first warms up
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in (("encoder", model.encoder), ("decoder", model.decoder))}
    return {"seconds": median, "ratio": median["segment"] / median["encoder"], "parameters": count, "image_size": size}


def table(result: dict) -> str:
    """Rows of methods, columns of types, in percent."""
    rows = {"icas": result} | result["parts"] | result["baselines"]
    names = list(result["iou"])
    lines = [f"{'mean IoU, %':<16}{'mean':>8}" + "".join(f"{n[:12]:>13}" for n in names)]
    lines += [f"{m:<16}{r['mean_iou']:>8.1f}" + "".join(f"{r['iou'][n]:>13.1f}" for n in names) for m, r in rows.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["semantic", "speed"], required=True)
    parser.add_argument("--data", nargs="+", default=[], help="manifests, or folders that hold one")
    parser.add_argument("--seeds", type=int, default=5, help="random prompts for each type (default 5)")
    parser.add_argument("--model", help="checkpoint (default: the shipped one)")
    parser.add_argument("--encoder", choices=[n + r for n in icas.ENCODERS for r in ("", "-reg")],
                        help="speed only: the paper's shapes on this encoder with random weights, in place of a checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default auto)")
    parser.add_argument("--mfm", action=argparse.BooleanOptionalAction, default=True, help="mask-level feature matching (Table 7)")
    parser.add_argument("--gqs", action=argparse.BooleanOptionalAction, default=True, help="greedy query selection (Table 7)")
    parser.add_argument("--out", required=True, help="folder for results.json and tables.txt")
    args = parser.parse_args(argv)
    if (args.task == "semantic") != bool(args.data):
        parser.error("--data: semantic needs at least one manifest, speed takes none")
    out = Path(args.out)
    try:
        if args.task == "speed":
            config = icas.Config(encoder=args.encoder) if args.encoder else None
            model = icas.ICAS(config).to(icas._device(args.device)).eval().requires_grad_(False) if config else icas.load(args.model, device=args.device)
            record = speed(model) | {"device": str(model.device), "bf16": icas.fast_bf16(model.device), "threads": torch.get_num_threads()}
            out.mkdir(parents=True, exist_ok=True)
            (out / "results.json").write_text(json.dumps(record, indent=1))
            print(json.dumps(record))
            return 0
        path = args.model or icas._shipped_path()
        model, start = icas.load(path, device=args.device), time.time()
        results = {Path(m).parent.name if Path(m).suffix else Path(m).name: semantic(model, m, args.seeds, {"mfm": args.mfm, "gqs": args.gqs})
                   for m in args.data}
    except (ValueError, TypeError, FileNotFoundError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    first = next(iter(results.values()))
    head = {"mean_iou": float(np.mean([r["mean_iou"] for r in results.values()])), "iou": first["iou"], "baselines": first["baselines"]}
    record = head | {"task": args.task, "data": results, "arguments": vars(args), "checkpoint_sha256": icas._sha256(path),
                     "versions": {"icas": icas.__version__, "torch": torch.__version__, "python": platform.python_version()},
                     "device": str(model.device), "bf16": icas.fast_bf16(model.device), "cores": os.cpu_count(), "seconds": round(time.time() - start)}
    (out / "results.json").write_text(json.dumps(record, indent=1))
    text = "\n\n".join(f"{name}\n{table(r)}" for name, r in results.items())
    (out / "tables.txt").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
