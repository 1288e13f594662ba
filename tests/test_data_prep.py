"""data_prep: each reader on a miniature of the published layout; writer, counts and hostile input.

python -m tests.test_data_prep 10000000 writes, streams and samples a manifest of that many records
and prints seconds and memory.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile

import data_prep.__main__ as main
import icas
from data_prep import common
from data_prep.episodes import read_source
from data_prep.manifest import (check_sizes, choose, manifest_lines, named, read_labels,
                                read_manifest, read_record)
from train import FreshViews

coco = pytest.importorskip("pycocotools.mask")
RNG = np.random.default_rng(0)
SPOT = (slice(4, 8), slice(6, 12))  # 24 pixels


def picture(path: Path, h=16, w=20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(path)
    return path


def marks(path: Path, h=16, w=20, value=255, spot=SPOT) -> np.ndarray:
    """Write a mask that marks `spot`; returns it as bool."""
    array = np.zeros((h, w), np.uint8)
    array[spot] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return array > 0


def run(name, root, out, *options):
    return main.main([name, "--root", str(root), "--out", str(out), *map(str, options)])


# Each builder makes a miniature and returns {image, below ROOT or OUT, with x0 of its window:
# (split, group, {label: mask}, known bad)}; a split of None is one that the group's name decides.


def mvtec(root, category="bottle", base=""):
    rows = {name: {} for name in ("train/good/000", "train/good/001", "test/good/000",
                                  "test/broken/000", "test/broken/001")}
    for name in rows:
        picture(root / category / f"{name}.png")
    mask = marks(root / category / "ground_truth/broken/000_mask.png")
    rows["test/broken/000"] = {"broken": mask}
    return {f"{base}{category}/{n}.png": (n[:n.index("/")], f"{category}/{n}.png", m,
                                          n == "test/broken/001") for n, m in rows.items()}


def manta(root):
    base = root / "groceries/coffee bean"
    for name in ("train/good/1", "test-pixel/good/2", "test-pixel/cut/3"):
        picture(base / f"{name}.png")
    mask = marks(base / "test-pixel/mask/03_gt.png")
    rows = {"train/good/1": {}, "test-pixel/good/2": {}, "test-pixel/cut/3": {"cut": mask}}
    mine = {f"groceries/coffee bean/{n}.png": (n.split("/")[0].split("-")[0],
                                               f"coffee bean/{n}.png", m, False)
            for n, m in rows.items()}
    return mine | mvtec(root / "medicine", "capsule", "medicine/")


def folder(root):
    for name in ("good/a b", "good/ü", "bad/1", "bad/2"):
        picture(root / f"{name}.PNG")
    mask = marks(root / "mask/1_mask.png", value=1)
    return {"good/a b.PNG": (None, "good/a b.PNG", {}, False),
            "good/ü.PNG": (None, "good/ü.PNG", {}, False),
            "bad/1.PNG": ("test", "bad/1.PNG", {"defect": mask}, False),
            "bad/2.PNG": ("test", "bad/2.PNG", {}, True)}


def visa(root):
    good, bad = "candle/Data/Images/Normal/0000.JPG", "candle/Data/Images/Anomaly/000.JPG"
    picture(root / good), picture(root / bad)
    mask = marks(root / "candle/Data/Masks/Anomaly/000.png", value=3)
    (root / "candle/image_anno.csv").write_text(
        f'image,label,mask\n{good},normal,\n{bad},"melt,wax",candle/Data/Masks/Anomaly/000.png\n')
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text(
        f"object,split,label,image,mask\ncandle,train,normal,{good},\n")
    return {good: ("train", good, {}, False), bad: ("test", bad, {"melt, wax": mask}, False)}


def kolektorsdd(root):
    for item, part in (("kos01", 0), ("kos01", 1), ("kos21", 6), ("kos21", 7), ("kos26", 0),
                       ("kos34", 0)):
        picture(root / item / f"Part{part}.jpg", 60, 20)
        marks(root / item / f"Part{part}_label.bmp", 60, 20, value=0)
    mask = marks(root / "kos01/Part1_label.bmp", 60, 20)
    return {"kos01/Part0.jpg": ("test", "kos01", {}, False),
            "kos01/Part1.jpg": ("test", "kos01", {"crack": mask}, False),
            "kos21/Part6.jpg": ("test", "kos21", {}, False)}


def aitex(root):
    picture(root / "Defect_images/0001_002_00.png", 256, 1000)
    picture(root / "Defect_images/0044_019_04.png", 256, 1024)
    picture(root / "Defect_images/0100_025_08.png", 256, 512)
    white = "NODefect_images/2306881-210020u/0003_000_01.png"
    scan = np.array(Image.open(picture(root / white, 256, 512)))
    scan[:, 256:] = 255
    Image.fromarray(scan).save(root / white)

    def mask(name, w, x):
        return marks(root / f"Mask_images/{name}.png", 256, w, spot=(slice(9, 13), slice(x, x + 6)))
    one = mask("0001_002_00_mask", 1000, 990)[:, 744:]
    left = mask("0044_019_04_mask1", 1024, 0)[:, :256]
    right = mask("0044_019_04_mask2", 1024, 1000)[:, 768:]
    end, ball = "Defect_images/0001_002_00.png", "Defect_images/0044_019_04.png"
    return {f"{end}#744": ("test", "0001_002_00", {"broken end": one}, False),
            f"{ball}#0": ("test", "0044_019_04", {"fuzzy ball": left}, False),
            f"{ball}#768": ("test", "0044_019_04", {"fuzzy ball": right}, False),
            f"{white}#0": ("test", "0003_000_01", {}, False)}


def voc(root):
    base, rows = root / "VOCdevkit/VOC2012", {}
    for stem, split in (("2007_000001", "train"), ("2007_000002", "val")):
        picture(base / f"JPEGImages/{stem}.jpg")
        person = marks(base / f"SegmentationClass/{stem}.png", value=15)
        array = np.where(person, 15, 0).astype(np.uint8)
        array[10:12] = 255  # void
        image = Image.fromarray(array, mode="P")
        image.putpalette([(37 * i) % 256 for i in range(768)])
        image.save(base / f"SegmentationClass/{stem}.png")
        (base / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (base / f"ImageSets/Segmentation/{split}.txt").write_text(stem + "\n")
        expected = "train" if split == "train" else "test", stem, {"person": person}, False
        rows[f"VOCdevkit/VOC2012/JPEGImages/{stem}.jpg"] = expected
    return rows


def ade20k(root):
    rows = {}
    for split, stem in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        picture(root / f"images/{split}/{stem}.jpg")
        mask = marks(root / f"annotations/{split}/{stem}.png", value=2)
        expected = "train" if split == "training" else "test", stem, {"building": mask}, False
        rows[f"images/{split}/{stem}.jpg"] = expected
    lines = ("Idx Ratio Train Val Stuff Name", "1 0.1 1 1 1 wall", "2 0.1 1 1 1 building,_edifice")
    text = "\n".join(lines).replace(" ", "\t").replace("_", " ") + "\n"
    (root / "objectInfo150.txt").write_text(text)
    return rows


def spot() -> np.ndarray:
    mask = np.zeros((16, 20), bool)
    mask[SPOT] = True
    return mask


def instances(root):
    """Image 1 has a cat as a polygon, the same cat's tail as run lengths and a crowd; image 2 has
    nothing."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    tail = np.zeros((16, 20), bool)
    tail[12:14, 2:4] = True
    flat = tail.T.ravel()  # uncompressed: lengths of the runs down the columns, the first of zeros
    runs = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]).tolist()
    polygon = [[6, 4, 12, 4, 12, 8, 6, 8]]
    names = "train2017", "val2017"
    for name, code in zip(names, ({"size": [16, 20], "counts": runs}, icas.run_lengths(tail))):
        parts = [(7, 0, [6, 4, 6, 4], polygon), (9, 1, [0, 0, 9, 9], [[0, 0, 9, 0, 9, 9]]),
                 (7, 0, [2, 12, 2, 2], code)]
        keys = "category_id", "iscrowd", "bbox", "segmentation"
        data = {"info": {"images": [1]},
                "annotations": [{"image_id": 1} | dict(zip(keys, part)) for part in parts],
                "images": [{"id": i, "file_name": f"{i}.jpg", "height": 16, "width": 20}
                           for i in (1, 2)],
                "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "cup"}]}
        (root / f"annotations/instances_{name}.json").write_text(json.dumps(data))
    return spot() | tail


def coco_instances(root):
    mask, rows = instances(root), {}
    for name, split in (("train2017", "train"), ("val2017", "test")):
        for i in (1, 2):
            picture(root / name / f"{i}.jpg")
            rows[f"{name}/{i}.jpg"] = (split, str(i), {"cat": mask} if i == 1 else {}, False)
    return rows


def coco_panoptic(root):
    rows = {}
    for name, split in (("train2017", "train"), ("val2017", "test")):
        picture(root / f"{name}/1.jpg")
        ids = np.zeros((16, 20, 3), np.uint8)
        # 5 + 256, 9 + 2 * 65536, a crowd
        ids[SPOT], ids[0], ids[15] = (5, 1, 0), (9, 0, 2), (3, 0, 0)
        (root / f"annotations/panoptic_{name}").mkdir(parents=True)
        Image.fromarray(ids).save(root / f"annotations/panoptic_{name}/1.png")
        segments = [{"id": i, "category_id": kind, "iscrowd": crowd}
                    for i, kind, crowd in ((261, 7, 0), (131081, 8, 0), (3, 7, 1))]
        data = {"images": [{"id": 1, "file_name": "1.jpg"}],
                "categories": [{"id": 7, "name": "cat"}, {"id": 8, "name": "sky"}],
                "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": segments}]}
        (root / f"annotations/panoptic_{name}.json").write_text(json.dumps(data))
        sky = np.zeros((16, 20), bool)
        sky[0] = True
        rows[f"{name}/1.jpg"] = (split, "1", {"cat": spot(), "sky": sky}, False)
    return rows


