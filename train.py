#!/usr/bin/env python3
r"""Train the in-context decoder: the generic stage, then the anomaly stage (Sec. 3.3).

    python train.py --stage generic --data DIR/voc DIR/ccp --out runs/generic
    torchrun --nproc-per-node 8 train.py --stage anomaly --data DIR/realiad \
        --init runs/generic/last.safetensors --out runs/anomaly

Killed at any moment, the same command goes on. With --cache the frozen encoder sees each augmented
view once, and a CPU can train (--layers 3 --batch-size 8 --steps 3000). --data takes manifests, or
folders that hold one (data_prep/__init__.py has the format), and reads all records, of whatever
split. --encoder FILE trains for another DINOv2, whose size is read from the file.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
import zipfile
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np
import torch
from safetensors import SafetensorError

import evaluate
import icas
from data_prep.episodes import Store, plan, read_sources
from data_prep.manifest import check_sizes, choose, manifest_file
from data_prep.pairs import Pairs
from data_prep.views import FreshSynthetic, FreshViews, rank, ranks, world


# ---- Validation on sets that are not trained on --------------------------------------------------

def held_out(model: icas.ICAS, manifests: Sequence[str]) -> list[tuple[Store, dict]]:
    """Of each label two episodes, with the images of their set: a marked image, and up to 12 others
    to find it in."""
    found = []
    try:
        for records in read_sources(manifests, loud=rank() == 0).values():
            store = Store(model, records)
            for episode in plan("semantic", records, seeds=2, good=False):
                few = icas.evenly(episode["tests"], 12)
                found.append((store, episode | {"tests": few}))
    except (ValueError, OSError) as error:
        raise ValueError(f"--validate: {str(error).removeprefix('--data: ')}") from error
    return found


def validate(held: list[tuple[Store, dict]]) -> dict[str, float]:
    """Mean IoU in percent of what each part and the whole find likelier than not."""
    rows = [evaluate.metrics(*evaluate.score(store, [e], peers=False), e, store.records)
            for store, e in held]
    methods = dict.fromkeys(method for row in rows for method in row)
    return {m: float(np.mean([row[m]["iou"] for row in rows if m in row])) for m in methods}


# ---- Command line --------------------------------------------------------------------------------

# arguments that change no weight
FREE = ("out", "workers", "log_every", "save_minutes", "dry_run", "device", "compile")
SHAPE = ("image_size", "debias", "queries", "dim", "layers", "ffn_dim", "pixel_dim")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction

    def number(name: str, default: int | float, text: str) -> None:
        add(name, type=type(default), default=default, help=f"{text} (default {default})")
    add("--stage", choices=["generic", "anomaly"], required=True, help="photographs, then defects")
    add("--out", required=True, help="folder for last.safetensors, best.safetensors, log.jsonl")
    add("--dry-run", action="store_true", help="check the data, print recipe and counts")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", required=True, help="manifests, or folders that hold one")
    add("--weights", nargs="+", type=float, help="how often each is drawn from, then the synthetic")
    add("--validate", nargs="*", default=[], help="manifests that are not trained on")
    add("--cache", help="folder that keeps encoded views, so that a CPU can train")
    add("--views", type=int, help="of an image, kept; 0: each draw is new (default 0, --cache: 2)")
    number("--images", 0, "marked images of a manifest at most; 0: all")
    number("--good", 0, "unmarked images of a manifest at most; 0: all")
    number("--synthetic", 0, "kinds of synthetic defect, of three times as many views")
    number("--workers", min(16, os.cpu_count() or 1), "threads of a rank that read and augment")
    add = parser.add_argument_group("model (with --init the checkpoint's)").add_argument
    add("--init", help="checkpoint to start from")
    add("--encoder", help="frozen DINOv2 of any size (default: shipped, or the one beside --init)")
    add("--blocks", nargs="*", type=int, default=[], help="tapped blocks, from 1 (default: two)")
    add("--detail", action=switch, default=True, help="match on the maps of a small CNN too")
    add("--gqs", action=switch, default=True, help="greedy query selection, or learned queries")
    add("--correspondence", action=switch, default=True, help="show the decoder what matching says")
    add("--features", action=switch, default=True, help="and raw features (shipped: not)")
    for name in SHAPE:
        number("--" + name.replace("_", "-"), getattr(icas.Config, name), "see icas.Config")
    add = parser.add_argument_group("recipe (the defaults are the paper's)").add_argument
    add("--steps", type=int, help="optimizer steps (default 50000 generic, 5000 anomaly)")
    add("--strong-augmentation", action="store_true", help="as the shipped checkpoint was trained")
    number("--batch-size", 32, "pairs a step, of all ranks together")
    number("--accumulate", 1, "micro-batches that a rank's pairs are cut into")
    number("--lr", 1e-4, "peak learning rate of AdamW")
    number("--jitter", 0.0, "spread of the log gain and of the shift of each relation map")
    number("--good-targets", 0.25, "share of targets that show nothing of what is marked (anomaly)")
    number("--same-image", 0.5, "share of marked prompts that are a view of the target's image")
    number("--shots", 1, "views of a prompt at most, drawn for each step")
    number("--seed", 0, "of weights, views and pairs")
    add = parser.add_argument_group("run").add_argument
    number("--log-every", 20, "steps between lines")
    number("--validate-every", 500, "steps between validations")
    number("--save-minutes", 10.0, "minutes between states to resume from")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default auto)")
    add("--compile", action=switch, help="torch.compile the networks (default: on CUDA)")
    return parser


def say(text: str) -> None:
    print(text, file=sys.stderr)


def start_model(args: argparse.Namespace) -> icas.ICAS:
    device = icas.check_device(args.device)   # "cuda" is what `ranks` set
    compiled = device.type == "cuda" if args.compile is None else args.compile
    if args.init:
        return icas.load(args.init, encoder=args.encoder, device=device, compile=compiled)
    encoder = args.encoder or str(icas.find_shipped("vits14-saliency.safetensors"))
    state, shape = icas.convert(encoder), {name: getattr(args, name) for name in SHAPE}
    config = icas.Config(icas.encoder_name(state, encoder), blocks=args.blocks,
                         detail=args.detail, learned_queries=not args.gqs,
                         correspondence=args.correspondence, features=args.features, **shape)
    torch.manual_seed(args.seed)
    return icas.start(config, state, encoder, icas.sha256(encoder), device, compiled)


@contextlib.contextmanager
def unless_full(what: str) -> Iterator[None]:
    """A full disk costs what is written, not the training."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:   # torch's writer: RuntimeError
        say(f"train: {what} could not be written ({error}); training goes on")


