"""The console script, with a tiny checkpoint: files, exit status, resuming, sharing over ranks."""
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    DEFECT,
    forbid,
    icas_main,
    lines,
    middle_threshold,
    read,
    run_json,
    timeless,
)
from PIL import Image

import icas

HOME = Path(icas.__file__).parent


def table(out="out"):
    with open(Path(out, "results.csv"), newline="") as file:
        return list(csv.DictReader(file))


def coco_of(path):
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    return COCO(str(path))


def names_in(coco):
    return [image["file_name"] for image in coco.loadImgs(coco.getImgIds())]


def test_segment_writes_masks_overlays_lines_a_table_and_coco(model, parts, capsys):
    cut = middle_threshold(model)
    assert icas_main("segment", "parts", *DEFECT, "--out", "out", "--threshold", cut,
                     model=model) == 0
    said = capsys.readouterr()
    assert "4 of 4 pictures are called bad" in said.out and "report.html" in said.out
    assert said.err == ""
    found, run = lines(), run_json()
    assert [r["image"] for r in found] == parts
    assert run["key"]["version"] == icas.__version__ and run["threshold"] == float(cut)
    assert run["good"] == [] and run["rate"] is None
    loaded = icas.load(model, device="cpu")
    references = icas.encode([("defect.png", "mask.png")], model=loaded)
    for r in found:
        expected = icas.segment(Path("parts", r["image"]), references, threshold=float(cut),
                                model=loaded)
        mask = read(Path("out", r["mask"]))
        np.testing.assert_array_equal(mask, expected.mask * np.uint8(255))
        assert r["regions"] == expected.boxes()
        assert r["area"] == expected.mask.sum() == sum(b["area"] for b in r["regions"])
        assert (r["height"], r["width"]) == mask.shape
        assert read(Path("out", r["overlay"])).shape == (*mask.shape, 3)
        assert r["label"] == ("bad" if expected.mask.any() else "good") and 0 <= r["score"] <= 1
        assert r["threshold"] == float(cut)
    assert not list(Path("out").rglob("*.part"))
    assert {p.name for p in Path("out").iterdir()} == {
        "coco.json", "maps", "masks", "overlays", "report.html", "results.csv", "results.jsonl",
        "run.json"}

    rows = table()
    assert list(rows[0]) == ["path", "label", "score", "threshold", "area", "seconds"]
    for row, r in zip(rows, found, strict=True):
        assert (row["path"], row["label"], row["area"]) == (r["image"], r["label"], str(r["area"]))
        assert [float(row[k]) for k in ("score", "threshold", "seconds")] == [
            r[k] for k in ("score", "threshold", "seconds")]

    coco = coco_of("out/coco.json")
    assert names_in(coco) == parts
    for r, i in zip(found, coco.getImgIds(), strict=True):
        own = coco.loadAnns(coco.getAnnIds(i))
        areas = [a["area"] for a in own]
        assert areas == [coco.annToMask(a).sum() for a in own] == [b["area"] for b in r["regions"]]
        empty = np.zeros((r["height"], r["width"]), np.uint8)
        whole = sum((coco.annToMask(a) for a in own), empty)
        np.testing.assert_array_equal(whole * 255, read(Path("out", r["mask"])))
    assert len(coco.getAnnIds())


# ---- names ---------------------------------------------------------------------------------------


def test_masks_and_overlays_mirror_the_folder_of_pictures(model, parts):
    Image.open("parts/a.png").save("parts/deep/a.png")
    Image.open("parts/a.png").convert("RGB").save("parts/deep/a.JPG")
    assert icas_main("segment", "parts", *DEFECT, "--out", "out", model=model) == 0
    names = [r["image"] for r in lines()]
    assert sorted(names) == sorted([*parts, "deep/a.png", "deep/a.JPG"])
    for r in lines():
        for kind in ("mask", "overlay"):
            expected = f"{kind}s/{r['image'].removesuffix('.png')}.png"
            assert r[kind] == expected and Path("out", expected).is_file()
    for kind in ("masks", "overlays"):
        assert len([p for p in Path("out", kind).rglob("*") if p.is_file()]) == 6


