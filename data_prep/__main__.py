"""python -m data_prep NAME --root DOWNLOADED_DIR --out DIR"""
from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from pathlib import Path

from .common import check, write_manifest

NAMES = ("coco", "ade20k", "objects365", "realiad", "manta", "mvtec", "visa", "kolektorsdd", "elpv", "aitex", "oct", "brats", "lits", "voc",
         "magnetic_tile", "folder")


def main(argv: list[str] | None = None) -> int:
    first = argparse.ArgumentParser(prog="python -m data_prep", description="Make a manifest of a data set as it was downloaded.")
    first.add_argument("name", choices=NAMES)
    first.add_argument("--root", help="the downloaded folder (elpv: not needed, the package is read)")
    first.add_argument("--out", required=True, help="folder for manifest.jsonl and for masks that have to be written")
    first.add_argument("--partial", action="store_true", help="accept other counts than the published ones")
    reader = None
    known, _ = first.parse_known_args(argv)
    reader = importlib.import_module(f".{known.name}", __package__)
    getattr(reader, "add_arguments", lambda parser: None)(first)
    args = first.parse_args(argv)
    extra = {k: v for k, v in vars(args).items() if k not in ("name", "root", "out", "partial")}
    try:
        if args.root is None and known.name != "elpv":
            raise ValueError(f"--root is missing; {known.name} expects\n\n{inspect.getdoc(reader)}")
        if args.root is not None and not Path(args.root).is_dir():
            raise FileNotFoundError(f"--root: no folder at {args.root}")
        counts = write_manifest(reader.records(args.root and Path(args.root), Path(args.out), **extra), Path(args.out))
        print(f"{args.out}/manifest.jsonl: " + ", ".join(f"{v} {k}" for k, v in counts.items()))
        try:
            for line in check(counts, reader.PUBLISHED, args.partial):
                print("  " + line)
        except ValueError:
            (Path(args.out) / "manifest.jsonl").unlink()  # an incomplete download leaves no manifest that looks whole
            raise
    except (ValueError, FileNotFoundError, KeyError) as error:
        print(f"data_prep: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
