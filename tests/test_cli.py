"""The console script, with a tiny checkpoint: files, exit status, resuming, two processes."""
import json
import os
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
    """Four parts, one defect with its mask, two good parts."""
    for folder in ("parts/deep", "good"):
        (tmp_path / folder).mkdir(parents=True)
    for name, shape in (("parts/a", (40, 40)), ("parts/b", (30, 44)), ("parts/c", (44, 30)), ("parts/deep/d", (40, 40)), ("defect", (40, 40)),
                        ("good/1", (40, 40)), ("good/2", (40, 40))):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    mask = np.zeros((40, 40), np.uint8)
    mask[10:20, 10:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "parts" / "notes.txt").write_text("not an image, and not asked for")
    (tmp_path / "parts" / "._a.png").write_text("macOS")
    return ["parts/a.png", "parts/b.png", "parts/c.png", "parts/deep/d.png"]


DEFECT = ["--anomaly", "defect.png", "mask.png"]


def icas_main(*arguments, model):
    return icas.main([*arguments, "--model", model, "--device", "cpu"])


def lines(out="out"):
    return [json.loads(line) for line in Path(out, "results.jsonl").read_text().splitlines()]


def timeless(records):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def middle_threshold(model):
    """A threshold at which an untrained model marks something and not everything."""
    loaded = icas.load(model, device="cpu")
    references = icas.encode([("defect.png", "mask.png")], model=loaded)
    return str(round(float(np.median(icas.segment("parts/a.png", references, model=loaded).score)), 4))


def test_segment_writes_masks_overlays_lines_and_coco(model, parts, capsys):
    cut = middle_threshold(model)
    assert icas_main("segment", "parts", *DEFECT, "--out", "out", "--threshold", cut, "--coco", "out/coco.json", model=model) == 0
    assert "4 of 4 images" in capsys.readouterr().out
    found = lines()
    assert [r["image"] for r in found] == parts and all(r["version"] == icas.__version__ for r in found)
    loaded = icas.load(model, device="cpu")
    references = icas.encode([("defect.png", "mask.png")], model=loaded)
    for r in found:
        expected = icas.segment(r["image"], references, threshold=float(cut), model=loaded)
        mask = np.array(Image.open(Path("out", r["mask"])))
        np.testing.assert_array_equal(mask, expected.mask * np.uint8(255))
        assert r["regions"] == expected.boxes() and r["area"] == expected.mask.sum() == sum(b["area"] for b in r["regions"])
        assert (r["height"], r["width"]) == mask.shape and np.array(Image.open(Path("out", r["overlay"]))).shape == (*mask.shape, 3)
        assert r["label"] == ("defect" if expected.mask.any() else "good") and 0 <= r["score"] <= 1
    assert not list(Path("out").rglob("*.part"))

    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    coco = COCO("out/coco.json")
    assert [i["file_name"] for i in coco.loadImgs(coco.getImgIds())] == ["a.png", "b.png", "c.png", "d.png"]
    for r, i in zip(found, coco.getImgIds(), strict=True):
        own = coco.loadAnns(coco.getAnnIds(i))
        assert [a["area"] for a in own] == [coco.annToMask(a).sum() for a in own] == [b["area"] for b in r["regions"]]
        whole = sum((coco.annToMask(a) for a in own), np.zeros((r["height"], r["width"]), np.uint8))
        np.testing.assert_array_equal(whole * 255, np.array(Image.open(Path("out", r["mask"]))))
    assert len(coco.getAnnIds())


def test_a_second_run_skips_what_is_done(model, parts):
    arguments = ["segment", "parts", *DEFECT, "--out", "out"]
    assert icas_main(*arguments, model=model) == 0
    first, stamp = Path("out/results.jsonl").read_text(), Path("out/masks/a.png").stat().st_mtime_ns
    assert icas_main(*arguments, model=model) == 0
    assert Path("out/results.jsonl").read_text() == first and Path("out/masks/a.png").stat().st_mtime_ns == stamp
    Path("out/results.jsonl").write_text("".join(first.splitlines(keepends=True)[:2]))       # as if it had been stopped
    assert icas_main(*arguments, model=model) == 0
    assert timeless(lines()) == timeless(map(json.loads, first.splitlines()))


def test_a_half_written_line_does_not_cost_the_next_image(model, parts):
    arguments = ["segment", "parts", *DEFECT, "--out", "out"]
    assert icas_main(*arguments, model=model) == 0
    text = Path("out/results.jsonl").read_text()
    Path("out/results.jsonl").write_text(text[:text.index("\n") + 20])
    assert icas_main(*arguments, model=model) == 0
    assert [r["image"] for r in lines()] == parts


