"""The page of `python -m data_prep annotate`: its server, its files, and a real browser."""
import contextlib
import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import forbid
from PIL import Image

import icas

pytest.importorskip("pycocotools")
from data_prep import annotate
from data_prep.manifest import read_labels, read_manifest

HOME = Path(icas.__file__).parent


@pytest.fixture
def folder(tmp_path, rng):
    """Five pictures, one below another folder, and one that is none; sorted: a b broken c d/e f."""
    for name in ("a.png", "b.jpg", "c.png", "d/e.png", "f.png"):
        (tmp_path / "parts" / name).parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "parts" / name)
    (tmp_path / "parts/broken.png").write_bytes(b"no picture")
    return tmp_path / "parts"


@contextlib.contextmanager
def serving(folder, out, model):
    server = annotate.serve(annotate.Project(folder, out), model)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
    server.model.stop()


@pytest.fixture
def server(folder, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(annotate, "SETTLED", 0)
    with serving(folder, tmp_path / "out", tiny) as server:
        yield server


def ask(server, path, body=None, method=None, **headers):
    """Status and content of an answer; JSON, an array, or bytes."""
    if not isinstance(body, (bytes, type(None))):
        body = json.dumps(body).encode()
    headers = {"X-Token": server.token} | {k.replace("_", "-"): v for k, v in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method or ("GET" if body is None else "POST"), path, body,
                       {k: v for k, v in headers.items() if v is not None})
    reply = connection.getresponse()
    data, kind = reply.read(), reply.headers["Content-Type"]
    connection.close()
    assert reply.headers["Cache-Control"] == "no-store"
    assert "default-src 'self'" in reply.headers["Content-Security-Policy"]
    if shape := reply.headers["X-Shape"]:
        data = np.frombuffer(zlib.decompress(data), np.uint8).reshape(json.loads(shape))
    return reply.status, json.loads(data) if kind == "application/json" else data


def good(answer):
    assert answer[0] == 200, answer
    return answer[1]


def states(server):
    return {p["name"]: p for p in good(ask(server, "/state?since=0"))["pictures"]}


def draw(server, i, labels):
    good(ask(server, f"/draw/{i}", zlib.compress(labels.tobytes())))


def square(number=1, at=10):
    labels = np.zeros((40, 50), np.uint8)
    labels[at:at + 12, 20:35] = number
    return labels


def wait(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def carried(server):
    state = good(ask(server, "/state?since=0"))
    ready = server.model.ready
    return ready and ready[0] == server.model.prompts()[1] and state["todo"] == 0


def coco_masks(out, name):
    """{category: mask} of a picture in coco.json, by pycocotools."""
    from pycocotools.coco import COCO
    coco = COCO(str(out / "coco.json"))
    image = next(x for x in coco.loadImgs(coco.getImgIds()) if x["file_name"] == name)
    found = {}
    for entry in coco.loadAnns(coco.getAnnIds(image["id"])):
        kind = coco.loadCats(entry["category_id"])[0]["name"]
        mask = coco.annToMask(entry).astype(bool)
        assert mask.sum() == entry["area"] and mask.shape == (image["height"], image["width"])
        found[kind] = found.get(kind, False) | mask
    return found


# ---- what is refused -----------------------------------------------------------------------------

def test_strangers_are_refused(server):
    for headers in ({"X_Token": None}, {"X_Token": "wrong"}, {"X_Token": "\xe9"},
                    {"Host": "evil.example"}, {"Host": "127.0.0.1:1"},
                    {"Origin": "http://evil.example"}, {"Origin": "null"}):
        for path, body in (("/", None), ("/state?since=0", None), ("/image/0", None),
                           ("/undo", {}), ("/nothing", None)):
            assert ask(server, path, body, **headers)[0] == 403, (path, headers)
    assert ask(server, "/", X_Token=None)[0] == 403
    assert ask(server, f"/?token={server.token}", X_Token=None)[0] == 200
    own = f"http://127.0.0.1:{server.server_port}"
    assert ask(server, "/state?since=0", Origin=own)[0] == 200
    assert server.server_address[0] == "127.0.0.1"


def test_pictures_are_asked_for_by_index_alone(server):
    for path in ("/../../etc/passwd", "/image/../../etc/passwd", "/image/..%2f..%2fetc%2fpasswd",
                 "/image/0/a", "/image//etc/passwd", "/image", "/image/", "/image/6", "/image/-1",
                 "/image/1e0", "/image/%D9%A3", "/image/ 1", "/thumb/99999999999999", "/state/0",
                 "/annotate.py", "/draw/0", "/__init__/0", "/a.png", "image/0"):
        assert ask(server, path.replace(" ", "%20"))[0] == 404, path
    assert ask(server, "/image/5")[0] == 200


def test_huge_and_broken_bodies_are_refused(server):
    assert ask(server, "/draw/0", b"", Content_Length=str((64 << 20) + 1))[0] == 413
    assert ask(server, "/draw/0", b"", Content_Length="-1")[0] == 413
    good(ask(server, "/image/0"))
    bomb = zlib.compress(bytes(1 << 26))
    for body in (bomb, b"", b"junk", zlib.compress(bytes(1999)),
                 zlib.compress(np.full((40, 50), 9, np.uint8).tobytes())):
        status, said = ask(server, "/draw/0", body)
        assert status == 400, said
    click = {"label": 7, "points": [[1, 1]], "point_labels": [1], "boxes": []}
    for path, body in (("/set/0", {"status": "no"}), ("/set/0", []), ("/set/0", {"x": 1}),
                       ("/set/0", {"status": "accepted"}), ("/labels", [{"name": ""}]),
                       ("/labels", []), ("/view", 3), ("/click/0", {}), ("/click/0", click),
                       ("/click/0", click | {"label": 1, "points": [[50, 1]]}),
                       ("/set/2", {"status": "good"})):
        assert ask(server, path, body)[0] == 400, (path, body)
    assert all(p["status"] == "open" and not p["drawn"] for p in states(server).values())


# ---- what it does --------------------------------------------------------------------------------

def test_a_picture_that_cannot_be_read_is_named_and_left_out(server):
    status, said = ask(server, "/thumb/2")
    assert status == 400 and b"broken.png" in said
    assert "not a readable image" in states(server)["broken.png"]["error"]
    draw(server, 0, square())
    good(ask(server, "/set/0", {"status": "accepted"}))
    wait(lambda: carried(server))
    found = states(server)
    assert [n for n, p in found.items() if p["score"] is None] == ["a.png", "broken.png"]
    assert "broken.png" in good(ask(server, "/report")).decode()


def test_a_click_marks_its_place_in_a_second_and_not_this_takes_it_away(server):
    good(ask(server, "/view", {"view": [], "open": 3}))
    wait(lambda: server.model.seen == 3)
    good(ask(server, "/click/3", {"label": 1, "points": [[30, 12]], "point_labels": [1],
                                  "boxes": []}))
    begin = time.monotonic()
    labels = good(ask(server, "/click/3", {"label": 1, "points": [[30.5, 12.5]],
                                           "point_labels": [1], "boxes": []}))
    assert time.monotonic() - begin < 1
    assert labels.shape == (40, 50) and labels[12, 30] == 1
    np.testing.assert_array_equal(good(ask(server, "/mask/3")), labels)
    assert good(ask(server, "/odds/3")).shape[0] == 1   # the heat map of the click
    both = good(ask(server, "/click/3", {"label": 1, "points": [[30.5, 12.5], [5, 35]],
                                         "point_labels": [1, 0], "boxes": []}))
    assert both[12, 30] == 1
    less = good(ask(server, "/click/3", {"label": 1, "points": [[30.5, 12.5]], "point_labels": [0],
                                         "boxes": []}))
    assert less[12, 30] == 0
    box = good(ask(server, "/click/3", {"label": 1, "points": [], "point_labels": [],
                                        "boxes": [[2, 3, 9, 11]]}))
    outside = np.ones_like(box, bool)
    outside[3:11, 2:9] = False
    np.testing.assert_array_equal(box[outside], less[outside])
    assert good(ask(server, "/undo", {})) == {"i": 3}
    np.testing.assert_array_equal(good(ask(server, "/mask/3")), less)


def test_a_click_marks_no_region_but_its_own(server, monkeypatch):
    maps = np.full((1, 40, 50), -5, np.float32)
    maps[0, 5:15, 5:15] = maps[0, 25:35, 30:45] = 5
    monkeypatch.setattr(icas, "segment", lambda *_, **__: icas.Segmentation(
        maps, ["defect"], (40, 50), 0.5))
    labels = good(ask(server, "/click/0", {"label": 1, "points": [[10, 10]], "point_labels": [1],
                                           "boxes": []}))
    np.testing.assert_array_equal(np.argwhere(labels), np.argwhere(maps[0] > 0)[:100])


def test_what_is_accepted_is_in_every_file_to_the_pixel(server, tmp_path, tiny):
    out, labels = tmp_path / "out", square()
    good(ask(server, "/labels", [{"name": "scratch", "color": "#ff0000", "threshold": 0.5},
                                 {"name": "dent", "color": "#00ff00", "threshold": 0.4}]))
    labels[30:33, 1:4], labels[36, 40] = 2, 1
    draw(server, 4, labels)
    assert (out / "manifest.jsonl").read_text() == ""   # it is a draft
    good(ask(server, "/set/4", {"status": "accepted"}))
    good(ask(server, "/set/1", {"status": "good"}))
    np.testing.assert_array_equal(np.array(Image.open(out / "labels/d/e.png.png")), labels)
    plain, marked = read_manifest(out)
    assert plain["image"].endswith("parts/b.jpg") and "mask" not in plain
    assert marked["labels"] == {"1": "scratch", "2": "dent"} and marked["group"] == "d/e.png"
    np.testing.assert_array_equal(read_labels(marked), labels)
    found = coco_masks(out, "d/e.png")
    np.testing.assert_array_equal(found["scratch"], labels == 1)
    np.testing.assert_array_equal(found["dent"], labels == 2)
    assert coco_masks(out, "b.jpg") == {}
    wait(lambda: carried(server))
    references = icas.References.load(out / "prompts.safetensors")
    assert references.labels == ["dent", "scratch"] and len(references.normals) == 4
    assert not list(out.rglob("*.part"))

    # and what is proposed is what icas.segment finds with that file
    expected = icas.segment(tmp_path / "parts/a.png", references, model=tiny)
    odds = icas.to_shape(expected.maps, (40, 50))   # of dent and scratch, as they are sorted
    cuts = np.quantile(odds, [0.9, 0.7], axis=(1, 2)).diagonal()
    good(ask(server, "/labels", [
        {"name": name, "color": "#ff0000", "threshold": float(1 / (1 + np.exp(-cut)))}
        for name, cut in zip(("scratch", "dent"), cuts[::-1])]))
    above = odds - cuts[:, None, None]
    assert 0.1 < (above.max(axis=0) > 0).mean() < 0.5
    proposed = np.where(above.max(axis=0) > 0, np.array([2, 1])[above.argmax(axis=0)], 0)
    assert (good(ask(server, "/mask/0")) == proposed).mean() > 0.98   # maps are kept in float16
    sent = good(ask(server, "/odds/0"))
    assert states(server)["a.png"]["numbers"] == [1, 2]   # labels' numbers, as strings, are sorted
    np.testing.assert_allclose((sent[::-1] / 16.0) - 8, expected.maps.clip(-8, 7.94), atol=0.04)


def test_undo_gives_back_what_was_there(server, tmp_path):
    first = square()
    draw(server, 0, first)
    good(ask(server, "/set/0", {"status": "accepted"}))
    good(ask(server, "/set/0", {"status": "good"}))
    assert not (tmp_path / "out/labels/a.png.png").exists()
    for status, drawn in (("accepted", True), ("open", True), ("open", False)):
        assert good(ask(server, "/undo", {})) == {"i": 0}
        now = states(server)["a.png"]
        assert (now["status"], now["drawn"]) == (status, drawn)
        expected = first if drawn else np.zeros_like(first)
        np.testing.assert_array_equal(good(ask(server, "/mask/0")), expected)
    assert good(ask(server, "/undo", {})) == {"i": None}


def test_the_latest_pictures_alone_are_prompts_and_a_proposal_only_if_wanted(server, monkeypatch):
    monkeypatch.setattr(annotate, "MOST", 2)
    for i in (0, 1, 3):
        draw(server, i, square())
        good(ask(server, f"/set/{i}", {"status": "accepted"}))
    assert [i for i, *_ in server.model.prompts()[0]] == [1, 3]
    wait(lambda: carried(server))
    server.project.labels[0]["threshold"] = 0.02   # whatever the model says, something is marked
    good(ask(server, "/set/4", {"status": "accepted"}))
    assert [i for i, *_ in server.model.prompts()[0]] == [1, 3]
    good(ask(server, "/set/4", {"status": "accepted", "prompt": True}))
    assert [i for i, *_ in server.model.prompts()[0]] == [3, 4]


def test_another_start_goes_on_and_computes_nothing_again(folder, tmp_path, tiny, monkeypatch):
    out = tmp_path / "parts/out"   # inside the folder, too
    with serving(folder, out, tiny) as server:
        draw(server, 0, square())
        good(ask(server, "/set/0", {"status": "accepted"}))
        good(ask(server, "/set/1", {"status": "good"}))
        draw(server, 3, square(at=20))
        wait(lambda: carried(server))
        before = states(server)
    forbid(monkeypatch, "segment")
    with serving(folder, out, tiny) as server:
        time.sleep(1.5)
        now = states(server)
        assert server.model.thread.is_alive()
        for name, old in before.items():
            assert now[name] == old | {k: now[name][k] for k in ("stamp", "error")}
        np.testing.assert_array_equal(good(ask(server, "/mask/3")), square(at=20))


# ---- processes -----------------------------------------------------------------------------------

class Program:
    """The command in a process of its own."""

    def __init__(self, folder, out):   # a shell's background job, and its children, ignore Ctrl-C
        self.process = subprocess.Popen(
            [sys.executable, "-m", "data_prep", "annotate", str(folder), "--out", str(out),
             "--no-browser", "--device", "cpu"], cwd=HOME, stdout=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        self.address = re.search(r"http://127\.0\.0\.1:(\d+)/\?token=(\S+)",
                                 self.process.stdout.readline())
        self.server_port, self.token = int(self.address[1]), self.address[2]

    def stop(self, how=signal.SIGINT):
        self.process.send_signal(how)
        said = self.process.communicate(timeout=60)[0]
        return self.process.returncode, said


shipped = pytest.mark.skipif(not (HOME / "checkpoints" / icas.CHECKPOINT).is_file(),
                             reason="no checkpoints/ beside the tests")


@shipped
def test_kill_9_loses_the_last_stroke_at_most(folder, tmp_path):
    program, out, strokes, failed = Program(folder, tmp_path / "out"), tmp_path / "out", [], []

    def paint():
        try:
            for n in range(100_000):
                labels = square(at=n % 28)
                strokes.append(labels)
                draw(program, 0, labels)
                good(ask(program, "/set/0", {"status": "accepted"}))
        except (OSError, http.client.HTTPException) as error:
            failed.append(error)
    good(ask(program, "/image/0"))
    painter = threading.Thread(target=paint)
    painter.start()
    wait(lambda: len(strokes) > 20)
    assert program.stop(signal.SIGKILL)[0] == -signal.SIGKILL
    painter.join()
    assert failed
    json.loads((out / "project.json").read_text())
    for record in read_manifest(out):
        assert read_labels(record).any()
    found = coco_masks(out, "a.png")["defect"]
    kept = annotate.Project(folder, out).label_map(0)
    for labels in (found, kept):
        assert any((labels == stroke).all() for stroke in strokes[-2:])


def chrome():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no chromium and chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1400,900"):
        options.add_argument(f"--{option}")
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


class Page:
    """A person at the page."""

    def __init__(self, program, browser):
        self.browser = browser
        browser.get(program.address[0])
        self.until("pictures.length === 8 && pictures.every((picture) => picture)")

    def run(self, script, *values):
        return self.browser.execute_script(script, *values)

    def until(self, condition, seconds=60):
        wait(lambda: self.run(f"return Boolean({condition})"), seconds)

    def press(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains
        ActionChains(self.browser).send_keys(*keys).perform()

    def point(self, *places):
        """Press at the first (x, y) of a cell's pixels, move over the others, let go."""
        from selenium.webdriver.common.action_chains import ActionChains
        left, top, zoom = self.run("const box = document.querySelector('#ink').getBounding"
                                   "ClientRect(); return [box.left, box.top, sheet.zoom]")
        actions = ActionChains(self.browser, duration=10)
        pointer = actions.w3c_actions.pointer_action
        for n, (x, y) in enumerate(places):
            pointer.move_to_location(round(left + x * zoom), round(top + y * zoom))
            if n == 0:
                pointer.pointer_down()
        pointer.pointer_up()
        actions.perform()
        self.until("!sheet.busy && !sheet.drag")

    def open(self, i):
        self.run(f"openPicture({i})")
        self.until(f"sheet && sheet.i === {i} && sheet.labels && !sheet.busy")

    def threshold(self, value):
        """Move the slider; how many pixels are shown as marked before the server is asked."""
        count = self.run("""
            const slider = document.querySelector("#labels [type=range]"), ink = $("#ink");
            slider.focus();
            slider.value = arguments[0];
            slider.oninput();
            return ink.getContext("2d").getImageData(0, 0, ink.width, ink.height).data.filter(
                (value, n) => n % 4 === 3 && value).length""", value)
        self.run("document.querySelector('#labels [type=range]').onchange()")
        return count

    def labels(self):
        flat = self.run("return [...sheet.labels.data]")
        return np.array(flat, np.uint8).reshape(300, 300)


@shipped
def test_in_a_browser_a_click_becomes_masks_of_eight_cells(tmp_path):
    cells = pytest.importorskip("elpv_dataset.utils").load_dataset()[0]
    browser = chrome()
    (tmp_path / "cells").mkdir()
    for n, i in enumerate((4, 6, 13, 22, 45, 56, 368, 412)):
        Image.fromarray(cells[i]).save(tmp_path / f"cells/{n}.png")
    out, program = tmp_path / "out", Program(tmp_path / "cells", tmp_path / "out")
    try:
        page = Page(program, browser)
        page.open(0)
        page.point((150, 225))                                    # click a defect
        clicked = page.labels()
        assert clicked[225, 150] == 1 and 300 < (clicked > 0).sum() < 20_000
        name = browser.find_element("css selector", "#labels input[type=text]")
        name.send_keys("\ue009a\ue000", "dark area\n")            # name it (control-a before)
        page.until("project.labels[0].name === 'dark area'")
        page.press(" ")                                           # accept it: it is carried over
        page.until("pictures[0].status === 'accepted' && sheet.i === 1")
        page.press("\ue00c")                                      # Escape
        page.until("pictures.slice(1).every((picture) => picture.score !== null)")
        assert page.run("return pictures[1].score > 0.5 && pictures[7].score < 0.5")

        page.open(1)
        proposed = page.labels()
        assert proposed[120, 80] == 1
        shown = page.threshold(0.55)                              # at once, then by the server
        assert 0 < shown < proposed.sum()
        page.until(f"Math.abs(sheet.labels.data.reduce((a, b) => a + b) - {shown}) < 100")
        page.threshold(0.5)
        page.until(f"sheet.labels.data.reduce((a, b) => a + b) === {proposed.sum()}")
        page.press("p")
        page.point((30, 250), (60, 250), (60, 280))               # correct it with the brush
        drawn = page.labels()
        changed = drawn != proposed
        assert changed[250, 30:61].all() and changed[250:281, 60].all()
        assert changed.sum() < 1200 and not changed[:240].any()
        page.press("e")
        page.point((60, 270), (60, 290))
        drawn = page.labels()
        assert not drawn[270:290, 60].any() and drawn[250, 45] == 1
        page.press("z")
        page.until("sheet.labels.data[270 * 300 + 60] === 1 && !sheet.busy")
        page.press("y")
        for place in ((200, 20), (260, 20), (260, 60), (200, 60)):
            page.point(place)
        page.press("\ue007")                                      # Enter closes the polygon
        page.until("sheet.labels.data[40 * 300 + 230] === 1 && !sheet.busy")
        drawn = page.labels()
        assert drawn[22:58, 202:258].all() and not drawn[:18].any()
        page.press(" ")
        page.until("pictures[1].status === 'accepted' && sheet.i === 2")
        page.press("\ue00c")
        page.run("choose(7)")
        page.press("g")                                           # mark one good
        page.until("pictures[7].status === 'good'")
        for i in range(2, 7):                                     # accept all others
            page.run(f"choose({i})")
            page.press(" ")
            page.until(f"pictures[{i}].status !== 'open'")
        shown = page.run("return pictures.map((picture) => picture.status)")
        assert shown[:2] == ["accepted"] * 2 and shown[7] == "good" and "open" not in shown
        assert not [x for x in browser.get_log("browser") if x["level"] == "SEVERE"]
        status, said = program.stop()                             # close
        assert status == 0 and "report.html" in said

        for i, expected in ((0, clicked), (1, drawn)):
            found = coco_masks(out, f"{i}.png")
            assert list(found) == ["dark area"]
            np.testing.assert_array_equal(found["dark area"], expected == 1)
        assert coco_masks(out, "7.png") == {} and len(read_manifest(out)) == 8
        page_text = (out / "report.html").read_text()
        assert page_text.count("jpeg;base64") >= 8 and "dark area" in page_text

        program = Program(tmp_path / "cells", out)                # start again: all is there
        page = Page(program, browser)
        assert page.run("return pictures.map((picture) => picture.status)") == shown
        assert page.run("return project.labels[0].name") == "dark area"
        page.open(1)
        np.testing.assert_array_equal(page.labels(), drawn)
    finally:
        browser.quit()
        program.stop(signal.SIGKILL)


@pytest.mark.parametrize("name", ["run.json", "manifest.jsonl", "coco.json"])
def test_a_folder_with_results_of_something_else_is_left_alone(folder, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("kept")
    with pytest.raises(ValueError, match=f"--out: .* holds the {name} of something else"):
        annotate.Project(folder, tmp_path / "run")
    assert [(p.name, p.read_text()) for p in (tmp_path / "run").iterdir()] == [(name, "kept")]
    annotate.Project(folder, tmp_path / "own")
    annotate.Project(folder, tmp_path / "own")   # its own it takes up
    assert icas.main(["segment", str(folder), "--anomaly", str(next(folder.glob("*.png"))), "1",
                      "1", "9", "9", "--out", str(tmp_path / "own")]) == 2


def test_threads_may_write_one_file_at_a_time(tmp_path):
    def write(i):
        with icas.whole_file(tmp_path / "x") as part:
            part.write_text(f"{i}" * 9)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(200)))
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and len((tmp_path / "x").read_text()) >= 9