def realiad(root):
    base, rows = root / "realiad_256/audiojack", {}
    files = {"OK/S0001/a_0001_OK_C1.jpg": None, "OK/S0001/a_0001_OK_C2.jpg": None,
             "NG/HS/S0002/a_0002_NG_HS_C1.jpg": "NG/HS/S0002/a_0002_NG_HS_C1.png",
             "NG/HS/S0002/a_0002_NG_HS_C2.jpg": None}
    entries = [{"category": "audiojack", "anomaly_class": "OK" if "OK" in i else "HS",
                "image_path": i, "mask_path": m} for i, m in files.items()]
    for n, (image, mask) in enumerate(files.items()):
        picture(base / image)
        shown = {"scratch": marks(base / mask)} if mask else {}
        group = "audiojack/" + os.path.dirname(image)
        rows[f"realiad_256/audiojack/{image}"] = ("test" if n else "train", group, shown, False)
    (root / "realiad_jsons/realiad_jsons").mkdir(parents=True)
    lists = {"meta": {"prefix": "audiojack/"}, "train": entries[:1], "test": entries[1:]}
    (root / "realiad_jsons/realiad_jsons/audiojack.json").write_text(json.dumps(lists))
    return rows


def bmad(root, label="lesion", inside="RESC", ungood="ungood", marked="label"):
    base = root / inside
    for name in ("train/good/p1_0", "test/good/img/p2_0", f"test/{ungood}/img/p3_0",
                 f"test/{ungood}/img/p3_1"):
        picture(base / f"{name}.png")
    mask = marks(base / f"test/{ungood}/{marked}/p3_0.png")
    marks(base / f"test/{ungood}/{marked}/p3_1.png", value=0)
    at = f"{inside}/" if inside else ""
    return {f"{at}train/good/p1_0.png": ("train", "p1", {}, False),
            f"{at}test/good/img/p2_0.png": ("test", "p2", {}, False),
            f"{at}test/{ungood}/img/p3_0.png": ("test", "p3", {label: mask}, False),
            f"{at}test/{ungood}/img/p3_1.png": ("test", "p3", {}, True)}