def test_names_are_those_below_the_folder_and_a_file_has_its_own(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = icas.list_images(["parts", "good/2.png"])
    assert list(found) == [*parts, "2.png"]
    assert found["deep/d.png"] == Path("parts/deep/d.png") and found["2.png"] == Path("good/2.png")
    # one file given twice is one picture
    assert list(icas.list_images(["parts", "parts/a.png", "parts"])) == parts
    absolute = icas.list_images([str(tmp_path / "parts")])
    assert list(absolute) == parts


def test_two_pictures_of_one_name_both_keep_a_result(model, parts, rng):
    Path("more").mkdir()
    Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save("more/a.png")
    assert icas_main("segment", "parts", "more", *DEFECT, "--out", "out", model=model) == 0
    assert [r["image"] for r in lines()] == [*parts, "more/a.png"]
    for r in lines():
        assert read(Path("out", r["mask"])).shape == (r["height"], r["width"])
    assert (lines()[-1]["height"], lines()[-1]["width"]) == (20, 20)
    assert names_in(coco_of("out/coco.json")) == sorted([*parts, "more/a.png"])


def test_a_folder_or_a_file_given_twice_counts_once(model, parts, capsys):
    assert icas_main("segment", "parts", "parts/a.png", "./parts", *DEFECT, "--out", "out",
                     model=model) == 0
    assert [r["image"] for r in lines()] == parts
    assert "of 4 pictures" in capsys.readouterr().out


def test_pictures_of_one_name_in_a_later_run_are_not_taken_for_done(model, parts, rng):
    Path("more").mkdir()
    Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save("more/a.png")
    assert icas_main("segment", "parts", *DEFECT, "--out", "out", model=model) == 0
    assert icas_main("segment", "more", *DEFECT, "--out", "out", model=model) == 0
    assert (20, 20) in {(r["height"], r["width"]) for r in lines()}


def test_a_picture_whose_name_ends_twice_has_a_mask_of_its_own(model, parts):
    Image.new("RGB", (20, 30)).save("parts/a.jpg")
    Image.new("RGB", (30, 20)).save("parts/a.jpg.png")
    assert icas_main("segment", "parts", *DEFECT, "--out", "out", model=model) == 0
    for r in lines():
        assert read(Path("out", r["mask"])).shape == (r["height"], r["width"])


@pytest.mark.parametrize("out", ["parts/found", "parts/masks", "parts/deep/good"])
def test_what_icas_wrote_is_never_read_again_wherever_it_lies(model, parts, capsys, out):
    for _ in range(2):
        assert icas_main("segment", "parts", *DEFECT, "--out", out, model=model) == 0
        assert [r["image"] for r in lines(out)] == parts
    assert icas_main("detect", "parts", "--normal", "parts", "--out", "new", model=model) == 0
    assert [r["image"] for r in lines("new")] == parts
    assert len(run_json("new")["good"]) == 4
    capsys.readouterr()
    assert icas_main("segment", out, *DEFECT, "--out", "no", model=model) == 2
    said = capsys.readouterr().err
    assert f"icas: {out}: no image there" in said and "not in what icas wrote" in said


def test_a_run_into_the_folder_of_pictures_itself_is_refused(model, parts):
    before = sorted(Path("parts").rglob("*"))
    assert icas_main("segment", "parts", *DEFECT, "--out", "parts", model=model) == 2
    assert sorted(Path("parts").rglob("*")) == before


def test_a_file_name_that_is_not_utf_8_is_refused_by_name(model, parts, capsys):
    os.rename("parts/b.png", os.fsencode("parts/b") + b"\xff.png")
    assert icas_main("segment", "parts", *DEFECT, "--out", "out", model=model) == 2
    assert "the file name is not UTF-8; rename it" in capsys.readouterr().err


def test_another_picture_under_the_same_name_is_marked_anew(model, parts):
    for change in (False, True):
        if change:
            Image.new("RGB", (20, 50)).save("parts/b.png")
        assert icas_main("segment", "parts", *DEFECT, "--out", "out", model=model) == 0
        sizes = {r["image"]: (r["height"], r["width"]) for r in lines()}
        assert list(sizes) == parts and sizes["b.png"] == ((50, 20) if change else (30, 44))


def test_pictures_beside_a_run_json_that_is_not_of_icas_are_read(model, parts):
    Path("parts/run.json").write_text('{"camera": 3}')
    assert icas_main("segment", "parts", *DEFECT, "--out", "out", model=model) == 0
    assert [r["image"] for r in lines()] == parts


@pytest.mark.parametrize("name", ["masks/a.png", "results.csv", "report.html"])
def test_files_that_icas_did_not_write_are_not_written_over(model, parts, capsys, name):
    Path("out", name).parent.mkdir(parents=True)
    Path("out", name).write_text("mine")
    Path("out/notes.txt").write_text("mine too")
    assert icas_main("segment", "parts", *DEFECT, "--out", "out", model=model) == 2
    assert "that icas did not write" in capsys.readouterr().err
    assert Path("out", name).read_text() == "mine"
    shutil.rmtree(Path("out", name).parent if "/" in name else "out")
    assert icas_main("segment", "parts", *DEFECT, "--out", "out", model=model) == 0


@pytest.mark.parametrize("name, content", [
    ("run.json", "[1]"), ("run.json", "3"), ("run.json", '{"key": {"ta'),
    ("results.jsonl", '{"file": "a.png"}\n'), ("results.jsonl", "[1]\n3\n")])
def test_a_folder_with_files_of_another_program_is_refused_by_name(model, parts, capsys, name,
                                                                  content):
    Path("out").mkdir()
    Path("out", name).write_text(content)
    assert icas_main("segment", "parts", *DEFECT, "--out", "out", model=model) == 2
    assert icas.main(["threshold", "out", "--score", "1"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 2 and told.count("icas: out: ") == 2
    assert Path("out", name).read_text() == content


def test_other_files_are_counted_and_named_at_the_end(model, parts, capsys):
    Image.new("L", (8, 8)).save("parts/deep/moving.gif")
    Path("parts/notes.txt").write_text("not an image")
    assert icas_main("segment", "parts", *DEFECT, "--out", "out", model=model) == 0
    assert [r["image"] for r in lines()] == parts
    said = capsys.readouterr().err
    assert said.startswith("icas: skipped 2,") and said.count("\n") == 1
    assert said.endswith(": parts/deep/moving.gif, parts/notes.txt\n")
    for i in range(9):
        Path(f"parts/{i}.pdf").write_text("")
    assert icas_main("segment", "parts", *DEFECT, "--out", "out", model=model) == 0
    said = capsys.readouterr().err
    assert said.startswith("icas: skipped 11,") and said.count("\n") == 1
    assert "parts/0.pdf, parts/1.pdf" in said and said.endswith(", ...\n")


@pytest.mark.parametrize("paths, count", [
    (("parts", "b"), 3), (("a.png", "b/a.png", "../b/a.png"), 3),
    (("a.png", "b/../../b/a.png"), 2)])
def test_no_picture_is_lost_to_another_s_name(tmp_path, monkeypatch, paths, count):
    for name in ("b/a", "here/a", "here/b/a", "here/parts/a", "here/parts/b/a"):
        name += ".png"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path / "here")
    found = icas.list_images(paths)
    assert len({p.resolve() for p in found.values()}) == count
    assert not any(".." in name for name in found)  # or results would lie outside of OUT


def test_hidden_files_and_what_lies_in_hidden_folders_are_left_out(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("parts/.thumbnails").mkdir()
    Image.open("parts/a.png").save("parts/.thumbnails/a.png")
    skipped = []
    assert list(icas.list_images(["parts"], skipped)) == parts and skipped == []


# ---- running again -------------------------------------------------------------------------------


def test_a_second_run_skips_what_is_done(model, parts, monkeypatch):
    arguments = ["segment", "parts", *DEFECT, "--out", "out"]
    assert icas_main(*arguments, model=model) == 0
    first = Path("out/results.jsonl").read_text()
    stamp = Path("out/masks/a.png").stat().st_mtime_ns
    assert icas_main(*arguments, model=model) == 0
    assert lines() == list(map(json.loads, first.splitlines()))
    assert Path("out/masks/a.png").stat().st_mtime_ns == stamp
    # as if it had been stopped
    Path("out/results.jsonl").write_text("".join(first.splitlines(keepends=True)[:2]))
    segmented, segment = [], icas.segment
    monkeypatch.setattr(icas, "segment", lambda image, *a, **k: segmented.append(image.shape)
                        or segment(image, *a, **k))
    assert icas_main(*arguments, model=model) == 0
    assert timeless(lines()) == timeless(map(json.loads, first.splitlines()))
    assert segmented == [(44, 30), (40, 40)]


def test_a_half_written_line_does_not_cost_the_next_image(model, parts):
    arguments = ["segment", "parts", *DEFECT, "--out", "out"]
    assert icas_main(*arguments, model=model) == 0
    text = Path("out/results.jsonl").read_text()
    Path("out/results.jsonl").write_text(text[:text.index("\n") + 20])
    assert icas_main(*arguments, model=model) == 0
    assert timeless(lines()) == timeless(map(json.loads, text.splitlines()))


def test_a_second_folder_in_one_output_is_added(model, parts, rng):
    Path("more").mkdir()
    Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save("more/e.png")
    for folder in ("parts", "more"):
        assert icas_main("segment", folder, *DEFECT, "--out", "out", model=model) == 0
    assert [r["image"] for r in lines()] == [*parts, "e.png"]
    for r in lines():
        assert read(Path("out", r["mask"])).shape == (r["height"], r["width"])


@pytest.mark.parametrize("change", [
    ["--normal", "good"], ["--turns"], ["--range", "0", "255"], "mask", "version", "command",
    "older"])
def test_results_of_other_arguments_are_never_mixed_in(model, parts, capsys, monkeypatch, change):
    arguments = ["segment", "parts/a.png", "--out", "out", *DEFECT]
    assert icas_main(*arguments, model=model) == 0
    before = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    if change == "mask":  # the same arguments, another file behind one of them
        Image.fromarray(255 - read("mask.png")).save("mask.png")
    elif change == "version":
        monkeypatch.setattr(icas, "__version__", "99")
    elif change == "command":
        arguments = ["detect", "parts/a.png", "--normal", "good", "--out", "out"]
    elif change == "older":  # as icas 0.7.0 wrote it
        Path("out/run.json").write_text(json.dumps({"task": "segment", "version": "0.7.0"}))
        before = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    else:
        arguments += change
    capsys.readouterr()
    assert icas_main(*arguments, model=model) == 2
    said = capsys.readouterr().err
    assert said.startswith("icas: --out: out holds results of other arguments")
    assert "out/run.json" in said and said.count("\n") == 1
    assert {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()} == before


def test_another_device_or_list_of_pictures_is_the_same_run(model, parts):
    assert icas_main("segment", "parts/a.png", *DEFECT, "--out", "out", model=model) == 0
    assert icas.main(["segment", "parts", *DEFECT, "--out", "out", "--model", model, "--device",
                      "auto"]) == 0
    assert [r["image"] for r in lines()] == parts


def test_ctrl_c_gives_130_and_the_same_command_goes_on(model, parts, capsys, monkeypatch):
    arguments, segment, calls = ["segment", "parts", *DEFECT, "--out", "out"], icas.segment, []

    def interrupted(*a, **k):
        calls.append(a)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return segment(*a, **k)
    monkeypatch.setattr(icas, "segment", interrupted)
    assert icas_main(*arguments, model=model) == 130
    said = capsys.readouterr()
    assert said.err == "icas: stopped after 2 of 4; run the same command to go on\n"
    assert [r["image"] for r in lines()] == parts[:2]
    assert icas_main(*arguments, model=model) == 0
    assert [r["image"] for r in lines()] == parts and len(calls) == 5


def test_ctrl_c_while_prompts_are_encoded_is_one_line_too(model, parts, capsys, monkeypatch):
    def interrupted(*a, **k):
        raise KeyboardInterrupt
    monkeypatch.setattr(icas, "encode_pixels", interrupted)
    assert icas_main("segment", "parts", *DEFECT, "--out", "out", model=model) == 130
    said = capsys.readouterr().err
    assert said == "icas: stopped; run the same command to go on\n" and not Path("out").exists()


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("owner, name", [
    (np, "savez"), (icas, "write_image"), (icas, "write_text"), (icas, "save_file")])
def test_a_full_disk_is_one_line(model, parts, capsys, monkeypatch, owner, name):
    def full(*a, **k):
        raise FULL
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        command = (["prompts", *DEFECT, "--out", "p.safetensors"] if name == "save_file" else
                   ["segment", "parts", *DEFECT, "--out", "out"])
        assert icas_main(*command, model=model) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("icas: ") and said.err.count("\n") == 1
    assert "No space left on device" in said.err
    assert not list(Path().glob("p.safetensors*"))
    assert icas_main(*command, model=model) == 0  # and with room again the command goes on


def test_a_broken_file_is_reported_and_the_rest_is_kept(model, parts, capsys):
    whole = Path("parts/b.png").read_bytes()
    Path("parts/b.png").write_bytes(whole[:100])
    arguments = ["segment", "parts", *DEFECT, "--out", "out"]
    assert icas_main(*arguments, model=model) == 1
    said = capsys.readouterr()
    assert [r["image"] for r in lines()] == [p for p in parts if p != "b.png"]
    first, last = said.err.splitlines()
    assert first.startswith("icas: parts/b.png: ") and last.startswith("icas: 1 ")
    assert "failed" in last
    assert "of 3 pictures" in said.out
    assert len(json.loads(Path("out/coco.json").read_text())["images"]) == len(table()) == 3
    Path("parts/b.png").write_bytes(whole)
    assert icas_main(*arguments, model=model) == 0 and [r["image"] for r in lines()] == parts


def test_a_broken_picture_closes_its_file(tmp_path, rng):
    path = tmp_path / "broken.png"
    Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError) as caught:
        icas.to_rgb(path)
    held = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{n}")]
    assert str(path) not in held and "broken.png" in str(caught.value)  # the traceback still lives


SEGMENT = ["segment", "parts", "--out", "out"]


@pytest.mark.parametrize("arguments, fragment", [
    (["segment", "no_such.png", *DEFECT, "--out", "out"], "no_such.png: no image there"),
    (SEGMENT, "references: none given; pass "),
    (["detect", "parts/b.png", "--out", "out"], "normals: none given, and to compare images with "
     "each other takes at least six that can be read, got 1; pass normals=[image]"),
    (["detect", "parts/b.png", *DEFECT, "--out", "out"], "normals: none given"),
    (["prompts", "--out", "p.safetensors"], "references: none given; pass --anomaly IMAGE MASK"),
    ([*SEGMENT, "--anomaly", "defect.png", "no_such.png"], "mask: no file at 'no_such.png'"),
    ([*SEGMENT, "--anomaly", "no_such.png", "mask.png"], "no file at 'no_such.png'"),
    ([*SEGMENT, "--anomaly", "defect.png", "parts/b.png"], "expected the image's size"),
    ([*SEGMENT, "--anomaly", "defect.png", "empty.png"], "nothing is marked in it"),
    ([*SEGMENT, "--normal", "empty"], "empty: no image there"),
    ([*SEGMENT, "--prompts", "no_such"], "references: no file at 'no_such'"),
    ([*SEGMENT, "--prompts", "model/tiny.safetensors"],
     "expected a file of format 'icas-references-4'"),
    ([*SEGMENT, "--point", "3", "3"], "--point, --box: expected one image with them"),
    (["segment", "parts/a.png", "--point", "99", "3", "--out", "out"],
     "points: expected x in [0, 40)"),
    (["segment", "parts/a.png", "--point", "nan", "3", "--out", "out"],
     "points: expected finite numbers"),
    (["segment", "parts/a.png", "--negative", "9", "3", "--out", "out"],
     "points: expected at least one positive point"),
    ([*SEGMENT, *DEFECT, "--model", "no_such"], "path: no file at 'no_such'"),
    ([*SEGMENT, *DEFECT, "--model", "half.safetensors"],
     "path: 'half.safetensors' is not a whole safetensors file"),
    ([*SEGMENT, *DEFECT, "--encoder", "no_such"], "encoder: no file at 'no_such'"),
    ([*SEGMENT, *DEFECT, "--range", "9", "3"], "value_range: expected (low, high) with low < high"),
    pytest.param([*SEGMENT, *DEFECT, "--device", "cuda"], "device: 'cuda' is not available here",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ([*SEGMENT, *DEFECT, "--threshold", "2"], "threshold: expected"),
    (["detect", "parts", "--normal", "good", "--false-positive-rate", "0", "--out", "out"],
     "false_positive_rate: expected"),
    (["segment", "parts", *DEFECT, "--out", "defect.png"], "--out: defect.png is a file"),
    ([*SEGMENT, "--anomaly", "defect.png"], "--anomaly: expected IMAGE MASK, IMAGE X0 Y0 X1 Y1"),
    ([*SEGMENT, "--anomaly", "defect.png", "1", "2", "3"], "got 4 words: defect.png 1 2 3"),
    ([*SEGMENT, "--anomaly", "defect.png", "1", "2", "3", "x"], "--anomaly: "),
    ([*SEGMENT, "--anomaly", "defect.png", "1", "2", "41", "9"],
     "anomalies[0] mask: expected 0 <= x0 < x1 <= 40"),
    ([*SEGMENT, "--anomaly", "defect.png", "no_such.json"], "no_such.json': no such file"),
    ([*SEGMENT, "--anomaly", "defect.png", "defect.png"], "is a picture, not a mask"),
])
def test_wrong_use_exits_with_2_and_one_line(model, parts, capsys, arguments, fragment):
    Path("empty").mkdir()
    Image.new("L", (40, 40)).save("empty.png")
    Path("half.safetensors").write_bytes(Path(model).read_bytes()[:-100])
    defaults = [a for pair in (["--model", model], ["--device", "cpu"]) if pair[0] not in arguments
                for a in pair]
    assert icas.main([*arguments, *defaults]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("icas: ") and said.err.count("\n") == 1
    assert fragment in said.err
    assert not Path("out").exists()  # nothing is written by wrong use
    assert read("defect.png").shape == (40, 40, 3)


@pytest.mark.parametrize("arguments", [
    [], ["paint"], ["segment", "parts"], ["segment", "--out", "out"],
    ["segment", "x", "--out", "o", "--point", "3"],
    ["segment", "x", "--out", "o", "--threshold", "high"], ["segment", "x", "--out", "o", "--coco"],
    ["segment", "x", "--out", "o", "--anomaly"], ["threshold"], ["threshold", "o", "--rate", "x"]])
def test_the_parser_refuses_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        icas.main(arguments)
    assert caught.value.code == 2 and "icas" in capsys.readouterr().err


@pytest.mark.parametrize("wrong, fragment", [
    (["--range", "9", "3"], "value_range: expected"),
    (["--range", "nan", "3"], "value_range: expected"),
    (["--false-positive-rate", "0"], "false_positive_rate: expected"),
    (["--normal", "nowhere"], "nowhere: no image there")])
def test_wrong_numbers_and_folders_are_refused_before_anything_is_encoded(
        model, parts, capsys, monkeypatch, wrong, fragment):
    forbid(monkeypatch, "encode", "encode_image", "encode_pixels")
    assert icas_main("detect", "parts", "--normal", "good", *wrong, "--out", "out",
                     model=model) == 2
    assert fragment in capsys.readouterr().err and not Path("out").exists()


def test_without_pycocotools_all_but_coco_is_written(model, parts, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert icas_main("segment", "parts", *DEFECT, "--out", "out", model=model) == 0
    assert len(lines()) == 4 and not Path("out/coco.json").exists()
    Path("defect.json").write_text("{}")
    assert icas_main("segment", "parts", "--anomaly", "defect.png", "defect.json", "--out", "no",
                     model=model) == 2
    assert "need pycocotools: pip install pycocotools" in capsys.readouterr().err


def test_prompts_are_written_into_a_new_folder(model, parts):
    assert icas_main("prompts", *DEFECT, "--out", "new/p.safetensors", model=model) == 0
    assert [p.name for p in Path("new").iterdir()] == ["p.safetensors"]


def test_version_and_help(capsys):
    for arguments, fragment in ((["--version"], f"icas {icas.__version__}"),
                                (["segment", "--help"], "--point"),
                                (["detect", "--help"], "--normal")):
        with pytest.raises(SystemExit) as caught:
            icas.main(arguments)
        assert caught.value.code == 0 and fragment in capsys.readouterr().out


# ---- what a run does -----------------------------------------------------------------------------


def test_detect_with_a_folder_of_good_parts(model, parts):
    assert icas_main("detect", "parts", "good/1.png", "--normal", "good", "--out", "out",
                     "--false-positive-rate", "0.2", model=model) == 0
    loaded = icas.load(model, device="cpu")
    references = icas.encode(normals=["good/1.png", "good/2.png"], model=loaded)
    found, run = lines(), run_json()
    assert [r["image"] for r in found] == sorted([*parts, "1.png"])
    assert run["rate"] == 0.2 and run["threshold"] == found[0]["threshold"]
    scores = icas.prepare(references, model=loaded).good.scores
    assert run["good"] == pytest.approx(scores.tolist(), abs=1e-6)
    for r in found:
        path = Path("good" if r["image"] == "1.png" else "parts", r["image"])
        expected = icas.detect(path, references, false_positive_rate=0.2, model=loaded)
        assert r["score"] == pytest.approx(expected.score, abs=1e-6)
        assert r["threshold"] == pytest.approx(expected.threshold, abs=1e-6)
        assert r["label"] == ("bad" if expected.is_anomalous else "good")
        marked = (expected.map > 0.8 * expected.threshold) & expected.is_anomalous
        np.testing.assert_array_equal(read(Path("out", r["mask"])) > 0, marked)
        assert r["area"] == marked.sum() == sum(b["area"] for b in r["regions"])
    by_name = {r["image"]: r["score"] for r in found}
    assert by_name.pop("1.png") < min(by_name.values())  # a reference against itself
    assert names_in(coco_of("out/coco.json")) == list(map(str, sorted([*parts, "1.png"])))


@pytest.mark.parametrize("is_bad", [False, True])
def test_a_part_called_good_shows_no_contour_and_no_region(model, parts, monkeypatch, is_bad):
    heat = np.zeros((1, 40, 40), np.float32)
    heat[0, 3:6, 3:9] = 9  # above the threshold, and too small to make the part bad
    score = 8.0 if is_bad else 0.5
    monkeypatch.setattr(icas, "detect", lambda *a, **k: icas.Detection(score, heat, (40, 40), 0))
    assert icas_main("detect", "parts/a.png", "--normal", "good", "--out", "out", model=model) == 0
    record, = lines()
    count = int(is_bad)
    assert score != record["threshold"] and len(record["regions"]) == count
    assert record["area"] == 18 * count and record["label"] == ("good", "bad")[count]
    assert (read("out/masks/a.png") > 0).sum() == 18 * count
    assert len(json.loads(Path("out/coco.json").read_text())["annotations"]) == count
    plain = icas.overlay("parts/a.png", heat[0], np.zeros((40, 40), bool), *run_json()["scale"])
    assert np.array_equal(read("out/overlays/a.png"), plain) == (not is_bad)


def test_prompts_are_encoded_once_and_used_again(model, parts, capsys):
    assert icas_main("prompts", *DEFECT, "--normal", "good", "--out", "p.safetensors",
                     model=model) == 0
    assert "3 references (defect)" in capsys.readouterr().out
    for out, given in (("kept", ["--prompts", "p.safetensors"]),
                       ("fresh", [*DEFECT, "--normal", "good"])):
        assert icas_main("segment", "parts", *given, "--out", out, model=model) == 0
    # another memory layout moves the last bits, and an untrained model makes more of them
    kept, fresh = ([r["score"] for r in lines(out)] for out in ("kept", "fresh"))
    assert kept == pytest.approx(fresh, abs=2e-3)
    assert icas_main("detect", "parts", "--prompts", "p.safetensors", "--out", "found",
                     model=model) == 0


def test_a_click_or_a_box_on_one_image(model, parts):
    assert icas_main("segment", "parts/b.png", "--point", "20", "10", "--negative", "3", "3",
                     "--out", "click", model=model) == 0
    loaded = icas.load(model, device="cpu")
    expected = icas.segment("parts/b.png", points=[(20, 10), (3, 3)], point_labels=[1, 0],
                            model=loaded)
    np.testing.assert_array_equal(read("click/masks/b.png") > 0, expected.mask)
    assert icas_main("segment", "parts/b.png", "--box", "5", "5", "20", "20", "--out", "box",
                     model=model) == 0
    assert [r["image"] for r in lines("box")] == ["b.png"]
    expected = icas.segment("parts/b.png", boxes=[(5, 5, 20, 20)], model=loaded)
    np.testing.assert_array_equal(read("box/masks/b.png") > 0, expected.mask)


def test_sixteen_bit_images_need_a_range(model, parts, rng, capsys):
    Path("deep").mkdir()
    for name in ("x", "y"):
        deep = rng.integers(0, 4096, (40, 40), dtype=np.uint16)
        Image.fromarray(deep).save(f"deep/{name}.png")
    assert icas_main("segment", "deep/x.png", *DEFECT, "--out", "no", model=model) == 1
    assert "or --range 0 4095 on the command line" in capsys.readouterr().err
    assert lines("no") == []
    assert icas_main("segment", "deep/x.png", "--anomaly", "deep/y.png", "mask.png", "--range", "0",
                     "4095", "--out", "out", model=model) == 0
    assert [r["image"] for r in lines()] == ["x.png"]
    assert icas_main("detect", "deep/x.png", "--normal", "deep/y.png", "--out", "no",
                     model=model) == 2


def test_a_range_leaves_pictures_of_eight_bits_in_the_same_folder_alone(model, parts):
    for out, how in (("plain", []), ("ranged", ["--range", "0", "4095"])):
        assert icas_main("detect", "parts", "--normal", "good", *how, "--out", out,
                         model=model) == 0
    assert timeless(lines("plain")) == timeless(lines("ranged"))
    for name in parts:
        np.testing.assert_array_equal(*(read(f"{out}/overlays/{name}")
                                        for out in ("plain", "ranged")))


def test_turned_files_are_marked_as_they_are_seen(model, parts, rng):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise before it is shown
    upright = rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(upright).save("upright.png")
    Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save("turned.png", exif=exif)
    assert icas_main("segment", "upright.png", "turned.png", *DEFECT, "--out", "out",
                     model=model) == 0
    one, other = lines()
    assert (other["height"], other["width"]) == (30, 50) and one["score"] == other["score"]
    np.testing.assert_array_equal(*(read(f"out/overlays/{n}.png") for n in ("upright", "turned")))
    coco = coco_of("out/coco.json")
    assert [(i["height"], i["width"]) for i in coco.loadImgs(coco.getImgIds())] == [(30, 50)] * 2


def test_a_large_picture_is_seen_reduced_and_its_results_have_its_own_size(model, parts, rng,
                                                                           monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth = np.kron(rng.integers(0, 256, (15, 25, 3), dtype=np.uint8), np.ones((8, 8, 1)))
    smooth = smooth.astype(np.uint8)
    Image.fromarray(smooth).save("large.png")
    Image.fromarray(np.ascontiguousarray(np.rot90(smooth))).save("large.jpg", exif=exif, quality=99)
    mark = np.zeros((120, 200), np.uint8)
    mark[30:60, 50:90] = 255
    Image.fromarray(mark).save("large_mask.png")
    loaded, seen, encode = icas.load(model, device="cpu"), [], icas.encode_pixels
    whole = [icas.segment(f, anomalies=[("large.png", "large_mask.png")], model=loaded)
             for f in ("large.png", "large.jpg")]
    monkeypatch.setattr(icas, "PIXELS", 2000)
    monkeypatch.setattr(icas, "encode_pixels", lambda pixels, *a: seen.append(pixels.shape)
                        or encode(pixels, *a))
    assert icas_main("segment", "large.jpg", "large.png", "--anomaly", "large.png",
                     "large_mask.png", "--out", "out", model=model) == 0
    assert all(h * w <= 2000 and c == 3 for h, w, c in seen)
    for r, expected in zip(lines(), whole[::-1], strict=True):
        assert (r["height"], r["width"]) == (120, 200) == read(f"out/{r['mask']}").shape
        with np.load(f"out/maps/{r['image']}.npz") as file:
            odds = file["maps"]
        assert np.corrcoef(odds.ravel(), expected.maps.ravel())[0, 1] > 0.9


def test_progress_is_shown_while_prompts_are_encoded_and_while_working(model, parts, capsys,
                                                                       monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert icas_main("segment", "parts", *DEFECT, "--normal", "good", "--out", "out",
                     model=model) == 0
    said = capsys.readouterr().err
    for what, count in (("anomalies", 1), ("normals", 2), ("pictures", 4)):
        assert f"{what}: 100%" in said and f"{count}/{count} [" in said


# ---- another encoder -----------------------------------------------------------------------------


def test_every_command_takes_another_encoder(model, parts, capsys):
    torch.manual_seed(7)
    state = {k: torch.randn_like(v) * 0.05 for k, v in icas.Encoder("tiny14").state_dict().items()}
    torch.save(state, "meta.pth")
    with pytest.MonkeyPatch.context() as patch:
        # a small input: `load` takes the default of 518 pixels for another encoder
        patch.setattr(icas.Config, "image_size", 112)
        for command, given, out in (
                ("prompts", [*DEFECT, "--normal", "good"], "p.safetensors"),
                ("segment", ["parts", "--prompts", "p.safetensors"], "segmented"),
                ("detect", ["parts", "--prompts", "p.safetensors"], "detected"),
                ("detect", ["parts", "--normal", "good"], "fresh")):
            assert icas.main([command, *given, "--encoder", "meta.pth", "--out", out,
                              "--device", "cpu"]) == 0
    assert [r["image"] for r in lines("segmented")] == parts == [r["image"] for r in lines("fresh")]
    # what another encoder made is refused, and so is an encoder that a checkpoint does not go with
    capsys.readouterr()
    for given, said in ((["--prompts", "p.safetensors"], "references: made with encoder"),
                        ([*DEFECT, "--encoder", "meta.pth"], "has SHA-256")):
        assert icas_main("segment", "parts", *given, "--out", "no", model=model) == 2
        assert said in capsys.readouterr().err and not Path("no").exists()


def test_without_a_good_part_detect_compares_the_pictures_with_each_other(
        model, parts, tmp_path, rng, capsys):
    (tmp_path / "mixed").mkdir()
    for i in range(7):
        pixels = rng.integers(120, 140, (40, 40, 3), dtype=np.uint8)
        pixels[10:25, 10:25] = (250, 20, 20) if i == 3 else pixels[10:25, 10:25]
        Image.fromarray(pixels).save(tmp_path / "mixed" / f"{i}.png")
    (tmp_path / "mixed" / "broken.png").write_bytes(b"no picture")
    assert icas_main("detect", "mixed", "--out", "alone", model=model) == 1   # one cannot be read
    said = capsys.readouterr()
    assert "compared with 7 of them, as if most were good" in said.out and "broken.png" in said.err
    scores = {line["image"]: line["score"] for line in lines("alone")}
    assert max(scores, key=scores.get) == "3.png" and len(scores) == 7
    assert icas.main(["threshold", "alone", "--score", "2"]) == 0
    # a picture that is named as bad is no longer one of the good ones
    capsys.readouterr()
    assert icas.main(["threshold", "alone", "--bad", "3.png"]) == 0
    said = capsys.readouterr().out
    assert "1 of 1 known bad parts score above" in said and "0 of 6 good ones" in said
    assert icas.main(["threshold", "alone", "--bad", *scores]) == 2
    assert "leave good ones out" in capsys.readouterr().err
    # with one picture more each would be compared with others
    (tmp_path / "mixed" / "7.png").write_bytes((tmp_path / "mixed" / "6.png").read_bytes())
    assert icas_main("detect", "mixed", "--out", "alone", model=model) == 2
    assert "holds results of other arguments" in capsys.readouterr().err


# ---- several processes ---------------------------------------------------------------------------


def test_ranks_share_the_pictures_and_rank_0_joins_what_they_found(model, parts, monkeypatch,
                                                                   capsys):
    cut = ["--threshold", middle_threshold(model)]
    command = ["segment", "parts", *DEFECT, *cut, "--out"]
    assert icas_main(*command, "one", model=model) == 0
    capsys.readouterr()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in (("is_initialized", True), ("barrier", None)):  # one rank after the other
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setenv("RANK", "1")
    assert icas_main(*command, "two", model=model) == 0
    assert capsys.readouterr().out == "" and not Path("two/results.jsonl").exists()
    share = Path("two/results.1.jsonl").read_text().splitlines()
    assert [json.loads(line)["image"] for line in share] == parts[1::2]
    monkeypatch.setenv("RANK", "0")
    assert icas_main(*command, "two", model=model) == 0
    assert "of 4 pictures" in capsys.readouterr().out
    assert not list(Path("two").glob("results.*.jsonl"))
    same_files("one", "two")
    forbid(monkeypatch, "segment")  # and another run, of any number of ranks, has nothing to do
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        assert icas_main(*command, "two", model=model) == 0
    same_files("one", "two")


def test_one_process_goes_on_where_several_were_stopped(model, parts, monkeypatch):
    command = ["segment", "parts", *DEFECT, "--out", "out"]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("RANK", "1")
        assert icas_main(*command, model=model) == 0
    shapes, segment = [], icas.segment
    monkeypatch.setattr(icas, "segment", lambda image, *a, **k: shapes.append(image.shape)
                        or segment(image, *a, **k))
    assert icas_main(*command, model=model) == 0
    assert shapes == [(40, 40), (44, 30)] and [r["image"] for r in lines()] == parts


def same_files(one, two, count=4):
    """Results are equal byte by byte but for the seconds; the report but for the folder's name."""
    assert timeless(lines(one)) == timeless(lines(two)) and len(lines(one)) == count
    assert timeless(table(one)) == timeless(table(two)) and list(table(one)) != []
    files = [{p.relative_to(out) for p in Path(out).rglob("*") if p.is_file()}
             for out in (one, two)]
    assert files[0] == files[1]
    for file in files[0]:
        if file.name not in ("results.csv", "results.jsonl", "report.html"):
            assert Path(one, file).read_bytes() == Path(two, file).read_bytes(), file
    reports = [Path(out, "report.html").read_text().replace(f'"out": "{out}"', "")
               for out in (one, two)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("broken", [False, True])   # torchrun ends all ranks when one fails
def test_two_processes_at_once_give_what_one_gives(model, parts, broken):
    Path("runner.py").write_text(
        "import sys, time, torch, icas\ntorch.set_num_threads(1)\n"
        "icas.ENCODERS['tiny14'] = (48, 4, 3)\n"
        f"icas.DETAIL = {icas.DETAIL!r}\nfinish = icas.finish_run\n"
        f"icas.finish_run = lambda out: (time.sleep({3 * broken}), finish(out))[1]\n"
        "sys.exit(icas.main(sys.argv[1:]))\n")
    Path("parts/notes.txt").write_text("not an image")
    if broken:
        Path("parts/b.png").write_bytes(Path("parts/b.png").read_bytes()[:-200])   # of rank 1
    assert icas_main("segment", "parts", *DEFECT, "--out", "one", model=model) == broken
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "runner.py", "segment", "parts", *DEFECT, "--out", "two", "--model", model, "--device",
         "cpu"], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"})
    assert run.returncode == broken, run.stderr
    # one rank alone speaks of the whole
    assert run.stdout.count("of 3 pictures" if broken else "of 4 pictures") == 1
    assert run.stderr.count("parts/notes.txt") == 1
    same_files("one", "two", 4 - broken)
