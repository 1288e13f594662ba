"""python -m data_prep NAME --root DOWNLOADED_DIR --out DIR"""
from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import inspect
import signal
import sys
import webbrowser
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
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME",
                                  help=", ".join(NAMES) + "; annotate: a page to mark your own")
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
    page = names.add_parser("annotate", description="A page in the browser: mark a defect, see it "
                            "proposed on all other pictures of FOLDER, accept or correct.")
    page.add_argument("folder", type=Path, metavar="FOLDER", help="pictures, also in folders below")
    page.add_argument("--out", type=Path, required=True, help="folder for all that is made; the "
                      "same again to go on")
    page.add_argument("--port", type=int, default=0, help="default: any free one")
    page.add_argument("--no-browser", dest="browser", action="store_false",
                      help="print the address, open nothing")
    page.add_argument("--model", metavar="FILE", help="checkpoint (default: the shipped one)")
    page.add_argument("--encoder", metavar="FILE", help="a DINOv2 of any size")
    page.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
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


def annotate(folder: Path, out: Path, port: int, browser: bool, **options) -> None:
    """Serve the page until Ctrl-C."""
    from .annotate import Project, icas, serve
    server = serve(Project(folder, out), icas.load(options.pop("model"), **options), port)
    address = f"http://127.0.0.1:{server.server_port}/?token={server.token}"
    print(f"{len(server.project.names)} pictures: {address}\nCtrl-C ends it", flush=True)
    if browser:
        webbrowser.open(address)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    server.model.stop()
    server.project.save()
    print(f"\n{server.project.report()} shows what is in {out}")


def main(argv: list[str] | None = None) -> int:
    args = vars(arguments().parse_args(argv))
    name = args.pop("name")
    try:
        {"annotate": annotate}.get(name, functools.partial(prepare, name))(**args)
    except KeyError as error:
        print(f"data_prep: {name}: an annotation lacks {error}; are its files those that were "
              "published?", file=sys.stderr)
    except ImportError as error:
        print(f'data_prep: {error}; from a clone: pip install ".[data]"', file=sys.stderr)
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