def brats_slices(root):
    return bmad(root, "tumour", "", "Ungood", "anomaly_mask")


def nifti(path, array):
    nibabel = pytest.importorskip("nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


def brats(root):
    volume, seg = np.zeros((20, 16, 10), np.int16), np.zeros((20, 16, 10), np.int16)
    volume[..., 3:], seg[6:12, 8:12, 5] = 100, 4
    nifti(root / "BraTS2021_00000/BraTS2021_00000_flair.nii.gz", volume)
    nifti(root / "BraTS2021_00000/BraTS2021_00000_seg.nii.gz", seg)
    mask = np.rot90(seg[..., 5]) > 0
    return {"images/BraTS2021_00000_005.png": (None, "BraTS2021_00000", {"tumour": mask}, False)}


def lits(root):
    volume, seg = np.full((20, 16, 9), -300, np.int16), np.zeros((20, 16, 9), np.uint8)
    seg[2:15, 2:15, 3:] = 1
    seg[6:12, 8:12, 6] = 2
    nifti(root / "Training Batch 1/volume-0.nii", volume)
    nifti(root / "Training Batch 2/segmentation-0.nii", seg)
    mask = np.rot90(seg[..., 6]) == 2
    return {"images/volume-0_003.png": (None, "volume-0", {}, False),
            "images/volume-0_006.png": (None, "volume-0", {"tumour": mask}, False)}


def magnetic_tile(root):
    rows = {}
    for kind, stem, tile in (("Blowhole", "exp1_num_100", 1), ("Blowhole", "exp2_num_120", 1),
                             ("Blowhole", "exp1_num_140", 2), ("Blowhole", "exp2_num_900", 3),
                             ("Free", "exp1_num_7", 1)):
        picture(root / f"MT_{kind}/Imgs/{stem}.jpg")
        mask = marks(root / f"MT_{kind}/Imgs/{stem}.png", value=255 if kind != "Free" else 0)
        shown = {"blowhole": mask} if kind != "Free" else {}
        rows[f"MT_{kind}/Imgs/{stem}.jpg"] = ("test", f"{kind}_{tile}", shown, False)
    return rows


CASES = {"mvtec": mvtec, "manta": manta, "folder": folder, "folder, MVTec": mvtec, "visa": visa,
         "kolektorsdd": kolektorsdd, "aitex": aitex, "voc": voc, "ade20k": ade20k,
         "coco": coco_instances, "coco, panoptic": coco_panoptic, "realiad": realiad, "oct": bmad,
         "brats": brats, "brats, BMAD": brats_slices, "lits": lits, "magnetic_tile": magnetic_tile}


def shown_by(record) -> dict[str, np.ndarray]:
    """{label: bool mask} of a record as train.py reads it."""
    labels = read_record(record)[1].numpy()
    return {label: labels == int(value) for value, label in named(record).items()}


def check_records(case, root, out, expected, same=lambda text: text):
    """Make the manifest; it holds exactly the expected records, as `same` sees their texts."""
    assert run(case.split(",")[0], root, out, "--partial") == 0
    found = {}
    for record in read_manifest(out):
        path = Path(record["image"]).resolve()
        key = same(path.relative_to(out if path.is_relative_to(out) else root).as_posix())
        key += f"#{record['box'][0]}" if "box" in record else ""
        assert key not in found
        found[key] = record
    assert found.keys() == {same(key) for key in expected}
    for key, (split, group, masks, bad) in expected.items():
        record = found[same(key)]
        assert record["split"] == (split or common.split_of(record["group"]))
        assert same(record["group"]) == same(group) and record.get("anomalous", False) == bad
        shown = {same(label): mask for label, mask in shown_by(record).items()}
        assert shown.keys() == {same(label) for label in masks}
        assert ("mask" in record) == bool(masks)
        for label, mask in masks.items():
            np.testing.assert_array_equal(shown[same(label)], mask)


@pytest.mark.parametrize("case", CASES)
def test_a_miniature_of_the_published_layout_becomes_exactly_these_records(case, tmp_path):
    root, out = tmp_path / "raw data", tmp_path / "out"
    expected = CASES[case](root)
    check_records(case, root, out, expected)
    first = (out / "manifest.jsonl").read_text()
    assert str(tmp_path) not in first  # relative paths: the folder can move
    written = {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}
    assert run(case.split(",")[0], root, out, "--partial") == 0
    assert (out / "manifest.jsonl").read_text() == first  # and what is done is not done again
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.png")} == written


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("coco", "brats", "lits")])
def test_an_opaque_alpha_channel_and_a_transparent_index_change_nothing(case, tmp_path):
    root, masks = tmp_path / "raw", 0
    expected = CASES[case](root)
    for path in (p for p in root.rglob("*") if p.suffix in (".png", ".bmp")):
        with Image.open(path) as mask:
            mask.load()
        if mask.mode in ("L", "P") or "panoptic" in path.parent.name:
            if mask.mode != "P":
                mask.putalpha(255)
            mask.save(path, format="PNG", **({"transparency": 0} if mask.mode == "P" else {}))
            masks += 1
    assert masks
    check_records(case, root, tmp_path / "out", expected)


