"""The console script, with a tiny checkpoint: files, exit status, resuming, sharing over ranks."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import icas

HOME = Path(icas.__file__).parent


@pytest.fixture
def model(checkpoint, tmp_path, monkeypatch):
    """The tiny checkpoint by a relative path: the working folder is tmp_path."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return str(checkpoint.relative_to(tmp_path))


@pytest.fixture
def parts(rng, tmp_path):
    """Four parts, one defect with its mask, two good parts. returns the parts' names in a run."""
    for folder in ("parts/deep", "good"):
        (tmp_path / folder).mkdir(parents=True)
    square = ("parts/a", "parts/deep/d", "defect", "good/1", "good/2")
    sizes = dict.fromkeys(square, (40, 40)) | {"parts/b": (30, 44), "parts/c": (44, 30)}
    for name, shape in sizes.items():
        noise = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
    mask = np.zeros((40, 40), np.uint8)
    mask[10:20, 10:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "parts" / "notes.txt").write_text("not an image, and not asked for")
    (tmp_path / "parts" / "._a.png").write_text("macOS")
    return ["a.png", "b.png", "c.png", "deep/d.png"]


DEFECT = ["--anomaly", "defect.png", "mask.png"]


def icas_main(*arguments, model):
    return icas.main([*arguments, "--model", model, "--device", "cpu"])


def lines(out="out"):
    return [json.loads(line) for line in Path(out, "results.jsonl").read_text().splitlines()]


def timeless(records):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def read(path):
    return np.array(Image.open(path))


def middle_threshold(model):
    """A threshold at which an untrained model marks something and not everything."""
    loaded = icas.load(model, device="cpu")
    references = icas.encode([("defect.png", "mask.png")], model=loaded)
    found = icas.segment("parts/a.png", references, model=loaded)
    return str(round(float(np.median(found.score)), 4))


def test_segment_writes_masks_overlays_lines_and_coco(model, parts, capsys):
    cut = middle_threshold(model)
    assert icas_main("segment", "parts", *DEFECT, "--out", "out", "--threshold", cut,
                     "--coco", "out/coco.json", model=model) == 0
    assert "4 of 4 images" in capsys.readouterr().out
    found = lines()
    assert [r["image"] for r in found] == parts
    run = json.loads(Path("out/run.json").read_text())
    assert run["version"] == icas.__version__ and run["arguments"]["threshold"] == float(cut)
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
        assert r["label"] == ("defect" if expected.mask.any() else "good") and 0 <= r["score"] <= 1
        assert r["threshold"] == float(cut)
    assert not list(Path("out").rglob("*.part"))

    coco = coco_of("out/coco.json")
    assert [i["file_name"] for i in coco.loadImgs(coco.getImgIds())] == parts
    for r, i in zip(found, coco.getImgIds(), strict=True):
        own = coco.loadAnns(coco.getAnnIds(i))
        areas = [a["area"] for a in own]
        assert areas == [coco.annToMask(a).sum() for a in own] == [b["area"] for b in r["regions"]]
        empty = np.zeros((r["height"], r["width"]), np.uint8)
        whole = sum((coco.annToMask(a) for a in own), empty)
        np.testing.assert_array_equal(whole * 255, read(Path("out", r["mask"])))
    assert len(coco.getAnnIds())


def coco_of(path):
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    return COCO(str(path))


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


@pytest.mark.parametrize("paths, count", [
    (("parts", "b"), 3), (("a.png", "b/a.png", "../b/a.png"), 3)])
def test_no_picture_is_lost_to_another_s_name(tmp_path, monkeypatch, paths, count):
    for name in ("b/a", "here/a", "here/b/a", "here/parts/a", "here/parts/b/a"):
        name += ".png"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path / "here")
    found = icas.list_images(paths)
    assert len({p.resolve() for p in found.values()}) == count


# ---- running again -------------------------------------------------------------------------------