def test_two_folders_in_one_output_keep_both_masks(model, parts, rng):
    Path("more").mkdir()
    Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save("more/a.png")
    for folder in ("parts", "more"):
        assert icas_main("segment", folder, *DEFECT, "--out", "out", model=model) == 0
    for r in lines():
        assert np.array(Image.open(Path("out", r["mask"]))).shape == (r["height"], r["width"])


def test_images_of_one_stem_keep_masks_of_their_own(model, parts):
    Image.open("parts/a.png").save("parts/deep/a.png")
    assert icas_main("segment", "parts", *DEFECT, "--out", "out", model=model) == 0
    assert len({r["mask"] for r in lines()}) == len(list(Path("out/masks").iterdir())) == 5


def test_a_broken_file_is_reported_and_the_rest_is_kept(model, parts, capsys):
    Path("parts/b.png").write_bytes(Path("parts/b.png").read_bytes()[:100])
    assert icas_main("segment", "parts", *DEFECT, "--out", "out", model=model) == 1
    said = capsys.readouterr()
    assert [r["image"] for r in lines()] == [p for p in parts if p != "parts/b.png"]
    assert said.err.startswith("icas: parts/b.png: ") and said.err.count("\n") == 1 and "1 failed" in said.out


SEGMENT = ["segment", "parts", "--out", "out"]