def respell(root: Path, spell) -> None:
    """Respell all folders and lists below root, and VisA's pictures, whose names its lists hold."""
    for path in sorted(root.rglob("*"), reverse=True):  # what is inside comes first
        if path.is_dir() or path.suffix in (".txt", ".csv", ".json", ".JPG"):
            path.rename(path.with_name(spell(path.name)))


@pytest.mark.parametrize("spell", [str.upper, str.lower])
@pytest.mark.parametrize("case", CASES)
def test_folders_and_lists_are_found_in_capitals_or_not(case, spell, tmp_path):
    root = tmp_path / "raw"
    expected = CASES[case](root)
    respell(root, spell)
    check_records(case, root, tmp_path / "out", expected, same=str.lower)


def test_of_two_spellings_the_exact_one_is_taken_and_else_the_first(tmp_path):
    for name in ("Good", "GOOD", "good/Sub"):
        (tmp_path / name).mkdir(parents=True)
    assert common.child(tmp_path, "good/sub") == tmp_path / "good/Sub"
    assert common.child(tmp_path, "Good") == tmp_path / "Good"
    assert common.child(tmp_path, "gooD") == tmp_path / "GOOD"
    assert common.child(tmp_path, "gooD/x.png") == tmp_path / "GOOD/x.png"
    assert common.first_folder(tmp_path, "bad", "good/SUB", "Good") == tmp_path / "good/Sub"
    assert common.first_folder(tmp_path, "bad", "worse") == tmp_path / "worse"


def turn(path: Path) -> None:
    """Lay a picture on its side, with EXIF that says so."""
    with Image.open(path) as image:
        image.load()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    kind = "PNG" if image.format == "BMP" else image.format
    image.transpose(Image.Transpose.ROTATE_90).save(path, format=kind, exif=exif)


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("brats", "lits")])
def test_pictures_and_masks_that_lie_on_their_side_are_read_upright(case, tmp_path):
    root, out = tmp_path / "raw", tmp_path / "out"
    expected = CASES[case](root)
    for path in (p for p in root.rglob("*.*") if p.suffix.lower() in common.SUFFIXES):
        turn(path)
    check_records(case, root, out, expected)
    records = read_manifest(out)
    check_sizes(records, 2)
    for record in records:
        with Image.open(record["image"]) as image:
            assert common.size(Path(record["image"])) == image.size != image.size[::-1]


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("folder")])
def test_the_counts_are_compared_with_the_published_ones(case, tmp_path, capsys, monkeypatch):
    name, root, out = case.split(",")[0], tmp_path / "raw", tmp_path / "out"
    rows = CASES[case](root)
    assert run(name, root, out) == 2
    told = capsys.readouterr().err
    assert "counts differ from the published ones" in told and told.count("\n") == 1
    assert not list(out.glob("manifest*"))
    reader = main.importlib.import_module(f"data_prep.{name}")
    bad = sum(bool(m) or b for _, _, m, b in rows.values())
    right = {"images": len(rows), "bad": bad, "good": len(rows) - bad}
    monkeypatch.setattr(reader, "published", lambda root, **extra: right, raising=False)
    assert run(name, root, out) == 0 and "published" not in capsys.readouterr().out


def test_the_scripts_take_every_manifest(tmp_path):
    from data_prep.episodes import read_source
    for case, build in CASES.items():
        name, out = case.split(",")[0], tmp_path / f"{case} out"
        rows = build(tmp_path / case)
        run(name, tmp_path / case, out, "--partial")
        found = [r for records in read_source(str(out)).values() for r in records]
        masked = sum(bool(m) for _, _, m, _ in rows.values())
        assert len({r["name"] for r in found}) == len(rows)
        assert sum(bool(r["shows"]) for r in found) == masked
        labels = {label for _, _, m, _ in rows.values() for label in m}
        assert {label for r in found for label in r["shows"]} == labels
        source = FreshViews(name, choose(out, 0, 0, 0), 28, True)
        assert source.view(0, np.random.default_rng(0)).pixels.shape == (3, 28, 28)


def test_strips_of_kolektorsdd_are_thirds_of_an_image(tmp_path):
    kolektorsdd(tmp_path / "raw")
    assert run("kolektorsdd", tmp_path / "raw", tmp_path / "out", "--partial", "--strips", 3) == 0
    strips = read_manifest(tmp_path / "out")
    assert len(strips) == 9 and [r["box"] for r in strips if "mask" in r] == [[0, 0, 20, 20]]
    assert all(tuple(read_record(r)[0].shape) == (3, 20, 20) for r in strips)


def test_of_masks_that_overlap_the_smaller_lies_on_top():
    big, small = np.zeros((16, 20), bool), spot()
    big[2:14, 3:18] = True
    for names in (("a", "b"), ("b", "a")):
        masks = dict(zip(names, map(icas.run_lengths, (big, small))))
        record = common.painted(Path("x.png"), "train", masks)
        image = Image.fromarray(np.zeros((16, 20, 3), np.uint8))
        shown = shown_by(record | {"image": image})
        np.testing.assert_array_equal(shown[names[1]], small)
        np.testing.assert_array_equal(shown[names[0]], big & ~small)


def test_a_written_mask_is_made_again_when_it_is_another_however_old_its_source(tmp_path):
    path = common.write_png(tmp_path / "a/x.png", np.zeros((2, 2)))
    os.utime(path, (1, 1))
    common.write_png(path, np.zeros((2, 2)))
    assert path.stat().st_mtime == 1
    common.write_png(path, np.ones((2, 2)))
    assert np.array(Image.open(path)).all() and path.stat().st_mtime > 1
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.png"]


