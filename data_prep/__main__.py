"""python -m data_prep NAME --root DOWNLOADED_DIR --out DIR"""
from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from pathlib import Path
from typing import Iterable, Iterator

from .common import check, write_manifest

NAMES = ("coco", "ade20k", "objects365", "realiad", "manta", "mvtec", "visa", "kolektorsdd", "elpv",
         "aitex", "oct", "brats", "lits", "voc", "magnetic_tile", "folder")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep",
        description="Make a manifest of a data set as it was downloaded. NAME --help shows the "
                    "folders that are expected; capitals don't matter.")
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME", help=", ".join(NAMES))
    for name in NAMES:
        reader = importlib.import_module(f".{name}", __package__)
        sub = names.add_parser(name, description=inspect.getdoc(reader),
                               formatter_class=argparse.RawDescriptionHelpFormatter)
        default = " (default: the package)" if name == "elpv" else ""
        sub.add_argument("--root", type=Path, help="the downloaded folder" + default)
        sub.add_argument("--out", type=Path, required=True,
                         help="folder for manifest.jsonl and for masks that have to be written")
        sub.add_argument("--partial", action="store_true",
                         help="accept missing files and other counts than the published ones")
        getattr(reader, "add_arguments", lambda parser: None)(sub)
    return parser


def progress(records: Iterable[dict], name: str) -> Iterator[dict]:
    """The records, with a count on a terminal."""
    for number, record in enumerate(records):
        if number % 100 == 0 and sys.stderr.isatty():
            print(f"\r{name}: {number} records", end="", file=sys.stderr, flush=True)
        yield record
    if sys.stderr.isatty():
        print("\r", end="\033[K", file=sys.stderr)


def prepare(name: str, root: Path | None, out: Path, partial: bool, **extra) -> None:
    """Write OUT/manifest.jsonl of a data set and print what was found."""
    reader = importlib.import_module(f".{name}", __package__)
    if root is None and name != "elpv":
        raise ValueError("--root is missing: the downloaded folder; "
                         f"python -m data_prep {name} --help shows what it holds")
    if root is not None and not root.is_dir():
        raise FileNotFoundError(f"--root: no folder at {root}"
                                + ("; unpack the archive first" if root.is_file() else ""))
    lines: list[str] = []

    def accept(counts: dict[str, int], missed: list[str]) -> None:
        published = (reader.published(root, **extra) if hasattr(reader, "published")
                     else reader.PUBLISHED)
        lines.extend(check(counts, published, missed, partial))
    counts = write_manifest(progress(reader.records(root, out, **extra), name), out, accept)
    shown = [f"{v} {k}" for k, v in counts.items() if not k.startswith("category ")]
    print(f"{out}/manifest.jsonl: " + ", ".join(shown))
    for line in lines:
        print("  " + line)


def main(argv: list[str] | None = None) -> int:
    args = vars(arguments().parse_args(argv))
    name = args["name"]
    try:
        prepare(**args)
    except KeyError as error:
        print(f"data_prep: {name}: an annotation lacks {error}; are its files those that were "
              "published?", file=sys.stderr)
    except ImportError as error:
        print(f'data_prep: {error}; pip install "icas[data]"', file=sys.stderr)
    except (ValueError, OSError) as error:
        print("data_prep: " + " ".join(str(error).split()), file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\ndata_prep: {name}: stopped, no manifest was written; run it again to go on",
              file=sys.stderr)
        return 130
    else:
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