@pytest.mark.parametrize("arguments, fragment", [
    (["segment", "no_such.png", *DEFECT, "--out", "out"], "no file or folder at no_such.png"),
    (SEGMENT, "references: none given; pass --anomaly IMAGE MASK"),
    (["detect", "parts", "--out", "out"], "detect needs good parts; pass --normal"),
    (["detect", "parts", *DEFECT, "--out", "out"], "detect needs good parts"),
    (["prompts", "--out", "p.safetensors"], "references: none given"),
    ([*SEGMENT, "--anomaly", "defect.png", "no_such.png"], "mask: no file at 'no_such.png'"),
    ([*SEGMENT, "--anomaly", "defect.png", "parts/b.png"], "expected the image's size"),
    ([*SEGMENT, "--normal", "empty"], "empty: no image in this folder"),
    ([*SEGMENT, "--prompts", "no_such"], "references: no file at 'no_such'"),
    ([*SEGMENT, "--prompts", "model/tiny.safetensors"], "expected a file of format 'icas-references-1'"),
    ([*SEGMENT, "--point", "3", "3"], "--point, --box: expected one image with them, got several"),
    ([*SEGMENT, *DEFECT, "--model", "no_such"], "path: no file at 'no_such'"),
    ([*SEGMENT, *DEFECT, "--range", "9", "3"], "value_range: expected (low, high) with low < high"),
    pytest.param([*SEGMENT, *DEFECT, "--device", "cuda"], "device: 'cuda' is not available here",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ([*SEGMENT, *DEFECT, "--threshold", "2"], "threshold: expected"),
    (["detect", "parts", "--normal", "good", "--false-positive-rate", "0", "--out", "out"], "--false-positive-rate: expected"),
    (["segment", "parts", *DEFECT, "--out", "defect.png"], "defect.png"),
])
def test_wrong_use_exits_with_2_and_one_line(model, parts, capsys, arguments, fragment):
    Path("empty").mkdir()
    defaults = [a for pair in (["--model", model], ["--device", "cpu"]) if pair[0] not in arguments for a in pair]
    assert icas.main([*arguments, *defaults]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("icas: ") and said.err.count("\n") == 1 and fragment in said.err


@pytest.mark.parametrize("arguments", [[], ["paint"], ["segment", "parts"], ["segment", "--out", "out"], ["segment", "x", "--out", "o", "--point", "3"],
                                       ["segment", "x", "--out", "o", "--threshold", "high"], ["segment", "x", "--out", "o", "--anomaly", "one"]])
def test_the_parser_refuses_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        icas.main(arguments)
    assert caught.value.code == 2 and "icas" in capsys.readouterr().err


def test_version_and_help(capsys):
    for arguments, fragment in ((["--version"], f"icas {icas.__version__}"), (["segment", "--help"], "--point"), (["detect", "--help"], "--normal")):
        with pytest.raises(SystemExit) as caught:
            icas.main(arguments)
        assert caught.value.code == 0 and fragment in capsys.readouterr().out


def test_detect_with_a_folder_of_good_parts(model, parts):
    assert icas_main("detect", "parts", "good/1.png", "--normal", "good", "--out", "out", "--coco", "out/coco.json", model=model) == 0
    loaded = icas.load(model, device="cpu")
    references = icas.encode(normals=["good/1.png", "good/2.png"], model=loaded)
    found = lines()
    assert [r["image"] for r in found] == [*parts, "good/1.png"]
    for r in found:
        expected = icas.detect(r["image"], references, model=loaded)
        assert r["score"] == pytest.approx(expected.score, abs=1e-6) and r["threshold"] == pytest.approx(expected.threshold, abs=1e-6)
        assert r["label"] == ("anomalous" if expected.is_anomalous else "good")
        np.testing.assert_array_equal(np.array(Image.open(Path("out", r["mask"]))) > 0, expected.map > expected.threshold)
    assert found[-1]["score"] < min(r["score"] for r in found[:-1])            # a reference against itself
    assert json.loads(Path("out/coco.json").read_text())["images"][0]["file_name"] == "a.png"


def test_prompts_are_encoded_once_and_used_again(model, parts, capsys):
    assert icas_main("prompts", *DEFECT, "--normal", "good", "--out", "p.safetensors", model=model) == 0
    assert "3 references (defect)" in capsys.readouterr().out
    assert icas_main("segment", "parts", "--prompts", "p.safetensors", "--out", "kept", model=model) == 0
    assert icas_main("segment", "parts", *DEFECT, "--normal", "good", "--out", "fresh", model=model) == 0
    # another memory layout moves the last bits, and an untrained model makes more of them
    assert [r["score"] for r in lines("kept")] == pytest.approx([r["score"] for r in lines("fresh")], abs=2e-3)
    assert icas_main("detect", "parts", "--prompts", "p.safetensors", "--out", "found", model=model) == 0


def test_a_click_or_a_box_on_one_image(model, parts):
    assert icas_main("segment", "parts/b.png", "--point", "20", "10", "--negative", "3", "3", "--out", "click", model=model) == 0
    loaded = icas.load(model, device="cpu")
    expected = icas.segment("parts/b.png", points=[(20, 10), (3, 3)], point_labels=[1, 0], model=loaded)
    np.testing.assert_array_equal(np.array(Image.open("click/masks/b.png")) > 0, expected.mask)
    assert icas_main("segment", "parts/b.png", "--box", "5", "5", "20", "20", "--out", "box", model=model) == 0
    assert [r["image"] for r in lines("box")] == ["parts/b.png"]


def test_sixteen_bit_images_need_a_range(model, parts, rng, capsys):
    Path("deep").mkdir()
    for name in ("x", "y"):
        Image.fromarray(rng.integers(0, 4096, (40, 40), dtype=np.uint16)).save(f"deep/{name}.png")
    assert icas_main("segment", "deep/x.png", *DEFECT, "--out", "out", model=model) == 1
    assert "--range LOW HIGH" in capsys.readouterr().err and lines() == []
    assert icas_main("segment", "deep/x.png", "--anomaly", "deep/y.png", "mask.png", "--range", "0", "4095", "--out", "out", model=model) == 0
    assert [r["image"] for r in lines()] == ["deep/x.png"]
    assert icas_main("detect", "deep/x.png", "--normal", "deep/y.png", "--out", "no", model=model) == 2


def test_two_processes_give_what_one_gives(model, parts, tmp_path):
    Path("runner.py").write_text("import sys, torch, icas\ntorch.set_num_threads(1)\nicas.ENCODERS['tiny14'] = (48, 4, 3)\nsys.exit(icas.main(sys.argv[1:]))\n")
    assert icas_main("segment", "parts", *DEFECT, "--out", "one", model=model) == 0
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "runner.py", "segment", "parts",
                          *DEFECT, "--out", "two", "--model", model, "--device", "cpu"], capture_output=True, text=True, timeout=120,
                         env=os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert timeless(lines("two")) == timeless(lines("one")) and run.stdout.count("4 of 4 images") == 1
    assert sorted(p.name for p in Path("two").iterdir()) == ["masks", "overlays", "results.jsonl"]
    for mask in Path("one/masks").iterdir():
        np.testing.assert_array_equal(np.array(Image.open(mask)), np.array(Image.open(Path("two/masks", mask.name))))


def test_other_references_are_another_run(model, parts):
    arguments = ["segment", "parts/a.png", "--out", "out"]
    assert icas_main(*arguments, *DEFECT, model=model) == 0
    first = lines()[0]
    Image.fromarray(255 - np.array(Image.open("mask.png"))).save("mask.png")
    assert icas_main(*arguments, *DEFECT, model=model) == 0
    assert len(lines()) == 1 and lines()[0]["run"] != first["run"] and lines()[0]["mask"] == first["mask"]