def write_state(path: Path, state: dict) -> None:
    """Whole or not at all; the one before is kept."""
    with unless_full("the state"), icas.whole_file(path) as part:
        torch.save(state, part)
        if path.is_file():
            path.replace(path.with_suffix(".old"))


def read_state(path: Path) -> dict | None:
    """The last whole state, or the one before it."""
    for candidate in filter(Path.is_file, (path, path.with_suffix(".old"))):
        try:
            with zipfile.ZipFile(candidate) as archive:
                if bad := archive.testzip():   # torch.load itself reads over a flipped bit
                    raise ValueError(f"{bad} has another checksum")
            return torch.load(candidate, map_location="cpu", weights_only=True)
        except Exception as error:   # a damaged file may raise any
            say(f"train: {candidate} is damaged ({error}); trying the one before")
            if rank() == 0:   # so that it never takes the place of a whole one
                candidate.replace(candidate.with_suffix(".damaged"))
    return None


# ---- One run -------------------------------------------------------------------------------------

class Run:
    """A training: everything that can be wrong with arguments and data is found here, before it."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, Path(args.out)
        views = args.views if args.views is not None else 2 * bool(args.cache)
        usual = {"generic": 50_000, "anomaly": 5_000}[args.stage]
        self.steps = usual if args.steps is None else args.steps
        least = {"batch_size": world(), "accumulate": 1, "shots": 1, "validate_every": 1,
                 "log_every": 1, "steps": 1, "views": 1 if args.cache else 0,
                 "images": 0, "good": 0, "synthetic": 0}
        ranges = {name: (low, math.inf) for name, low in least.items()}
        ranges |= dict.fromkeys(("same_image", "jitter", "good_targets"), (0, 1))
        for name, (low, high) in ranges.items():
            value = {"views": views, "steps": self.steps}.get(name, getattr(args, name))
            icas.check(low <= value <= high, f"--{name.replace('_', '-')}: expected {low} to "
                       f"{high}, got {value}")
        data, held = ({manifest_file(m).resolve() for m in names}
                      for names in (args.data, args.validate))
        if data & held:
            raise ValueError(f"--validate: {min(map(str, data & held))} is trained on too")
        self.check_out()
        self.model, views = start_model(args), 0 if args.dry_run else views
        size = self.model.config.image_size
        drawn, sources = (views, args.seed, args.strong_augmentation), []
        for manifest in args.data:
            records = choose(manifest, args.images, args.good, args.seed)
            name = manifest_file(manifest).parent.resolve().name
            check_sizes(records, args.workers)
            sources.append(FreshViews(name, records, size, args.stage == "anomaly", *drawn))
        if args.synthetic:
            sources.append(FreshSynthetic(args.data, args.synthetic, size, *drawn))
        weights, names = args.weights or [1.0] * len(sources), [source.name for source in sources]
        if len(weights) != len(sources) or min(weights) < 0 or not sum(weights):
            raise ValueError(f"--weights: expected one number for each of {names}, got {weights}")
        self.held = held_out(self.model, args.validate)
        for source in sources:
            if args.cache and not args.dry_run:
                source.keep(args.cache, self.model, args.workers)
            source.sort(args.workers)
            needed, what = (2, "two images") if args.stage == "anomaly" else (1, "an image")
            if max(source.images.values(), default=0) < needed:
                raise ValueError(f"--data: no label is in {what} of {source.name!r}")
        self.pairs = Pairs(sources, weights, self.model, args)

    def check_out(self) -> None:
        """Find what this run has left: its state, or that it is done. Another's is not touched."""
        last, known = self.out / "last.safetensors", self.out / "arguments.json"
        self.fixed = {k: v for k, v in vars(self.args).items() if k not in FREE}
        self.done, self.state = last.is_file(), read_state(self.out / "state.pt")
        found = json.loads(known.read_text()) if known.is_file() else None
        if found != self.fixed and (self.done or self.state):
            raise ValueError(f"{self.out}: holds a run with other arguments; give another --out")

    def describe(self) -> None:
        """The resolved recipe and the data."""
        args, model = self.args, self.model
        trained = sum(p.numel() for p in model.decoder.parameters())
        lines = [f"{args.stage}: {self.steps} steps, {args.batch_size} pairs, ranks {world()}, "
                 f"micro-batches {args.accumulate}, seed {args.seed}, AdamW {args.lr:g}, weight "
                 "decay 0.05, clip 1, 100 steps of warm-up, linear decay",
                 f"prompts of up to {args.shots} views, {100 * args.same_image:g} % of the "
                 f"target's image; relation maps jittered by {args.jitter:g}; "
                 f"{'strong' if args.strong_augmentation else 'mild'} augmentation",
                 f"{trained / 1e6:.1f} M weights of {model.config}, from {args.init or 'scratch'}; "
                 f"{model.device}, {'bf16' if icas.fast_bf16(model.device) else 'float32'}"]
        for source, weight in zip(self.pairs.sources, self.pairs.weights):
            many = sorted(source.by_label.items(), key=lambda item: -len(item[1]))
            labels = ", ".join(f"{len(v)} {k}" for k, v in many[:6]) + ", ..." * (len(many) > 6)
            lines.append(f"  {source.name}: {100 * weight:.0f} % of pairs, {len(source.index)} "
                         f"{'views' if source.fixed else 'images'}, "
                         f"{sum(map(len, source.good.values()))} good, {len(many)} labels "
                         f"({labels})")
            if alone := [label for label, count in source.images.items() if count == 1]:
                lines.append(f"    {len(alone)} labels in one image only, as {alone[0]!r}: their "
                             "pairs are two views of it")
        print("\n".join(lines), file=sys.stdout if args.dry_run else sys.stderr)

    def train(self) -> None:
        """Train, and write OUT/last.safetensors."""
        begin, self.best, self.recent = 0, -1.0, []
        decoder = self.model.decoder.requires_grad_(True)
        optimizer = icas.make_optimizer(decoder, self.args.lr, 0.05)
        if self.state:
            decoder.load_state_dict(self.state["decoder"])
            optimizer.load_state_dict(self.state["optimizer"])
            begin, self.best = self.state["step"], self.state["best"]
        if rank() == 0:
            if self.state:
                say(f"resumed at step {begin}")
            icas.write_text(self.out / "arguments.json", json.dumps(self.fixed))
            log = self.out / "log.jsonl"   # without what was logged after the state
            icas.write_lines(log, [x for x in icas.read_lines(log) if x["step"] <= begin])
        self.clock = self.saved = time.time()
        icas.fit(self.model, self.pairs, steps=self.steps, lr=self.args.lr, seed=self.args.seed,
                 start=begin, optimizer=optimizer, callback=self.after)
        if rank() == 0:
            icas.save(self.model, self.out / "last.safetensors", {"arguments": vars(self.args)})

    def after(self, step: int, parts: dict[str, float], optimizer: torch.optim.Optimizer) -> None:
        """What is said, measured and kept after a step."""
        args, done, last = self.args, step + 1, step + 1 == self.steps
        if rank() == 0:
            self.recent.append(parts)
            if done % args.log_every == 0 or last:
                self.report(done, optimizer.param_groups[0]["lr"])
        began = time.time()
        if self.held and (done % args.validate_every == 0 or last):
            self.measure(done)   # all ranks together
        if rank() == 0 and time.time() - self.saved > 60 * args.save_minutes and not last:
            write_state(self.out / "state.pt", {
                "decoder": self.model.decoder.state_dict(), "optimizer": optimizer.state_dict(),
                "step": done, "best": self.best})
            self.saved = time.time()
        self.clock += time.time() - began

    def report(self, done: int, rate: float) -> None:
        mean = {k: float(np.mean([p[k] for p in self.recent])) for k in self.recent[0]}
        losses = " ".join(f"{k} {v:.2f}" for k, v in mean.items() if k != "loss")
        whole = time.time() - self.clock
        seconds, share = whole / len(self.recent), self.pairs.waited / whole
        images, left = 2 * self.args.batch_size / seconds, seconds * (self.steps - done) / 60
        say(f"step {done:>6}/{self.steps} | loss {mean['loss']:.4f} ({losses}) | lr {rate:.1e} | "
            f"{1000 * seconds:.0f} ms, loader {100 * share:.0f} % | {images:.1f} images/s | "
            f"{left:.0f} min left")
        self.log({"step": done, "lr": rate, "seconds_a_step": seconds, "loader_share": share,
                  "images_a_second": images, "minutes_left": left} | mean)
        self.clock, self.pairs.waited, self.recent = time.time(), 0.0, []

    def measure(self, done: int) -> None:
        """Validate; the best by S_s mfm, which training changes most, is kept."""
        self.model.decoder.eval()
        found = validate(self.held)
        self.model.decoder.train()
        if rank():
            return
        rows = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
        say(f"step {done:>6}/{self.steps} | mean IoU {rows}")
        self.log({"step": done, "validation": found})
        if found["S_s mfm"] > self.best:
            with unless_full("best.safetensors"):
                icas.save(self.model, self.out / "best.safetensors",
                          {"arguments": vars(self.args), "step": done, "validation": found})
                self.best = found["S_s mfm"]

    def log(self, line: dict) -> None:
        with unless_full("log.jsonl"), open(self.out / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed part-way (the same command goes on), 2 wrong use."""
    args, status = parser().parse_args(argv), 2
    try:
        with ranks(args.device):
            run = Run(args)
            if rank() == 0:
                run.describe()
            if args.dry_run:
                return 0
            status = 1
            if not run.done:
                run.train()
            if rank() == 0:
                for file in run.out.glob("state.*"):
                    file.unlink()
                print(run.out / "last.safetensors")
        return 0
    except (ValueError, TypeError, OSError, ImportError, SafetensorError) as error:
        say(f"train: {error}")
        return status


if __name__ == "__main__":
    sys.exit(main())