def test_a_second_run_skips_what_is_done(model, parts, monkeypatch):
    arguments = ["segment", "parts", *DEFECT, "--out", "out"]
    assert icas_main(*arguments, model=model) == 0
    first = Path("out/results.jsonl").read_text()
    stamp = Path("out/masks/a.png").stat().st_mtime_ns
    assert icas_main(*arguments, model=model) == 0
    assert Path("out/results.jsonl").read_text() == first
    assert Path("out/masks/a.png").stat().st_mtime_ns == stamp
    # as if it had been stopped
    Path("out/results.jsonl").write_text("".join(first.splitlines(keepends=True)[:2]))
    segmented, segment = [], icas.segment
    monkeypatch.setattr(icas, "segment", lambda image, *a, **k: segmented.append(image.shape)
                        or segment(image, *a, **k))
    assert icas_main(*arguments, model=model) == 0
    assert timeless(lines()) == timeless(map(json.loads, first.splitlines()))
    assert segmented == [(44, 30, 3), (40, 40, 3)]


def test_a_half_written_line_does_not_cost_the_next_image(model, parts):
    arguments = ["segment", "parts", *DEFECT, "--out", "out"]
    assert icas_main(*arguments, model=model) == 0
    text = Path("out/results.jsonl").read_text()
    Path("out/results.jsonl").write_text(text[:text.index("\n") + 20])
    assert icas_main(*arguments, model=model) == 0
    broken = Path("out/results.jsonl").read_text().splitlines()
    assert len(broken) == 5 and broken.pop(1) == text[text.index("\n") + 1:][:19]
    assert [json.loads(line)["image"] for line in broken] == parts
    assert icas_main(*arguments, model=model) == 0  # and a third run has nothing to do
    assert len(Path("out/results.jsonl").read_text().splitlines()) == 5


def test_a_second_folder_in_one_output_is_added(model, parts, rng):
    Path("more").mkdir()
    Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save("more/e.png")
    for folder in ("parts", "more"):
        assert icas_main("segment", folder, *DEFECT, "--out", "out", model=model) == 0
    assert [r["image"] for r in lines()] == [*parts, "e.png"]
    for r in lines():
        assert read(Path("out", r["mask"])).shape == (r["height"], r["width"])


@pytest.mark.parametrize("change", [
    ["--threshold", "0.3"], ["--normal", "good"], ["--turns"], ["--range", "0", "255"], "mask",
    "version", "command"])
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
    else:
        arguments += change
    capsys.readouterr()
    assert icas_main(*arguments, model=model) == 2
    said = capsys.readouterr().err
    assert said.startswith("icas: --out: out holds results of other arguments")
    assert "out/run.json" in said and said.count("\n") == 1
    assert {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()} == before


def test_another_device_or_list_of_pictures_or_coco_file_is_the_same_run(model, parts):
    assert icas_main("segment", "parts/a.png", *DEFECT, "--out", "out", model=model) == 0
    assert icas.main(["segment", "parts", *DEFECT, "--out", "out", "--model", model, "--device",
                      "auto", "--coco", "coco.json"]) == 0
    assert [r["image"] for r in lines()] == parts and Path("coco.json").is_file()


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
    assert said.err == "icas: stopped; run the same command to go on\n"
    assert [r["image"] for r in lines()] == parts[:2]
    assert icas_main(*arguments, model=model) == 0
    assert [r["image"] for r in lines()] == parts and len(calls) == 5


def test_a_broken_file_is_reported_and_the_rest_is_kept(model, parts, capsys):
    Path("parts/b.png").write_bytes(Path("parts/b.png").read_bytes()[:100])
    assert icas_main("segment", "parts", *DEFECT, "--out", "out", "--coco", "coco.json",
                     model=model) == 1
    said = capsys.readouterr()
    assert [r["image"] for r in lines()] == [p for p in parts if p != "b.png"]
    assert said.err.startswith("icas: parts/b.png: ") and said.err.count("\n") == 1
    assert "3 of 4 images" in said.out and "1 failed" in said.out
    assert len(json.loads(Path("coco.json").read_text())["images"]) == 3


SEGMENT = ["segment", "parts", "--out", "out"]