def test_splits_are_decided_by_the_name_alone_and_about_three_to_one():
    shares = [common.split_of(f"part {i}") for i in range(4000)]
    assert 0.73 < shares.count("train") / 4000 < 0.77
    assert shares == [common.split_of(f"part {i}") for i in range(4000)]


def test_elpv_is_read_from_the_package(tmp_path, capsys):
    pytest.importorskip("elpv_dataset")
    assert main.main(["elpv", "--out", str(tmp_path)]) == 0
    records = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert len(records) == len({r["group"] for r in records}) == 2223
    assert sum(r.get("anomalous", False) for r in records) == 715
    assert (tmp_path / records[0]["image"]).resolve().is_file()
    assert "published" not in capsys.readouterr().out


# ---- Objects365 ----------------------------------------------------------------------------------


def tiny_sam(folder: Path):
    """A randomly initialised SAM of 64 px, saved as a checkpoint."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    vision = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_dim=32,
                  output_channels=16, image_size=64, patch_size=16, window_size=2,
                  global_attn_indexes=[1], num_pos_feats=8)
    prompt = dict(hidden_size=16, image_embedding_size=4, image_size=64, patch_size=16,
                  mask_input_channels=4)
    decoder = dict(hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2,
                   iou_head_depth=1, iou_head_hidden_dim=16)
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt,
                                    mask_decoder_config=decoder)
    transformers.SamModel(config).save_pretrained(folder)
    images = transformers.SamImageProcessor(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16}, mask_pad_size={"height": 16, "width": 16})
    transformers.SamProcessor(images).save_pretrained(folder)
    return folder


@pytest.fixture
def boxes(tmp_path):
    """Three images with boxes, in the two known arrangements, and one that was never published."""
    root = tmp_path / "raw"
    (root / "annotations").mkdir(parents=True)
    files = ["v1/patch0/o_1.jpg", "v1/patch0/o_2.jpg", "v2/patch16/objects365_v2_00908726.jpg",
             "v2/patch16/o_3.jpg"]
    picture(root / "train/patch0/o_1.jpg"), picture(root / "train/patch0/o_2.jpg")
    picture(root / "train/images/v2/patch16/o_3.jpg", 30, 12)
    annotations = [{"image_id": i, "category_id": c, "iscrowd": 0, "bbox": [1.5 * i, 2, 5, 6]}
                   for i in (4, 1) for c in (7, 9, 7)]
    annotations += [{"image_id": 1, "category_id": 7, "iscrowd": 1, "bbox": [0, 0, 9, 9]},
                    {"image_id": 1, "category_id": 7, "iscrowd": 0, "bbox": [0, 0, 0.2, 9]}]
    images = [{"id": i, "file_name": f"images/{f}", "height": 16, "width": 20}
              for i, f in enumerate(files, start=1)]
    data = {"images": images, "annotations": annotations,
            "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "cup"}]}
    (root / "annotations/zhiyuan_objv2_train.json").write_text(json.dumps(data))
    return root


def test_boxes_become_masks_with_sam_and_a_killed_run_goes_on(tmp_path, boxes, capsys, monkeypatch):
    sam, out = tiny_sam(tmp_path / "sam-tiny"), tmp_path / "out"
    from data_prep import objects365
    monkeypatch.setattr(objects365, "FILL", 0)
    options = ["--partial", "--sam", sam, "--device", "cpu", "--batch-size", 2]
    whole = objects365.masks_of
    asked = []

    def killed(model, image, *rest):
        if asked:
            raise KeyboardInterrupt
        asked.append(image.name)
        return whole(model, image, *rest)
    monkeypatch.setattr(objects365, "masks_of", killed)
    assert run("objects365", boxes, out, *options, "--quality=-99") == 130
    assert [p.name for p in sorted(out.glob("sam/patch*/*"))] == ["o_1.json", "o_2.json"]
    assert not list(out.glob("manifest*"))

    monkeypatch.setattr(objects365, "masks_of", lambda model, image, *rest: (
        asked.append(image.name) or whole(model, image, *rest)))
    assert run("objects365", boxes, out, *options, "--quality=-99") == 0
    assert asked == ["o_1.jpg", "o_3.jpg"]
    assert "missing" not in capsys.readouterr().out  # what was never published is not asked for
    records = {Path(r["image"]).name: r for r in read_manifest(out)}
    assert list(records) == ["o_1.jpg", "o_2.jpg", "o_3.jpg"] and "mask" not in records["o_2.jpg"]
    kept = json.loads((out / "sam/patch0/o_1.json").read_text())
    assert [k[0] for k in kept] == ["cat", "cup", "cat"]  # the crowd and the thin box are not there
    parts = [coco.decode(code) > 0 for _, _, _, code in kept]
    assert set(records["o_1.jpg"]["labels"].values()) == {"cat", "cup"}
    values = {v: k for k, v in records["o_1.jpg"]["labels"].items()}
    cats = coco.decode(records["o_1.jpg"]["mask"][values["cat"]]) > 0
    np.testing.assert_array_equal(cats, parts[0] | parts[2])
    for label, score, fill, code in kept:  # boxes are (2 .. 6.5) x (2 .. 8) here
        assert fill == pytest.approx(coco.decode(code)[2:8, 1:7].sum() / 30, abs=1e-3)
    np.testing.assert_array_equal(read_record(records["o_3.jpg"])[0].shape, (3, 30, 12))

    monkeypatch.setattr(objects365, "FILL", 1 / 3)  # filtered when read: SAM is not asked again
    rows = [["cat", 0.9, 0.4, kept[0][3]], ["cup", 0.7, 0.9, kept[1][3]],
            ["cup", 0.9, 0.3, kept[2][3]]]
    (out / "sam/patch0/o_1.json").write_text(json.dumps(rows))
    assert run("objects365", boxes, out, *options) == 0 and len(asked) == 2
    some = next(r for r in read_manifest(out) if r["image"].endswith("o_1.jpg"))
    assert some["labels"] == {"1": "cat"} and some["mask"] == {"1": kept[0][3]}
    capsys.readouterr()
    assert run("objects365", boxes, out, *options[:2], tmp_path / "other", *options[3:]) == 2
    assert "by 'sam-tiny', not 'other'" in capsys.readouterr().err


def test_boxes_are_found_in_folders_in_capitals(tmp_path, boxes, monkeypatch):
    from data_prep import objects365
    respell(boxes, str.upper)
    monkeypatch.setattr(objects365, "load_sam", lambda *where: None)
    monkeypatch.setattr(objects365, "masks_of", lambda *asked: [])
    assert run("objects365", boxes, tmp_path / "out", "--partial", "--sam", "x") == 0
    assert len(read_manifest(tmp_path / "out")) == 3


def test_sam_gives_the_same_masks_in_batches_of_any_size(tmp_path, boxes):
    from data_prep import objects365
    model = objects365.load_sam(str(tiny_sam(tmp_path / "sam")), "cpu")
    image, corners = boxes / "train/patch0/o_1.jpg", [[1.0, 2, 7, 9], [3, 1, 19, 15], [0, 0, 5, 5]]
    one, all_ = (objects365.masks_of(model, image, corners, ["a", "b", "c"], n) for n in (1, 3))
    assert [o[0] for o in one] == ["a", "b", "c"] and [o[3] for o in one] == [a[3] for a in all_]
    np.testing.assert_allclose([o[1] for o in one], [a[1] for a in all_], atol=2e-4)
    turn(image)
    upright = objects365.masks_of(model, image, corners, ["a", "b", "c"], 3)
    assert [code["size"] for *_, code in upright] == [[16, 20]] * 3


# ---- Hostile input -------------------------------------------------------------------------------


def told(capsys, root, name="folder", *options):
    """The one line that a refused folder gives."""
    capsys.readouterr()
    assert run(name, root, root.parent / "refused", *options) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("data_prep: ")
    assert not (root.parent / "refused/manifest.jsonl").exists()
    return line


def count(name, root, out, *options) -> int:
    assert run(name, root, out, *options) == 0
    return len(read_manifest(out))


def test_links_hidden_files_and_odd_names_are_handled(tmp_path):
    folder(tmp_path / "a")
    (tmp_path / "a/good/._ü.png").write_bytes(b"macOS")
    os.symlink(tmp_path / "a", tmp_path / "a/good/loop")
    os.symlink(tmp_path / "a/good/self.png", tmp_path / "a/good/self.png")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "a/good/broken.png")
    assert count("folder", tmp_path / "a", tmp_path / "out a") == 4
    mvtec(tmp_path / "store")
    (tmp_path / "b").mkdir()
    # a category that lies elsewhere counts, a way back up does not
    os.symlink(tmp_path / "store/bottle", tmp_path / "b/bottle")
    os.symlink(tmp_path, tmp_path / "b/up")
    assert count("folder", tmp_path / "b", tmp_path / "out b") == 5
    manta(tmp_path / "manta")
    os.symlink(tmp_path / "manta/groceries", tmp_path / "manta/groceries/loop")
    assert count("manta", tmp_path / "manta/groceries", tmp_path / "out m", "--partial") == 3
    assert count("folder", tmp_path / "store/bottle", tmp_path / "out c") == 5
    (tmp_path / "d/good").mkdir(parents=True)
    os.rename(picture(tmp_path / "x.png"), os.fsencode(tmp_path / "d/good") + b"/\xff.png")
    with pytest.raises(ValueError, match="not UTF-8"):
        records = main.importlib.import_module("data_prep.folder").records(tmp_path / "d")
        common.write_manifest(records, tmp_path / "out d")


def test_bad_images_and_masks_are_named(tmp_path, capsys):
    root = tmp_path / "a"
    folder(root)
    image, mask = root / "bad/1.PNG", root / "mask/1_mask.png"
    whole = image.read_bytes()
    for cut in (0, 20, len(whole) // 2, len(whole) - 40):
        image.write_bytes(whole[:cut])
        assert "bad/1.PNG: not a readable image" in told(capsys, root)
    Image.fromarray(np.zeros((16, 20), np.uint16)).save(image)
    assert "bad/1.PNG: not a readable image (16 bits" in told(capsys, root)
    image.write_bytes(whole)
    marks(mask, 9, 9)
    assert "1_mask.png: mask is (9, 9)" in told(capsys, root)
    Image.fromarray(RNG.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(mask)
    assert "1_mask.png: expected one value a pixel, got colours" in told(capsys, root)
    for mode in ("LA", "RGBA"):
        clear = Image.new(mode, (20, 16))
        clear.putalpha(Image.fromarray(spot() * np.uint8(255)))
        clear.save(mask)
        assert "1_mask.png: a mask with an alpha channel" in told(capsys, root)
        record = {"image": str(image), "mask": str(mask), "labels": {"*": "defect"}}
        with pytest.raises(ValueError, match="1_mask.png': a mask with an alpha channel"):
            read_labels(record)
    palette = Image.fromarray(1 - spot().astype(np.uint8), mode="P")
    palette.putpalette([255, 255, 255, 0, 0, 0])
    palette.save(mask)
    assert "1_mask.png: value 0 of its palette is not black" in told(capsys, root)
    palette = Image.fromarray(spot().astype(np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    wide = (spot() * 60000).astype(np.uint16)
    rgb = np.repeat(spot()[..., None] * np.uint8(255), 3, axis=-1)
    bits = Image.fromarray(spot())  # one bit a pixel
    for good in (palette, Image.fromarray(wide), Image.fromarray(rgb), bits):
        good.save(mask)
        assert run("folder", root, tmp_path / "out") == 0
        record = next(r for r in read_manifest(tmp_path / "out") if "mask" in r)
        np.testing.assert_array_equal(shown_by(record)["defect"], spot())
    mask.rename(root / "mask/1_mask.jpg")
    Image.fromarray(spot() * np.uint8(255)).save(root / "mask/1_mask.jpg")
    assert "1_mask.jpg: JPEG blurs" in told(capsys, root)
    coco_panoptic(tmp_path / "coco")
    path = tmp_path / "coco/annotations/panoptic_train2017/1.png"
    clear = Image.open(path)
    clear.putalpha(Image.fromarray(spot() * np.uint8(255)))
    clear.save(path)
    assert "train2017/1.png: a mask with an alpha channel" in told(capsys, path.parents[2], "coco")


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "La", "RGBa"])
def test_alpha_is_dropped_where_it_is_the_same_everywhere_and_refused_elsewhere(mode):
    values = spot() * np.uint8(200)
    solid, hole = np.full_like(values, 255), np.where(spot(), np.uint8(255), np.uint8(9))
    for alpha in (solid, hole, solid // 5, solid * 0):
        bands = [values] * (len(mode) - 1) + [alpha]
        if mode.endswith("a"):  # colours come multiplied with alpha
            bands[:-1] = [(values * (alpha / 255)).round().astype(np.uint8)] * (len(mode) - 1)
        mask = Image.frombytes(mode, (20, 16), np.stack(bands, -1).tobytes())
        if alpha is hole:
            with pytest.raises(ValueError, match="x.png: a mask with an alpha channel"):
                common.mask_values(mask, "x.png")
        elif alpha.any() or mode.endswith("A"):
            got = common.mask_values(mask, "x.png")
            np.testing.assert_array_equal(got if got.ndim == 2 else got[..., 0], values)


def test_every_truncated_picture_is_found_without_decoding_it(tmp_path):
    for ending in ("jpg", "png", "bmp", "tif"):
        path = picture(tmp_path / f"x.{ending}", 64, 64)
        assert common.size(path) == (64, 64)
        whole = path.read_bytes()
        for share in (0.3, 0.7, 0.99):
            path.write_bytes(whole[:int(len(whole) * share)])
            with pytest.raises(ValueError, match=f"x.{ending}: not a readable image"):
                common.size(path)
        # a download that only reserved its place
        path.write_bytes(whole[:len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
        if ending in ("jpg", "png"):
            with pytest.raises(ValueError):
                common.size(path)


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_sizes_are_those_of_the_upright_picture(ending, tmp_path):
    exif, path = Image.Exif(), tmp_path / f"x.{ending}"
    for orientation in range(1, 9):
        exif[ExifTags.Base.Orientation] = orientation
        Image.new("RGB", (20, 16)).save(path, exif=exif)
        expected = (16, 20) if orientation < 5 else (20, 16)
        assert common.size(path) == expected == common.upright(path).size[::-1]
        check_sizes([{"image": str(path), "mask": {"1": {"size": expected}}}], 1)


def test_exif_behind_the_pixels_of_a_png_counts_and_a_usual_png_is_not_decoded(
        tmp_path, monkeypatch):
    path = picture(tmp_path / "x.png")
    turn(path)
    whole = path.read_bytes()
    at = whole.index(b"eXIf") - 4
    stop = at + 12 + int.from_bytes(whole[at:at + 4], "big")
    late = whole[:at] + whole[stop:-12] + whole[at:stop] + whole[-12:]
    (tmp_path / "late.png").write_bytes(late)
    assert common.size(tmp_path / "late.png") == common.upright(path).size[::-1] == (16, 20)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert common.size(path) == (16, 20)


def test_wrong_folders_and_lists_are_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    line = told(capsys, tmp_path / "empty")
    assert "expected good/" in line and "found []" in line
    for name in main.NAMES:
        if name not in ("elpv", "objects365"):
            told(capsys, tmp_path / "empty", name)
    assert "train.json is missing" in told(capsys, tmp_path / "empty", "objects365", "--sam", "x")
    assert "no folder at" in told(capsys, tmp_path / "nowhere", "mvtec")
    (tmp_path / "x.tar").write_bytes(b"")
    assert "unpack the archive first" in told(capsys, tmp_path / "x.tar", "mvtec")
    assert main.main(["visa", "--out", str(tmp_path / "out")]) == 2
    assert "--root is missing" in capsys.readouterr().err
    visa(tmp_path / "visa")
    mask = tmp_path / "visa/candle/Data/Masks/Anomaly/000.png"
    mask.unlink()
    line = told(capsys, tmp_path / "visa", "visa")
    assert "1 files are missing" in line and "Anomaly/000.png" in line
    marks(mask, value=0)  # a bad image whose mask marks nothing is still bad
    assert run("visa", tmp_path / "visa", tmp_path / "visa out", "--partial") == 0
    records = read_manifest(tmp_path / "visa out")
    assert [r.get("anomalous", False) for r in records] == [False, True]
    coco_instances(tmp_path / "coco")
    path = tmp_path / "coco/annotations/instances_train2017.json"
    path.write_text(path.read_text()[:-40])
    line = told(capsys, tmp_path / "coco", "coco")
    assert "instances_train2017.json: not a whole JSON file" in line
    realiad(tmp_path / "realiad")
    path = tmp_path / "realiad/realiad_jsons/realiad_jsons/audiojack.json"
    path.write_text(path.read_text().replace("mask_path", "mask"))
    assert "lacks 'mask_path'" in told(capsys, tmp_path / "realiad", "realiad")
    brats(tmp_path / "brats")
    path = next((tmp_path / "brats").rglob("*_seg.nii.gz"))
    path.write_bytes(path.read_bytes()[:100])
    assert "_seg.nii.gz: not a readable NIfTI volume" in told(capsys, tmp_path / "brats", "brats")
    ade20k(tmp_path / "ade")
    marks(tmp_path / "ade/annotations/training/ADE_train_00000001.png", value=151)
    assert "values [151] have no name" in told(capsys, tmp_path / "ade", "ade20k")
    with pytest.raises(SystemExit) as stop:
        main.main(["imagenet"])
    assert stop.value.code == 2


def test_help_shows_the_folders_and_the_readers_own_options():
    text = subprocess.run([sys.executable, "-m", "data_prep", "objects365", "--help"],
                          capture_output=True, text=True, check=True).stdout
    assert "zhiyuan_objv2_" in text and "--sam" in text and "--quality" in text


# ---- Long lists ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_json_is_read_in_pieces(tmp_path, chunk):
    data = {"info": {"images": [1]}, "images": [{"id": 12, "n": "ü]}"}, {"id": 1.5e3}],
            "skip": [[1, 2], "]"], "numbers": [12, 345], "empty": [],
            "annotations": [{"a": [1, 2, {"b": None}]}], "end": 12}
    text = json.dumps(data, indent=1, ensure_ascii=False)
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    wanted = ("images", "annotations", "numbers", "empty")
    expected = [(key, element) for key in data if key in wanted for element in data[key]]
    assert list(common.json_items(tmp_path / "x.json", *wanted, chunk=chunk)) == expected
    whole = (tmp_path / "x.json").read_text()
    (tmp_path / "x.json").write_text(whole[:-30])
    with pytest.raises(ValueError, match="x.json: not a whole JSON file"):
        list(common.json_items(tmp_path / "x.json", "images", chunk=chunk))


def test_a_stopped_run_leaves_no_half_manifest_and_keeps_the_old_one(tmp_path):
    record = {"image": str(tmp_path / "x.png"), "labels": {}, "split": "test", "group": "x"}

    def broken():
        yield record
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        common.write_manifest(broken(), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    common.write_manifest([record], tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        common.write_manifest(broken(), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["manifest.jsonl"]


def test_records_stream_in_flat_memory(tmp_path):
    many = ({"image": f"{tmp_path}/{i % 7}/{i}.png", "labels": {"1": "x"}, "split": "train",
             "group": str(i)} for i in range(20000))
    tracemalloc.start()
    counts = common.write_manifest(many, tmp_path)
    seen = sum(1 for _ in common.stream(tmp_path / "manifest.jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts["images"] == seen == 20000
    assert peak < 2 ** 20  # held as dictionaries they take 15 MiB
    lines = list(manifest_lines(tmp_path / "manifest.jsonl", 100))
    # spread over the file, each a whole line
    assert 90 <= len({json.loads(line)["group"] for _, line in lines}) <= 110
    assert len(list(manifest_lines(tmp_path / "manifest.jsonl", None))) == 20000


def test_a_sample_of_a_manifest_has_no_line_twice_and_may_have_the_first(tmp_path):
    lengths = np.random.default_rng(0).lognormal(4, 1, 5000).astype(int)
    (tmp_path / "m.jsonl").write_text("\n".join(f"{i} " + "x" * n for i, n in enumerate(lengths)))
    found = [line.split()[0] for _, line in manifest_lines(tmp_path / "m.jsonl", 4000)]
    assert found[0] == "0" and len(set(found)) == len(found) > 2000


@pytest.mark.parametrize("harm", ["cut in half", "16 bits"])
def test_images_that_cannot_be_read_later_are_refused_before_a_training(tmp_path, harm):
    path = picture(tmp_path / "x.png", 64, 64)
    if harm == "16 bits":
        Image.fromarray(np.full((64, 64), 900, np.uint16)).save(path)
    else:
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(ValueError, match="line 7: .*not a readable image"):
        check_sizes([{"image": str(path), "where": "line 7"}], 1)


def test_an_image_in_two_records_is_refused(tmp_path):
    picture(tmp_path / "x.png")
    line = json.dumps({"image": "x.png", "labels": {}, "split": "test"})
    (tmp_path / "manifest.jsonl").write_text(f"{line}\n{line}\n")
    with pytest.raises(ValueError, match="'x.png' of .* in two records"):
        read_source(str(tmp_path))


def measure(number: int, folder: Path) -> None:
    """Print what a manifest of so many records costs: to write, to stream, and to start from as
    train.py does."""
    import resource
    for i in range(50):
        picture(folder / f"raw/patch{i}/x.jpg")
    code = icas.run_lengths(spot())

    def synthetic():
        for i in range(number):
            yield {"image": f"{folder}/raw/patch{i % 50}/x.jpg", "mask": {"1": code},
                   "labels": {"1": f"kind {i % 365}"}, "split": "train", "group": str(i)}
    out = folder / "out"
    for what, work in (
            ("write", lambda: common.write_manifest(synthetic(), out)["images"]),
            ("stream", lambda: sum(1 for _ in common.stream(out / "manifest.jsonl"))),
            ("sample 100,000 as train.py does", lambda: len(read_manifest(out, limit=100_000)))):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
        count, seconds = work(), time.time() - start
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{what}: {count} records, {seconds:.1f} s, peak {after / 1024:.0f} MiB "
              f"({(after - before) / 1024:+.0f})", flush=True)
    print(f"{(folder / 'out/manifest.jsonl').stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        measure(int(sys.argv[1]), Path(place))
