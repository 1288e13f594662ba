"""What a run says and leaves: thresholds set anew, the summary in the terminal, the report."""
import base64
import csv
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import DEFECT, forbid, icas_main, lines, read, run_json
from PIL import Image

import icas


@pytest.fixture
def detected(model, parts):
    """A finished run of icas detect; returns the command of it."""
    command = ["detect", "parts", "--normal", "good", "--out", "out"]
    assert icas_main(*command, model=model) == 0
    return command


@pytest.fixture
def segmented(model, parts):
    command = ["segment", "parts", *DEFECT, "--out", "out"]
    assert icas_main(*command, model=model) == 0
    return command


def report(out="out"):
    """What the report's script holds: the run, and a row for each picture."""
    text = Path(out, "report.html").read_text()
    start = text.index("const [run, rows] = ") + len("const [run, rows] = ")
    return json.JSONDecoder().raw_decode(text[start:])[0]


def check_all_files(threshold, out="out"):
    """Every file of a run says the same, and what the threshold makes of the scores and maps."""
    found, run = lines(out), run_json(out)
    assert run["threshold"] == pytest.approx(threshold)
    cut, coco = run["threshold"], json.loads(Path(out, "coco.json").read_text())
    with open(Path(out, "results.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    for r, row, image in zip(found, rows, coco["images"], strict=True):
        with np.load(Path(out, "maps", f"{r['image']}.npz")) as file:
            maps, labels = file["maps"], file["labels"].tolist()
        shape = r["height"], r["width"]
        whole = (icas.Detection(r["score"], maps, shape, cut) if r["task"] == "detect" else
                 icas.Segmentation(maps, labels, shape, cut))
        bad = r["score"] > cut if r["task"] == "detect" else whole.mask.any()
        np.testing.assert_array_equal(read(Path(out, r["mask"])) > 0, whole.mask)
        assert r["label"] == row["label"] == ("bad" if bad else "good")
        assert r["threshold"] == float(row["threshold"]) == cut
        assert r["area"] == int(row["area"]) == whole.mask.sum()
        assert r["regions"] == whole.boxes() and row["path"] == r["image"] == image["file_name"]
        own = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        assert [a["bbox"] for a in own] == [b["bbox"] for b in r["regions"]]
        heat = whole.map if r["task"] == "detect" else whole.score
        expected = icas.overlay(r["file"], heat, whole.mask, *run["scale"])
        np.testing.assert_array_equal(read(Path(out, r["overlay"])), expected)
    shown, entries = report(out)
    assert shown["threshold"] == cut and shown["scale"] == list(run["scale"])
    count = sum(r["label"] == "bad" for r in found)
    said = f"{count} of {len(found)} pictures are called bad at the threshold {cut:.3g}"
    assert shown["text"].startswith(said)
    assert [e[0] for e in entries] == [r["image"] for r in sorted(
        found, key=lambda r: -r["score"])]
    assert not list(Path(out).rglob("*.part"))
    return count


# ---- a threshold that can be chosen --------------------------------------------------------------


def test_a_threshold_is_set_by_a_score_without_computing_anything(detected, monkeypatch, capsys):
    scores = sorted(r["score"] for r in lines())
    forbid(monkeypatch, "encode_pixels", "load", "detect")
    for i, cut in enumerate([scores[0] - 0.1, (scores[1] + scores[2]) / 2, scores[-1] + 0.1]):
        capsys.readouterr()
        assert icas.main(["threshold", "out", "--score", str(cut)]) == 0
        assert check_all_files(cut) == (4, 2, 0)[i]
        said = capsys.readouterr()
        assert f"{(4, 2, 0)[i]} of 4 pictures are called bad" in said.out and said.err == ""
    assert run_json()["rate"] is None


def test_a_threshold_is_set_by_the_rate_of_good_parts_called_bad(detected, monkeypatch):
    forbid(monkeypatch, "encode_pixels", "load")
    good, cuts = run_json()["good"], []
    for rate in (0.001, 0.3):
        assert icas.main(["threshold", "out", "--rate", str(rate)]) == 0
        cuts.append(icas.upper_limit(good, rate))
        check_all_files(cuts[-1])
        assert run_json()["rate"] == rate
    assert cuts[0] > cuts[1]


@pytest.mark.parametrize("count", [1, 2])
def test_a_threshold_is_set_between_the_good_parts_and_those_known_to_be_bad(
        detected, monkeypatch, capsys, count):
    rows = sorted(lines(), key=lambda r: -r["score"])
    run = run_json() | {"good": [rows[2]["score"] - 0.3, rows[2]["score"] - 0.1]}
    Path("out/run.json").write_text(json.dumps(run))
    forbid(monkeypatch, "encode_pixels", "load")
    named = [rows[0]["image"], f"parts/{rows[1]['image']}"][:count]  # by name, or by path
    assert icas.main(["threshold", "out", "--bad", *named]) == 0
    cut = (run["good"][1] + rows[count - 1]["score"]) / 2
    assert check_all_files(cut) >= count
    said = capsys.readouterr().out
    assert said.startswith(f"{count} of {count} known bad parts score above {cut:.3g}, 0 of 2 good")
    assert run_json()["rate"] is None


def test_bad_parts_that_look_like_good_ones_are_said_to_be_out_of_reach(detected, capsys):
    rows = sorted(lines(), key=lambda r: -r["score"])
    between = (rows[0]["score"] + rows[1]["score"]) / 2
    run = run_json() | {"good": [between, between - 0.01, rows[3]["score"] - 1]}
    Path("out/run.json").write_text(json.dumps(run))
    capsys.readouterr()
    named = [rows[0]["image"], rows[3]["image"]]
    assert icas.main(["threshold", "out", "--bad", *named]) == 0
    said = capsys.readouterr().out
    assert said.startswith("1 of 2 known bad parts") and "0 of 3 good ones" in said
    assert "what scores less looks like a good part" in said
    check_all_files((rows[0]["score"] + between) / 2)


@pytest.mark.parametrize("cut", [0.0, 0.6, 1.0])
def test_a_segment_run_takes_another_threshold_by_score(segmented, monkeypatch, cut):
    forbid(monkeypatch, "encode_pixels", "load", "segment")
    assert icas.main(["threshold", "out", "--score", str(cut)]) == 0
    count = check_all_files(cut)
    assert cut == 0.6 or count == (0 if cut else 4)


@pytest.mark.parametrize("command", ["detected", "segmented"])
def test_pictures_may_have_been_moved_away(command, request, monkeypatch, capsys):
    request.getfixturevalue(command)
    before = lines()
    shutil.move("parts", "elsewhere")
    forbid(monkeypatch, "encode_pixels", "load")
    cut = float(np.median([r["score"] for r in before]))
    capsys.readouterr()
    assert icas.main(["threshold", "out", "--score", str(cut)]) == 0
    assert capsys.readouterr().err == ""
    after = lines()
    assert {r["threshold"] for r in after} == {cut}
    assert [r["score"] for r in after] == [r["score"] for r in before]
    for r in after:
        mask, shown = (read(Path("out", r[kind])) for kind in ("mask", "overlay"))
        assert mask.shape == (r["height"], r["width"]) == shown.shape[:2]
        assert r["area"] == (mask > 0).sum()
    assert len(report()[1]) == 4


def test_a_whole_run_may_have_been_moved(detected, monkeypatch):
    shutil.move("out", "kept")
    forbid(monkeypatch, "encode_pixels", "load")
    assert icas.main(["threshold", "kept", "--score", "0"]) == 0
    assert check_all_files(0, "kept") == 4


def test_the_same_command_with_another_threshold_judges_anew_without_computing(
        detected, model, monkeypatch):
    forbid(monkeypatch, "detect")
    good = run_json()["good"]
    assert icas_main(*detected, "--false-positive-rate", "0.4", model=model) == 0
    check_all_files(icas.upper_limit(good, 0.4))
    assert run_json()["rate"] == 0.4
    assert icas.main(["threshold", "out", "--score", "0.25"]) == 0
    assert icas_main(*detected, model=model) == 0  # without the option what was set stays
    check_all_files(0.25)


def test_a_segment_command_with_another_threshold_judges_anew_without_computing(
        segmented, model, monkeypatch):
    forbid(monkeypatch, "segment")
    assert icas_main(*segmented, "--threshold", "0.6", model=model) == 0
    check_all_files(0.6)
    assert icas_main(*segmented, model=model) == 0
    check_all_files(0.6)


def test_a_threshold_that_was_stopped_half_way_leaves_no_file_of_it_behind(detected, monkeypatch,
                                                                          capsys):
    assert icas.main(["threshold", "out", "--score", "9"]) == 0
    draw, drawn = icas.draw_result, []

    def stopped(*a):
        drawn.append(a)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(*a)
    with monkeypatch.context() as patch:
        patch.setattr(icas, "draw_result", stopped)
        assert icas.main(["threshold", "out", "--score", "0"]) == 130
    assert capsys.readouterr().err.count("\n") == 1
    assert icas.main(["threshold", "out", "--score", "9"]) == 0  # the user thinks again
    assert check_all_files(9) == 0


def test_pictures_added_later_are_judged_at_the_threshold_that_was_set(detected, model, rng):
    assert icas.main(["threshold", "out", "--score", "0.25"]) == 0
    Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save("parts/new.png")
    assert icas_main(*detected, model=model) == 0
    assert check_all_files(0.25) == 5


@pytest.mark.parametrize("arguments, said", [
    (["none", "--score", "1"], "none: no finished run of icas there"),
    (["parts", "--score", "1"], "parts: no finished run of icas there"),
    (["mask.png", "--score", "1"], "mask.png: no finished run of icas there"),
    (["out"], "expected one of --score, --rate and --bad"),
    (["out", "--score", "1", "--rate", "0.1"], "expected one of --score, --rate and --bad"),
    (["out", "--score", "0", "--rate", "0"], "expected one of --score, --rate and --bad"),
    (["out", "--rate", "0"], "rate: expected a number between 0 and 1, got 0"),
    (["out", "--rate", "1"], "rate: expected a number between 0 and 1"),
    (["out", "--rate", "nan"], "rate: expected a number between 0 and 1"),
    (["out", "--score", "nan"], "score"),
    (["out", "--bad", "a.png", "z.png"], "--bad: z.png"),
    (["out", "--bad", "good/1.png"], "--bad: good/1.png"),
    (["segmented", "--score", "2"], "expected a number in [0, 1], got 2"),
    (["segmented", "--rate", "0.1"], "--rate, --bad: need a run of icas detect; use --score"),
    (["segmented", "--bad", "a.png"], "--rate, --bad: need a run of icas detect"),
    (["old", "--score", "1"], "old")])
def test_a_wrong_threshold_is_one_line_and_changes_nothing(detected, model, capsys, arguments,
                                                           said):
    assert icas_main("segment", "parts", *DEFECT, "--out", "segmented", model=model) == 0
    shutil.copytree("out", "old")  # as icas 0.7.0 wrote it
    Path("old/run.json").write_text(json.dumps({"task": "detect", "version": "0.7.0"}))
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    capsys.readouterr()
    assert icas.main(["threshold", *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("icas: ") and told.err.count("\n") == 1
    assert said in told.err
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before


# ---- what the terminal says ----------------------------------------------------------------------


def told(good, scores, threshold, rate=None, mutual=False):
    """`icas.summary` of pictures with these scores."""
    made = [{"image": f"{i}.png", "score": float(s), "label": "bad" if s > threshold else "good"}
            for i, s in enumerate(scores)]
    run = {"mutual": mutual, "good": list(map(float, good)), "threshold": float(threshold),
           "rate": rate}
    return icas.summary(run, made)


def test_of_one_or_two_good_parts_the_summary_says_that_the_threshold_is_a_guess():
    for count, guess in ((2, True), (4, False)):
        assert ("so the threshold is a guess" in told([1.0] * count, [0.9, 2.0], 1.5)) == guess


def test_without_good_parts_the_summary_says_what_is_assumed():
    text = told([1.0] * 30, [0.9, 2.0], 1.5, mutual=True)
    assert "each picture was compared with 30 of them, as if most were good" in text
    assert "--normal" in text and "compared with (30)" in text and "good parts (30)" not in text
    assert "as if most were good" not in told([1.0] * 30, [0.9, 2.0], 1.5)


def bars(text):
    """Rows of the histogram: (low, marked as the threshold's, high, the counts at its end)."""
    found = re.findall(r"^ *(-?[\d.]+) ([->]) (-?[\d.]+) *(.*)$", text, re.MULTILINE)
    return [(float(low), mark == ">", float(high), [int(n) for n in re.findall(r"\d+", rest)])
            for low, mark, high, rest in found]


GOOD = [0.9, 1.0, 1.05, 1.1]


def test_the_summary_says_how_many_are_bad_and_how_many_would_be_if_all_were_good():
    text = told(GOOD, [0.9, 1.0, 1.8, 2.5, 3.5] + [1.0] * 35, 1.5)
    share = icas.false_positives(GOOD, 1.5)
    assert text.startswith("3 of 40 pictures are called bad at the threshold 1.5; if all were good "
                           f"it would be {40 * share:.1f} ({share:.1%})")
    assert 0 < share < 0.05 and "nothing is above" not in text and "out of reach" not in text


def test_the_histogram_counts_every_score_and_marks_the_threshold_s_bar(rng):
    scores = rng.normal(1, 0.1, 200).tolist() + rng.normal(3, 0.2, 20).tolist()
    text = told(GOOD, scores, 1.5)
    rows = bars(text)
    assert "good parts (4)" in text and "pictures (220)" in text and len(rows) >= 10
    assert sum(sum(counts) for *_, counts in rows) == 224
    marked, = [(low, high) for low, mark, high, _ in rows if mark]
    assert marked[0] <= 1.5 <= marked[1]
    assert min(low for low, *_ in rows) <= min(GOOD + scores) + 0.005
    assert max(high for _, _, high, _ in rows) >= max(scores) - 0.005
    assert max(map(len, text.splitlines())) <= 160 and "#" * 25 not in text


def test_where_nothing_is_above_the_summary_names_the_highest_and_another_rate():
    text = told(GOOD, [1.2, 3.4, 2.8, 1.0], 3.58, rate=0.01)
    assert text.startswith("0 of 4 pictures are called bad")
    assert ("nothing is above 3.58; the highest are 1.png (3.40), 2.png (2.80), 0.png (1.20)"
            in text)
    assert "4 good parts cannot promise a rate of" in text and "icas threshold OUT --rate" in text


def test_where_no_more_is_called_bad_than_of_good_parts_the_summary_says_how_to_check():
    advice = "icas threshold OUT --bad FILE"
    cut = icas.upper_limit(GOOD, 0.2)
    alike = [0.9, 1.0, 1.02, 1.1, 0.95, 1.05, 0.99, 1.0, 1.01, cut + 0.01]
    assert "1 of 10" in told(GOOD, alike, cut) and advice in told(GOOD, alike, cut)
    assert "out of reach" in told(GOOD, alike, cut)
    assert advice not in told(GOOD, [3, 3, 3, 3, *alike], cut)


@pytest.mark.parametrize("good, scores, threshold", [
    ([], [0.2, 0.9], 0.5), ([], [], 0.5), (GOOD, [], 2), ([1, 1], [1, 1], 1), (GOOD, [1], -3),
    ([1.0, 1.1], [1e6], 1e9)])
def test_a_summary_of_little_is_made_too(good, scores, threshold):
    bad = sum(s > threshold for s in scores)
    text = told(good, scores, threshold)
    assert text.startswith(f"{bad} of {len(scores)} pictures are called bad")
    assert sum(sum(counts) for *_, counts in bars(text)) in (0, len(good) + len(scores))
    assert "if all were good" not in text or good


def test_a_run_tells_its_summary_and_keeps_it_in_the_report(detected, model, capsys):
    capsys.readouterr()
    assert icas_main(*detected, model=model) == 0
    said = capsys.readouterr().out
    text = icas.summary(run_json(), lines())
    assert said.startswith(f"{text}\n") and report()[0]["text"] == text
    last = said.removeprefix(f"{text}\n")
    assert "report.html" in last and "out" in last and last.count("\n") == 1
    assert "good parts (2)" in text and "pictures (4)" in text


# ---- the report ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["detected", "segmented"])
def test_the_report_is_one_file_with_every_picture_sorted_by_score(command, request):
    request.getfixturevalue(command)
    (run, rows), found = report(), lines()
    assert f"{run['task']}ed" == command
    assert run["good"] == run_json()["good"]
    assert [r[0] for r in rows] == [r["image"] for r in sorted(found, key=lambda r: -r["score"])]
    assert "deep/d.png" in [r[0] for r in rows]  # folders are shown
    by_name = {r["image"]: r for r in found}
    for name, score, picture, heat in rows:
        assert score == by_name[name]["score"]
        assert (score > run["threshold"]) == (by_name[name]["label"] == "bad")
        assert picture.startswith("jpeg;base64,") and heat.startswith("png;base64,")
    text = Path("out/report.html").read_text()
    assert "http://" not in text and "https://" not in text
    for outside in ("src=\"", "href=", "@import", "url(", "fetch("):
        assert outside not in text, outside
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    for part in ("input type=\"range\"", "IntersectionObserver", "<main>"):
        assert part in text
    assert text.count("<script>") == text.count("</script>") == 1


def test_without_the_page_that_ships_there_is_no_report_and_none_is_named(model, parts, capsys,
                                                                        monkeypatch):
    monkeypatch.setattr(icas, "REPORT", "no_such.html")
    assert icas_main("detect", "parts", "--normal", "good", "--out", "out", model=model) == 0
    assert not Path("out/report.html").exists() and "report.html" not in capsys.readouterr().out
    assert len(lines()) == 4 and Path("out/results.csv").is_file()


def test_pictures_in_the_report_are_small_and_show_picture_and_heat(detected, rng, model):
    large = np.kron(rng.integers(0, 256, (10, 15, 3), dtype=np.uint8), np.ones((64, 64, 1)))
    Image.fromarray(large.astype(np.uint8)).save("parts/large.png")
    assert icas_main(*detected, model=model) == 0
    for name, _, *shown in report()[1]:
        picture, heat = (Image.open(io.BytesIO(base64.b64decode(x.split(",")[1]))) for x in shown)
        assert picture.mode == "RGB" and heat.mode == "L" and max(picture.size) <= 640
        original = Image.open(f"parts/{name}").convert("RGB").resize(picture.size)
        difference = np.abs(np.array(original).astype(int) - np.array(picture))
        assert name != "large.png" or difference.mean() < 20
    assert Path("out/report.html").stat().st_size < 1e6


def test_no_name_of_a_file_or_folder_breaks_the_report(model, parts):
    odd = ["</script><b>.png", "DATA.png", "'\"`${1}\\.png", "<!--<script>.png", "täst 1,2.png",
           "&lt;.png"]
    for name in odd:
        Path("odd", name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy("parts/a.png", Path("odd", name))
    assert icas_main("detect", "odd", "--normal", "good", "--out", "</DATA>", model=model) == 0
    run, rows = report("</DATA>")
    assert {r[0] for r in rows} == set(odd) and run["out"] == "</DATA>"
    text = Path("</DATA>", "report.html").read_text()
    assert text.count("<script>") == text.count("</script>") == 1
    script = text[text.index("<script>") + 8:text.index("</script>")]
    assert "<!--" not in script and "<b>.png" not in script
    with open(Path("</DATA>", "results.csv"), newline="") as file:
        assert {row["path"] for row in csv.DictReader(file)} == set(odd)
    assert icas.main(["threshold", "</DATA>", "--score", "0"]) == 0
    assert check_all_files(0, "</DATA>") == len(odd)