@pytest.mark.parametrize("arguments, fragment", [
    (["segment", "no_such.png", *DEFECT, "--out", "out"], "no_such.png: no image there"),
    (SEGMENT, "references: none given; pass "),
    (["detect", "parts", "--out", "out"],
     "detect needs at least one good part; pass normals=[image] (--normal IMAGE)"),
    (["detect", "parts", *DEFECT, "--out", "out"], "detect needs at least one good part"),
    (["prompts", "--out", "p.safetensors"], "references: none given; pass --anomaly IMAGE MASK"),
    ([*SEGMENT, "--anomaly", "defect.png", "no_such.png"], "mask: no file at 'no_such.png'"),
    ([*SEGMENT, "--anomaly", "no_such.png", "mask.png"], "no file at 'no_such.png'"),
    ([*SEGMENT, "--anomaly", "defect.png", "parts/b.png"], "expected the image's size"),
    ([*SEGMENT, "--anomaly", "defect.png", "empty.png"], "nothing is marked in it"),
    ([*SEGMENT, "--normal", "empty"], "empty: no image there"),
    ([*SEGMENT, "--prompts", "no_such"], "references: no file at 'no_such'"),
    ([*SEGMENT, "--prompts", "model/tiny.safetensors"],
     "expected a file of format 'icas-references-2'"),
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
    (["segment", "parts", *DEFECT, "--out", "defect.png"], "defect.png"),
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


@pytest.mark.parametrize("arguments", [
    [], ["paint"], ["segment", "parts"], ["segment", "--out", "out"],
    ["segment", "x", "--out", "o", "--point", "3"],
    ["segment", "x", "--out", "o", "--threshold", "high"],
    ["segment", "x", "--out", "o", "--anomaly", "one"]])
def test_the_parser_refuses_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        icas.main(arguments)
    assert caught.value.code == 2 and "icas" in capsys.readouterr().err


def test_version_and_help(capsys):
    for arguments, fragment in ((["--version"], f"icas {icas.__version__}"),
                                (["segment", "--help"], "--point"),
                                (["detect", "--help"], "--normal")):
        with pytest.raises(SystemExit) as caught:
            icas.main(arguments)
        assert caught.value.code == 0 and fragment in capsys.readouterr().out


# ---- what a run does -----------------------------------------------------------------------------


def test_detect_with_a_folder_of_good_parts(model, parts):
    assert icas_main("detect", "parts", "good/1.png", "--normal", "good", "--out", "out", "--coco",
                     "out/coco.json", "--false-positive-rate", "0.2", model=model) == 0
    loaded = icas.load(model, device="cpu")
    references = icas.encode(normals=["good/1.png", "good/2.png"], model=loaded)
    found = lines()
    assert [r["image"] for r in found] == [*parts, "1.png"]
    for r in found:
        path = Path("good" if r["image"] == "1.png" else "parts", r["image"])
        expected = icas.detect(path, references, false_positive_rate=0.2, model=loaded)
        assert r["score"] == pytest.approx(expected.score, abs=1e-6)
        assert r["threshold"] == pytest.approx(expected.threshold, abs=1e-6)
        assert r["label"] == ("anomalous" if expected.is_anomalous else "good")
        marked = (expected.map > expected.threshold) & expected.is_anomalous
        np.testing.assert_array_equal(read(Path("out", r["mask"])) > 0, marked)
        assert r["area"] == marked.sum() == sum(b["area"] for b in r["regions"])
    assert found[-1]["score"] < min(r["score"] for r in found[:-1])  # a reference against itself
    assert json.loads(Path("out/coco.json").read_text())["images"][0]["file_name"] == "a.png"


@pytest.mark.parametrize("is_anomalous", [False, True])
def test_a_part_called_good_shows_no_region(model, parts, monkeypatch, is_anomalous):
    heat = np.zeros((40, 40), np.float32)
    heat[3:6, 3:9] = 2  # above the threshold, and too small to make the part anomalous
    score = 1.5 if is_anomalous else 0.5
    monkeypatch.setattr(icas, "detect", lambda *a, **k: icas.Detection(score, heat, 1.0,
                                                                       is_anomalous))
    assert icas_main("detect", "parts/a.png", "--normal", "good", "--out", "out", "--coco",
                     "coco.json", model=model) == 0
    record, = lines()
    count = int(is_anomalous)
    assert len(record["regions"]) == count and record["area"] == 18 * count
    assert record["label"] == ("good", "anomalous")[count]
    assert (read("out/masks/a.png") > 0).sum() == 18 * count
    assert len(json.loads(Path("coco.json").read_text())["annotations"]) == count


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
    assert "--range LOW HIGH" in capsys.readouterr().err
    assert not Path("no/results.jsonl").exists()
    assert icas_main("segment", "deep/x.png", "--anomaly", "deep/y.png", "mask.png", "--range", "0",
                     "4095", "--out", "out", model=model) == 0
    assert [r["image"] for r in lines()] == ["x.png"]
    assert icas_main("detect", "deep/x.png", "--normal", "deep/y.png", "--out", "no",
                     model=model) == 2


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


# ---- another encoder -----------------------------------------------------------------------------


def test_every_command_takes_another_encoder(model, parts, capsys):
    torch.manual_seed(7)
    state = {k: torch.randn_like(v) * 0.05 for k, v in icas.Encoder("tiny14").state_dict().items()}
    torch.save(state, "meta.pth")
    with pytest.MonkeyPatch.context() as patch:
        # a small input: `load` takes the default of 518 pixels for an encoder without a decoder
        config = icas.Config
        patch.setattr(icas, "Config", lambda name: config(name, image_size=112, debias=4))
        for command, given, out in (
                ("prompts", [*DEFECT, "--normal", "good"], "p.safetensors"),
                ("segment", ["parts", "--prompts", "p.safetensors"], "segmented"),
                ("detect", ["parts", "--prompts", "p.safetensors"], "detected"),
                ("detect", ["parts", "--normal", "good"], "fresh")):
            with pytest.warns(UserWarning, match=r"meta.pth.*train.py"):
                assert icas.main([command, *given, "--encoder", "meta.pth", "--out", out,
                                  "--device", "cpu"]) == 0
    assert [r["image"] for r in lines("segmented")] == parts == [r["image"] for r in lines("fresh")]
    # what another encoder made is refused, and so is an encoder that a checkpoint does not go with
    capsys.readouterr()
    for given, said in ((["--prompts", "p.safetensors"], "references: made with encoder"),
                        ([*DEFECT, "--encoder", "meta.pth"], "has SHA-256")):
        assert icas_main("segment", "parts", *given, "--out", "no", model=model) == 2
        assert said in capsys.readouterr().err and not Path("no").exists()


# ---- several processes ---------------------------------------------------------------------------


def test_ranks_share_the_pictures_and_the_last_one_writes_coco(model, parts, monkeypatch, capsys):
    cut = ["--threshold", middle_threshold(model)]
    assert icas_main("segment", "parts", *DEFECT, *cut, "--out", "one", "--coco", "one.json",
                     model=model) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, share in ((1, parts[1::2]), (0, parts[1::2] + parts[::2])):
        monkeypatch.setenv("RANK", str(rank))
        assert icas_main("segment", "parts", *DEFECT, *cut, "--out", "two", "--coco", "two.json",
                         model=model) == 0
        assert [r["image"] for r in lines("two")] == share
        shown = coco_of("two.json")  # what has been found by then
        assert [i["file_name"] for i in shown.loadImgs(shown.getImgIds())] == sorted(share)
    assert "2 of 4 images" in (said := capsys.readouterr().out) and said.count("4 of 4 images") == 2
    by_name = [sorted(timeless(lines(out)), key=lambda r: r["image"]) for out in ("one", "two")]
    assert by_name[0] == by_name[1]
    assert sorted(p.name for p in Path("two").iterdir()) == ["masks", "overlays", "results.jsonl",
                                                             "run.json"]
    for mask in Path("one/masks").rglob("*.png"):
        np.testing.assert_array_equal(read(mask), read(Path("two", mask.relative_to("one"))))
    coco = coco_of("two.json")
    assert [i["file_name"] for i in coco.loadImgs(coco.getImgIds())] == parts
    assert len(coco.getAnnIds()) and Path("one.json").read_text() == Path("two.json").read_text()


def test_two_processes_at_once_give_what_one_gives(model, parts):
    Path("runner.py").write_text(
        "import sys, torch, icas\ntorch.set_num_threads(1)\nicas.ENCODERS['tiny14'] = (48, 4, 3)\n"
        f"icas.DETAIL = {icas.DETAIL!r}\nsys.exit(icas.main(sys.argv[1:]))\n")
    assert icas_main("segment", "parts", *DEFECT, "--out", "one", model=model) == 0
    shutil.copytree("one", "two", ignore=lambda folder, names: {"results.jsonl"} & set(names))
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "runner.py", "segment", "parts", *DEFECT, "--out", "two", "--model", model, "--device",
         "cpu"], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    by_name = [sorted(timeless(lines(out)), key=lambda r: r["image"]) for out in ("one", "two")]
    assert by_name[0] == by_name[1] and "4 of 4 images" in run.stdout
    for mask in Path("one/masks").rglob("*.png"):
        np.testing.assert_array_equal(read(mask), read(Path("two", mask.relative_to("one"))))
