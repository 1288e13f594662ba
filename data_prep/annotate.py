"""A page in the browser to mark a defect, see it proposed on all other pictures, accept or correct.

    python -m data_prep annotate FOLDER --out DIR                  README: Mark, check, correct
"""
from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import secrets
import threading
import time
import zlib
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pycocotools.mask  # noqa: F401  lest it is missed only at the first acceptance
import scipy
from PIL import Image

import icas

from .common import line_of

MOST = 8                # marked pictures of a label, and good parts, that are prompts at once
LARGEST = 64 << 20      # bytes of a request
SETTLED = 2.0           # seconds after a step in which another one may follow
POLICY = "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
FIRST = {"name": "defect", "color": "#ff5252", "threshold": 0.5}
NEW = {"status": "open", "score": None, "key": None, "numbers": [], "prompt": False, "order": 0}


class Project:
    """The pictures of FOLDER with their states and label maps, and the files of DIR."""

    def __init__(self, folder: Path, out: Path):
        icas.check(folder.is_dir(), f"no folder at {folder}")
        icas.check(not out.is_file() and out.resolve() != folder.resolve(),
                   f"--out: {out} is a file or the pictures' folder; give a folder of its own")
        others = [n for n in ("run.json", "manifest.jsonl", "coco.json") if (out / n).exists()]
        icas.check(not others or (out / "project.json").is_file(), f"--out: {out} holds the "
                   f"{', '.join(others)} of something else; give a folder of its own")
        self.folder, self.out = folder.resolve(), out.resolve()
        found = icas.list_images([self.folder])
        # what lies beside it is never read as input, and no run writes over it
        icas.write_text(self.out / "run.json", json.dumps({"key": {"task": "annotate"}}))
        self.names, self.files, self.all = [*found], [*found.values()], range(len(found))
        file = self.out / "project.json"
        kept = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        self.labels, self.pictures = kept.get("labels", [FIRST]), kept.get("pictures", {})
        self.lock, self.steps, self.version = threading.RLock(), deque(maxlen=100), 1
        self.changed, self.regions = 0.0, {}   # of a label map: its hash, its regions for COCO
        for i, name in enumerate(self.names):
            picture = self.pictures[name] = NEW | {"shape": None} | self.pictures.get(name, {})
            picture.update(stamp=1, error=None, drawn=self.label_path(i).is_file())
            if picture["status"] == "accepted" and not picture["drawn"]:   # killed in a step
                picture["status"] = "open"
        self.save()

    def __getitem__(self, i: int) -> dict:
        return self.pictures[self.names[i]]

    def update(self, i: int, **new) -> None:
        with self.lock:
            self.version += 1
            self[i].update(new, stamp=self.version)   # the page asks for it

    def read(self, i: int, most: int = icas.PIXELS) -> tuple:
        """(H, W, 3) uint8 pixels, reduced where they are more than `most`, and the own (h, w)."""
        try:
            pixels, shape = icas.read_rgb(self.files[i], "picture", most=most)
        except (ValueError, OSError) as error:
            self.update(i, error=str(error))
            raise
        self[i]["shape"] = list(shape)
        return pixels, shape

    def shape(self, i: int) -> tuple[int, int]:
        return self[i]["shape"] or self.read(i)[1]

    def thumb(self, i: int) -> bytes:
        file = self.out / "maps" / f"{self.names[i]}.jpeg"
        if not file.is_file() or file.stat().st_mtime < self.files[i].stat().st_mtime:
            icas.write_image(file, self.read(i, 1 << 19)[0].numpy(), 256)
        return file.read_bytes()

    def label_path(self, i: int) -> Path:
        return self.out / "labels" / f"{self.names[i]}.png"

    def odds(self, i: int) -> np.ndarray:
        """(n, H, W) float32 log-odds that were carried over, a map for each of its `numbers`."""
        if not self[i]["key"]:
            return np.zeros((0, 1, 1), np.float32)
        return np.load(self.out / "maps" / f"{self.names[i]}.npy").astype(np.float32)

    def label_map(self, i: int) -> np.ndarray:
        """(h, w) uint8: what was drawn, or what is proposed at the labels' thresholds."""
        if self[i]["drawn"]:
            return np.array(Image.open(self.label_path(i)))
        labels, best = np.zeros(self.shape(i), np.uint8), 0.0
        for odds, n in zip(self.odds(i), self[i]["numbers"] * (self[i]["status"] == "open")):
            limit = scipy.special.logit(self.labels[n - 1]["threshold"])
            above = icas.to_shape(odds[None], labels.shape)[0] - limit
            labels[above > best] = n
            best = np.maximum(above, best)
        return labels

    def small(self, i: int) -> np.ndarray:
        """`label_map` at most 256 wide and high: of the numbers a pixel stands for the largest."""
        labels = self.label_map(i)
        h, w = (max(1, round(n * 256 / max(256, *labels.shape))) for n in labels.shape)
        rows, columns = (np.arange(n) * m // n for n, m in zip((h, w), labels.shape))
        return np.maximum.reduceat(np.maximum.reduceat(labels, rows), columns, axis=1)

    def marked(self, i: int) -> tuple[int, list[dict]]:
        if i not in self.regions:
            labels = self.label_map(i)
            self.regions[i] = zlib.crc32(labels), [
                {"category_id": int(number), "iscrowd": 1, "area": int(inside.sum()),
                 "bbox": [box[1].start, box[0].start, *inside.shape[::-1]],
                 "segmentation": icas.run_lengths(np.pad(inside, [
                     (s.start, n - s.stop) for s, n in zip(box, labels.shape)]))}
                for number in np.unique(labels[labels > 0])
                for box, inside in icas.regions(labels == number)]
        return self.regions[i]

    def step(self, i: int, labels: np.ndarray | None, **new) -> None:
        """Give a picture a label map, None for none, and a state, until `undo`."""
        png = None if labels is None else encoded(labels)
        with self.lock:
            was = self.label_path(i).read_bytes() if self[i]["drawn"] else None
            self.steps.append((i, was, {k: self[i][k] for k in ("status", "prompt", "order")}))
            order = 1 + max(picture["order"] for picture in self.pictures.values())
            self.change(i, png, {"order": order} | new)

    def change(self, i: int, png: bytes | None, new: dict) -> None:
        if png:
            with icas.whole_file(self.label_path(i)) as part:
                part.write_bytes(png)
        else:
            self.label_path(i).unlink(missing_ok=True)
        self.regions.pop(i, None)
        self.changed = time.monotonic()
        self.update(i, **new, drawn=bool(png))
        self.save()

    def undo(self) -> dict:
        with self.lock:
            i, *before = self.steps.pop() if self.steps else (None,)
            if before:
                self.change(i, *before)
        return {"i": i}

    def draw(self, i: int, labels: np.ndarray | bytes) -> np.ndarray:
        if isinstance(labels, bytes):
            (h, w), whole = self.shape(i), zlib.decompressobj()
            labels = np.frombuffer(whole.decompress(labels, h * w + 1), np.uint8).reshape(h, w)
        icas.check(labels.max(initial=0) <= len(self.labels), "label map: has an unknown number")
        accepted = self[i]["status"] == "accepted" and labels.any()
        self.step(i, labels, status="accepted" if accepted else "open", prompt=True)
        return labels

    def decide(self, i: int, status: str, prompt: bool | None = None) -> None:
        """Accept what is shown, call it good, or open it again; is it a prompt? (default: drawn)"""
        labels, drawn = self.label_map(i), self[i]["drawn"]
        icas.check(status in ("open", "accepted", "good"), f"status: {status!r} is unknown")
        icas.check(status != "accepted" or drawn or self[i]["key"],
                   "nothing to accept yet: mark something, or press g if it is good")
        status = "good" if status == "accepted" and not labels.any() else status
        prompt = status == "good" or drawn and self[i]["prompt"] if prompt is None else bool(prompt)
        kept = labels if status == "accepted" or status == "open" and drawn else None
        self.step(i, kept, status=status, prompt=prompt)

    def set_labels(self, labels: list[dict]) -> None:
        named = {label["name"].strip()[:80]: label for label in labels}
        icas.check(len(self.labels) <= len(named) == len(labels) <= 255 and all(named),
                   "labels: each needs a name of its own")
        self.labels = [{"name": name, "color": str(label["color"]), "threshold":
                        icas.check_threshold(label["threshold"])} for name, label in named.items()]
        self.save()

    def save(self) -> None:
        """project.json, and what follows from it."""
        with self.lock:
            state = {"labels": self.labels, "pictures": self.pictures}
            icas.write_text(self.out / "project.json", json.dumps(state))
            names = {n: label["name"] for n, label in enumerate(self.labels, start=1)}
            images, regions, records = [], [], []
            for i in [i for i in self.all if self[i]["status"] != "open"]:
                (h, w), own = self.shape(i), self.marked(i)[1] if self[i]["drawn"] else []
                kinds = {str(r["category_id"]): names[r["category_id"]] for r in own}
                record = {"image": str(self.files[i]), "labels": kinds, "split": "train"}
                record |= {"mask": str(self.label_path(i))} if own else {}
                records.append(line_of(record | {"group": self.names[i]}, str(self.out)))
                images.append({"id": i + 1, "file_name": self.names[i], "height": h, "width": w})
                regions += [region | {"image_id": i + 1} for region in own]
            icas.write_text(self.out / "manifest.jsonl", "".join(records))
            icas.write_text(self.out / "coco.json", json.dumps({
                "info": {"description": f"icas {icas.__version__}"}, "licenses": [],
                "images": images, "annotations": [r | {"id": n} for n, r in enumerate(regions, 1)],
                "categories": [{"id": n, "name": name, "supercategory": "defect"}
                               for n, name in names.items()]}))

    def report(self) -> Path:
        """icas' report of a run, of at most 500 pictures; what a person decided scores 1 or 0."""
        states, lines = [self[i]["status"] for i in self.all], []
        rank = [{"accepted": 1, "good": 0}.get(states[i], self[i]["score"] or 0) for i in self.all]
        for i in sorted(self.all, key=lambda i: -rank[i])[:500]:
            with contextlib.suppress(ValueError, OSError):
                self.thumb(i)
                heat = np.uint8(255) * (self.small(i) > 0)
                icas.write_image(self.out / "maps" / f"{self.names[i]}.png", heat)
                lines.append({"image": self.names[i], "score": rank[i]})
        said = [f"{states.count(x)} {x}" for x in ("accepted", "good", "open")]
        said += [f"label {n}: {label['name']}" for n, label in enumerate(self.labels, start=1)]
        said += [self[i]["error"] for i in self.all if self[i]["error"]]
        icas.write_report(self.out, {"key": {"task": "annotate"}, "scale": (0, 1), "good": [],
                                     "threshold": 0.5}, lines, "\n".join(said))
        return self.out / "report.html"


def encoded(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", compress_level=1)
    return file.getvalue()


class Model:
    """Clicks; and, in a thread, prompts carried over to all open pictures."""

    def __init__(self, project: Project, model: icas.ICAS):
        self.project, self.model, self.lock, self.clicks = project, model, threading.Lock(), []
        self.encode = functools.lru_cache(maxsize=4)(   # only with the lock
            lambda i: icas.encode_pixels(*project.read(i), model))
        self.references: dict[tuple, icas.References] = {}   # of `prompts`
        self.heat = self.base = None, None   # of the last click's picture: maps, labels before
        self.view, self.opened, self.seen, self.ready = [], None, None, None
        self.said, self.stopped, self.wake = "", False, threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def click(self, i: int, label: int, points: list, point_labels: list, boxes: list):
        """The label map with what clicks and boxes mark, all of them since the first one."""
        icas.check(label in range(1, 1 + len(self.project.labels)), f"label: no {label!r}")
        if len(points) + len(boxes) == 1 or self.base[0] != i:
            self.base = i, self.project.label_map(i)
        labels, inside = self.base[1].copy(), np.zeros(self.base[1].shape, bool)
        for x0, y0, x1, y1 in boxes or [(x, y, int(x) + 1, int(y) + 1) for (x, y), kind in zip(
                points, point_labels) if kind == (1 in point_labels)]:
            inside[int(y0):int(np.ceil(y1)), int(x0):int(np.ceil(x1))] = True
        if boxes or 1 in point_labels:
            self.clicks.append(i)   # goes before the background
            with self.lock:
                self.clicks.pop()
                found = icas.segment(self.encode(i), points=points or None, boxes=boxes or None,
                                     point_labels=point_labels or None, model=self.model)
            self.heat = i, found.maps
            mask = found.mask & inside if boxes else (
                found.score > min(0.5, 0.9 * found.score[inside].min()))   # never nothing
        else:   # "not this" alone takes a region away
            mask, label = labels == labels[inside].max(), 0
        numbered, count = scipy.ndimage.label(mask, np.ones((3, 3)))
        hit = np.bincount(numbered[inside], minlength=count + 1) > 0
        labels[hit[numbered] & mask] = label
        return self.project.draw(i, labels)

    def prompts(self) -> tuple[list[tuple[int, int, int]], str | None]:
        """(index, label's number, hash of label map) of the latest MOST a label, and their key."""
        project = self.project
        with project.lock:
            chosen = sorted((i for i in project.all if project[i]["prompt"]),
                            key=lambda i: -project[i]["order"])
            found = [(i, 0, 0) for i in chosen if project[i]["status"] == "good"][:MOST]
            marked = [(i, *project.marked(i)) for i in chosen if project[i]["status"] == "accepted"]
        for number in range(1, 1 + len(project.labels)):
            found += [(i, number, crc) for i, crc, regions in marked
                      if any(r["category_id"] == number for r in regions)][:MOST]
        named = [(project.names[i], *rest) for i, *rest in sorted(found)]
        text = json.dumps([named, self.model.kind, icas.__version__])
        return sorted(found), zlib.crc32(text.encode()) if found else None

    def todo(self, key: str | None) -> list[int]:
        order = dict.fromkeys([*self.view, *self.project.all])
        return [i for i in order for p in [self.project[i]] if key and p["key"] != key
                and p["status"] == "open" and not p["error"] and not p["drawn"]]

    def state(self, since: int) -> dict:
        """What the page shows; of the pictures those that have changed since a version."""
        project, (prompts, key), version = self.project, self.prompts(), self.project.version
        return {"version": version, "folder": str(project.folder), "out": str(project.out),
                "labels": project.labels, "prompts": len({i for i, *_ in prompts}), "most": MOST,
                "said": self.said, "todo": len(self.todo(key)), "pictures": [
                    project[i] | {"i": i, "name": project.names[i]} for i in project.all
                    if project[i]["stamp"] > since]}

    def look(self, view: list[int], open: int | None) -> None:
        self.view = [i for i in view if i in self.project.all]
        self.opened = open if open in self.project.all else None

    def odds(self, i: int) -> np.ndarray:
        """Log-odds as bytes, 128 + 16 x: of the last click in the picture, or carried over."""
        odds = (self.heat[1] if self.heat[0] == i and self.project[i]["drawn"] else
                self.project.odds(i))
        return np.clip(128 + 16 * odds, 0, 255).round().astype(np.uint8)

    def work(self) -> None:
        while not self.stopped:
            try:
                idle, self.said = not self.next_step(), ""
            except Exception as error:   # the thread stays, and the page shows what is wrong
                idle, self.said = True, str(error)
            if idle:
                self.wake.wait(0.5)
                self.wake.clear()

    def stop(self) -> None:
        self.stopped = True
        self.wake.set()
        self.thread.join()

    def next_step(self) -> bool:
        """Encode the open picture or a prompt, or carry over to a picture. False: nothing to do."""
        project, opened, (prompts, key) = self.project, self.opened, self.prompts()
        todo, names = self.todo(key), ["", *(label["name"] for label in project.labels)]
        while self.clicks:
            time.sleep(0.01)
        if opened not in (None, self.seen):
            self.seen = opened
            with self.lock:
                self.model.levels(self.encode(opened).features, (2,))
        elif key is None:   # what prompts proposed goes with them
            for i in [i for i in project.all if project[i]["key"]]:
                project.update(i, key=None, score=None, numbers=[])
            (project.out / "prompts.safetensors").unlink(missing_ok=True)
        elif self.ready is None or self.ready[:2] != (key, names):
            missing = [p for p in prompts if p not in self.references]
            if time.monotonic() - project.changed < SETTLED:
                return False
            for i, number, crc in missing[:1]:
                file, labels = project.files[i], project.label_map(i)
                shown = ([(file, labels == number, str(number))], []) if number else ([], [file])
                with self.lock:
                    self.references[i, number, crc] = icas.encode(*shown, model=self.model)
            if len(missing) <= 1:
                self.prepare(key, names, prompts)
            return True
        elif todo:
            self.carry(todo[0], key)
            if len(todo) % 20 == 1:
                project.save()
        return bool(todo)

    def prepare(self, key: str, names: list[str], prompts: list[tuple]) -> None:
        """A view takes 8 MB: of more than two pictures of a kind half of the turns are kept."""
        self.references = {p: self.references[p] for p in prompts}
        kinds = [number for _, number, _ in prompts]
        for (_, number, _), own in self.references.items():
            if kinds.count(number) > 2:
                own.shots = [s for s in own.shots if s.turn % (2 if number else 4) == 0]
        joined = sum(self.references.values(), icas.References())
        named = [shot._replace(label=names[int(shot.label or 0)]) for shot in joined.shots]
        icas.References(named, joined.kind).save(self.project.out / "prompts.safetensors")
        self.ready = key, names, icas.prepare(joined, model=self.model)

    def carry(self, i: int, key: str) -> None:
        """Keep what the prompts find in a picture; what good parts alone find is of label 1."""
        with self.lock:
            image = icas.encode_pixels(*self.project.read(i), self.model)
            found = icas.segment(image, self.ready[2])
        numbers = [int(x) if x.isdecimal() else 1 for x in found.labels]
        path = self.project.out / "maps" / f"{self.project.names[i]}.npy"
        with icas.whole_file(path) as part, open(part, "wb") as file:
            np.save(file, found.maps.astype(np.float16))
        score = round(float(scipy.special.expit(found.maps.max())), 4)
        self.project.update(i, key=key, score=score, numbers=numbers)


# What can be asked for: /NAME, or /NAME/INDEX of a picture. No path comes from outside.
PAGE = "text/html; charset=utf-8"
PLAIN = {"GET ": lambda s, query, body: (PAGE, Path(__file__).with_suffix(".html").read_bytes()),
         "GET state": lambda s, query, body: s.model.state(int(query["since"])),
         "GET report": lambda s, query, body: (PAGE, s.project.report().read_bytes()),
         "POST view": lambda s, query, body: s.model.look(**json.loads(body)),
         "POST undo": lambda s, query, body: s.project.undo(),
         "POST labels": lambda s, query, body: s.project.set_labels(json.loads(body))}
INDEXED = {"GET thumb": lambda s, i, body: ("image/jpeg", s.project.thumb(i)),
           "GET image": lambda s, i, body: ("image/png", encoded(s.project.read(i)[0].numpy())),
           "GET mask": lambda s, i, body: s.project.label_map(i),
           "GET small": lambda s, i, body: s.project.small(i),
           "GET odds": lambda s, i, body: s.model.odds(i),
           "POST draw": lambda s, i, body: s.project.draw(i, body),
           "POST click": lambda s, i, body: s.model.click(i, **json.loads(body)),
           "POST set": lambda s, i, body: s.project.decide(i, **json.loads(body))}


class Handler(BaseHTTPRequestHandler):
    timeout = 60   # seconds that a slow sender may take
    def log_message(self, *_): ...   # says nothing

    def do_GET(self) -> None:
        place, server = urlsplit(self.path), self.server
        query = {key: values[0] for key, values in parse_qs(place.query).items()}
        hosts = [f"{name}:{server.server_port}" for name in ("127.0.0.1", "localhost")]
        token = (self.headers["X-Token"] or query.get("token", "")).encode()
        if (self.headers["Host"] not in hosts
                or self.headers["Origin"] not in [None, *(f"http://{host}" for host in hosts)]
                or not secrets.compare_digest(token, server.token.encode())):
            return self.answer("refused: open the address that was printed, with its token", 403)
        name, _, index = place.path[1:].partition("/")
        act = (INDEXED if index else PLAIN).get(f"{self.command} {name}")
        asked = int(index) if re.fullmatch("[0-9]{1,9}", index) else query
        if not act or index and asked not in server.project.all:
            return self.answer("there is no such thing here", 404)
        length = self.headers["Content-Length"] or "0"
        if not length.isdecimal() or int(length) > LARGEST:
            return self.answer(f"expected at most {LARGEST} bytes", 413)
        try:
            self.answer(act(server, asked, self.rfile.read(int(length))))
            server.model.wake.set()
        except ConnectionError:   # the page was closed
            pass
        except Exception as error:   # whatever was asked for, the server stays
            self.answer(str(error), 400)

    do_POST = do_GET

    def answer(self, body, status: int = 200) -> None:
        """Send text, (its kind, bytes), an array, or JSON of anything else."""
        kind, body = body if isinstance(body, tuple) else ("text/plain; charset=utf-8", body)
        headers = {"Cache-Control": "no-store", "Content-Security-Policy": POLICY,
                   "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        if isinstance(body, np.ndarray):
            headers |= {"X-Shape": json.dumps(body.shape), "Content-Encoding": "deflate"}
            kind, body = "application/octet-stream", zlib.compress(body.tobytes(), 1)
        elif not isinstance(body, (str, bytes)):
            kind, body = "application/json", json.dumps(body)
        body = body.encode() if isinstance(body, str) else body
        headers |= {"Content-Type": kind, "Content-Length": len(body)}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)


def serve(project: Project, model: icas.ICAS, port: int = 0) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.project, server.model = project, Model(project, model)
    server.token = secrets.token_urlsafe(24)
    return server
