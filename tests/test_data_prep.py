"""data_prep: each reader on a miniature of the published layout; the writer, the counts and hostile input."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_prep.__main__ as main
from data_prep import common
from train import FreshViews, choose, named, read_manifest, read_record

coco = pytest.importorskip("pycocotools.mask")
evaluate = pytest.importorskip("evaluate", reason="needs scikit-learn")
RNG = np.random.default_rng(0)
SPOT = (slice(4, 8), slice(6, 12))  # 24 pixels


def picture(path: Path, h=16, w=20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(path)
    return path


def marks(path: Path, h=16, w=20, value=255, spot=SPOT) -> np.ndarray:
    array = np.zeros((h, w), np.uint8)
    array[spot] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return array


def mvtec(root, category="bottle"):
    for name in ("train/good/000", "train/good/001", "test/good/000", "test/broken/000"):
        picture(root / category / f"{name}.png")
    marks(root / category / "ground_truth/broken/000_mask.png")


def manta(root):
    mvtec(root / "medicine", "capsule")


def flat(root):
    for name in ("good/a b", "good/ü", "bad/1", "bad/2"):
        picture(root / f"{name}.PNG")
    marks(root / "mask/1.png", value=1)


def visa(root):
    lines = ["image,label,mask", "candle/Data/Images/Normal/0000.JPG,normal,"]
    lines += ['candle/Data/Images/Anomaly/000.JPG,"melt, wax",candle/Data/Masks/Anomaly/000.png']
    picture(root / "candle/Data/Images/Normal/0000.JPG"), picture(root / "candle/Data/Images/Anomaly/000.JPG")
    marks(root / "candle/Data/Masks/Anomaly/000.png", value=3)
    (root / "candle/image_anno.csv").write_text("\n".join(lines))
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("object,split,label,image,mask\ncandle,train,normal,candle/Data/Images/Normal/0000.JPG,\n")


def kolektorsdd(root):
    for item, part in (("kos01", 0), ("kos01", 1), ("kos21", 6), ("kos21", 7), ("kos26", 0)):
        picture(root / item / f"Part{part}.jpg", 60, 20)
        marks(root / item / f"Part{part}_label.bmp", 60, 20, spot=SPOT if part == 1 else (slice(0), slice(0)))


def aitex(root):
    picture(root / "Defect_images/0001_002_00.png", 256, 1024)
    picture(root / "Defect_images/0044_019_04.png", 256, 1024)
    picture(root / "NODefect_images/2306881-210020u/0003_000_01.png", 256, 512)
    marks(root / "Mask_images/0001_002_00_mask.png", 256, 1024, spot=(slice(9, 13), slice(300, 306)))
    marks(root / "Mask_images/0044_019_04_mask1.png", 256, 1024, spot=(slice(9, 13), slice(0, 6)))
    marks(root / "Mask_images/0044_019_04_mask2.png", 256, 1024, spot=(slice(9, 13), slice(1000, 1006)))


def voc(root):
    base = root / "VOCdevkit/VOC2012"
    for stem, split in (("2007_000001", "train"), ("2007_000002", "val")):
        picture(base / f"JPEGImages/{stem}.jpg")
        array = marks(base / f"SegmentationClass/{stem}.png", value=15)
        image = Image.fromarray(array, mode="P")
        image.putpalette([(37 * i) % 256 for i in range(768)])
        image.save(base / f"SegmentationClass/{stem}.png")
        (base / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (base / f"ImageSets/Segmentation/{split}.txt").write_text(stem + "\n")


def ade20k(root):
    for split, stem in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        picture(root / f"images/{split}/{stem}.jpg")
        marks(root / f"annotations/{split}/{stem}.png", value=2)
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t1\t1\t1\twall\n2\t0.1\t1\t1\t1\tbuilding, edifice\n")


def instances(root, file_name="{}.jpg", names=("train2017", "val2017"), path="annotations/instances_{}.json"):
    (root / "annotations").mkdir(parents=True)
    for name in names:
        data = {"categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "cup"}],
                "images": [{"id": i, "file_name": file_name.format(i), "height": 16, "width": 20} for i in (1, 2)],
                "annotations": [{"image_id": 1, "category_id": 7, "iscrowd": 0, "bbox": [6, 4, 6, 4], "segmentation": [[6, 4, 12, 4, 12, 8, 6, 8]]},
                                {"image_id": 1, "category_id": 9, "iscrowd": 1, "bbox": [0, 0, 9, 9], "segmentation": [[0, 0, 9, 0, 9, 9]]}]}
        (root / path.format(name)).write_text(json.dumps(data))


def coco_instances(root):
    instances(root)
    for name in ("train2017", "val2017"):
        for i in (1, 2):
            picture(root / name / f"{i}.jpg")


def coco_panoptic(root):
    picture(root / "train2017/1.jpg")
    ids = np.zeros((16, 20, 3), np.uint8)
    ids[SPOT] = (5, 1, 0)  # 5 + 256
    (root / "annotations/panoptic_train2017").mkdir(parents=True)
    Image.fromarray(ids).save(root / "annotations/panoptic_train2017/1.png")
    data = {"categories": [{"id": 7, "name": "cat"}], "images": [{"id": 1, "file_name": "1.jpg"}],
            "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": [{"id": 261, "category_id": 7, "iscrowd": 0}]}]}
    (root / "annotations/panoptic_train2017.json").write_text(json.dumps(data))


def realiad(root):
    base = root / "realiad_256/audiojack"
    files = {"OK/S0001/a_0001_OK_C1.jpg": None, "OK/S0001/a_0001_OK_C2.jpg": None, "NG/HS/S0002/a_0002_NG_HS_C1.jpg": "NG/HS/S0002/a_0002_NG_HS_C1.png",
             "NG/HS/S0002/a_0002_NG_HS_C2.jpg": None}
    entries = [{"category": "audiojack", "anomaly_class": "OK" if "OK" in i else "HS", "image_path": i, "mask_path": m} for i, m in files.items()]
    for image, mask in files.items():
        picture(base / image)
        if mask:
            marks(base / mask)
    (root / "realiad_jsons/realiad_jsons").mkdir(parents=True)
    (root / "realiad_jsons/realiad_jsons/audiojack.json").write_text(json.dumps({"meta": {"prefix": "audiojack/"}, "train": entries[:1], "test": entries[1:]}))


def oct(root):
    for name in ("train/good/p1_0", "test/good/img/p2_0", "test/Ungood/img/p3_0", "test/Ungood/img/p3_1"):
        picture(root / f"{name}.png")
    marks(root / "test/Ungood/label/p3_0.png")
    marks(root / "test/Ungood/label/p3_1.png", value=0)


def nifti(path, array):
    nibabel = pytest.importorskip("nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


def brats(root):
    volume, seg = np.zeros((20, 16, 10), np.int16), np.zeros((20, 16, 10), np.int16)
    volume[..., 3:], seg[6:12, 8:12, 5] = 100, 4
    nifti(root / "BraTS2021_00000/BraTS2021_00000_flair.nii.gz", volume)
    nifti(root / "BraTS2021_00000/BraTS2021_00000_seg.nii.gz", seg)


def lits(root):
    volume, seg = np.full((20, 16, 9), -300, np.int16), np.zeros((20, 16, 9), np.uint8)
    seg[2:15, 2:15, 3:] = 1
    seg[6:12, 8:12, 6] = 2
    nifti(root / "part1/volume-0.nii", volume)
    nifti(root / "part2/segmentation-0.nii", seg)


def magnetic_tile(root):
    for kind, stem in (("Blowhole", "exp1_num_100"), ("Blowhole", "exp2_num_120"), ("Blowhole", "exp1_num_140"), ("Blowhole", "exp2_num_900"),
                       ("Free", "exp1_num_7")):
        picture(root / f"MT_{kind}/Imgs/{stem}.jpg")
        marks(root / f"MT_{kind}/Imgs/{stem}.png", value=255 if kind != "Free" else 0)


# name: (builder, records, of which with a mask, labels, known bad without a mask, train)
CASES = {"mvtec": (mvtec, 4, 1, {"broken"}, 0, 2), "manta": (manta, 4, 1, {"broken"}, 0, 2), "folder": (flat, 4, 1, {"defect"}, 1, None),
         "visa": (visa, 2, 1, {"melt, wax"}, 0, 1), "kolektorsdd": (kolektorsdd, 3, 1, {"crack"}, 0, 0),
         "aitex": (aitex, 5, 3, {"broken end", "fuzzy ball"}, 0, 0), "voc": (voc, 2, 2, {"person"}, 0, 1), "ade20k": (ade20k, 2, 2, {"building"}, 0, 1),
         "coco": (coco_instances, 4, 2, {"cat"}, 0, 2), "coco ": (coco_panoptic, 1, 1, {"cat"}, 0, 1),
         "realiad": (realiad, 4, 1, {"scratch"}, 0, 1), "oct": (oct, 4, 1, {"lesion"}, 1, 1), "brats": (brats, 1, 1, {"tumour"}, 0, None),
         "lits": (lits, 2, 1, {"tumour"}, 0, None), "magnetic_tile": (magnetic_tile, 5, 4, {"blowhole"}, 0, 0)}


@pytest.mark.parametrize("name", CASES)
def test_a_miniature_of_the_published_layout_becomes_records(name, tmp_path, capsys):
    build, count, masked, labels, unmarked, train = CASES[name]
    name = name.strip()
    root, out = tmp_path / "raw data", tmp_path / "out"
    build(root)
    assert main.main([name, "--root", str(root), "--out", str(out), "--partial"]) == 0
    records = read_manifest(out)
    assert len(records) == count and sum("mask" in r for r in records) == masked and sum(r.get("anomalous", False) for r in records) == unmarked
    assert {t for r in records for t in named(r).values()} == labels
    assert train is None or sum(r["split"] == "train" for r in records) == train
    assert len({r["group"] for r in records}) >= 1 and all(Path(r["image"]).is_file() for r in records)
    for record in records:
        image, found = read_record(record)
        if "mask" in record:  # every miniature marks the same 4 x 6 pixels, or 6 x 4 where slices are turned
            assert int((found > 0).sum()) == 24
    found = [r for rows in evaluate.read_source(str(out)).values() for r in rows]    # both scripts take it
    evaluate.look(found)
    assert len({r["name"] for r in found}) == count and sum(bool(r["shows"]) for r in found) == masked
    source = FreshViews(name, choose(out, 0, 0, 0), 28, 14, True)
    assert sum(bool(names) for names in source.shown()) == masked and source.view(0, np.random.default_rng(0)).pixels.shape == (3, 28, 28)
    first = (out / "manifest.jsonl").read_text()
    assert str(tmp_path) not in first  # relative paths: the folder can move
    assert main.main([name, "--root", str(root), "--out", str(out), "--partial"]) == 0 and (out / "manifest.jsonl").read_text() == first
    reader = main.importlib.import_module(f"data_prep.{name}")
    if reader.PUBLISHED and name != "elpv":
        capsys.readouterr()
        assert main.main([name, "--root", str(root), "--out", str(tmp_path / "strict")]) == 2
        assert "counts differ from the published ones" in capsys.readouterr().err and not (tmp_path / "strict/manifest.jsonl").exists()


def test_masks_agree_pixel_by_pixel(tmp_path):
    root = tmp_path / "raw"
    visa(root)
    main.main(["visa", "--root", str(root), "--out", str(tmp_path / "out"), "--partial"])
    record = next(r for r in read_manifest(tmp_path / "out") if "mask" in r)
    expected = np.zeros((16, 20), bool)
    expected[SPOT] = True
    np.testing.assert_array_equal(read_record(record)[1].numpy() > 0, expected)
    coco_panoptic(tmp_path / "coco")
    main.main(["coco", "--root", str(tmp_path / "coco"), "--out", str(tmp_path / "out2"), "--partial"])
    np.testing.assert_array_equal(read_record(read_manifest(tmp_path / "out2")[0])[1].numpy() > 0, expected)


def test_groups_splits_and_windows(tmp_path):
    for name, build in (("magnetic_tile", magnetic_tile), ("realiad", realiad), ("kolektorsdd", kolektorsdd), ("aitex", aitex)):
        build(tmp_path / name)
        extra = ["--strips", "3"] if name == "kolektorsdd" else []
        assert main.main([name, "--root", str(tmp_path / name), "--out", str(tmp_path / f"{name} out"), "--partial", *extra]) == 0
    of = lambda name: read_manifest(tmp_path / f"{name} out")  # noqa: E731
    assert [r["group"] for r in of("magnetic_tile")] == ["Blowhole_1", "Blowhole_1", "Blowhole_2", "Blowhole_3", "Free_1"]
    assert [r["group"] for r in of("realiad")] == ["audiojack/OK/S0001"] * 2 + ["audiojack/NG/HS/S0002"] * 2
    strips = of("kolektorsdd")
    assert len(strips) == 9 and sum("mask" in r for r in strips) == 1 and {r["group"] for r in strips} == {"kos01", "kos21"}
    assert all(tuple(read_record(r)[0].shape) == (3, 20, 20) for r in strips)
    for record in of("aitex"):
        image, labels = read_record(record)
        assert tuple(image.shape[1:]) == (256, 256) and ("mask" in record) == bool(labels.any())


def test_elpv_is_read_from_the_package(tmp_path, capsys):
    pytest.importorskip("elpv_dataset")
    assert main.main(["elpv", "--out", str(tmp_path)]) == 0
    records = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert len(records) == 2223 and sum(r.get("anomalous", False) for r in records) == 715
    assert (tmp_path / records[0]["image"]).resolve().is_file()


def test_boxes_become_masks_with_sam_and_a_stopped_run_goes_on(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from data_prep import objects365
    instances(tmp_path, file_name="images/v2/patch0/{}.jpg", names=("train",), path="annotations/zhiyuan_objv2_{}.json")
    for i in (1, 2):
        picture(tmp_path / f"train/patch0/{i}.jpg")
    vision = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_dim=32, output_channels=16, image_size=64, patch_size=16, window_size=2,
                  global_attn_indexes=[1], num_pos_feats=8)
    prompt = dict(hidden_size=16, image_embedding_size=4, image_size=64, patch_size=16, mask_input_channels=4)
    decoder = dict(hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2, iou_head_depth=1, iou_head_hidden_dim=16)
    sam = transformers.SamModel(transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)).eval()
    processor = transformers.SamProcessor(transformers.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64},
                                                                         mask_size={"longest_edge": 16}, mask_pad_size={"height": 16, "width": 16}))
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return sam, processor
    monkeypatch.setattr(objects365, "load_sam", counted)
    out = tmp_path / "out"
    run = lambda: list(objects365.records(tmp_path, out, quality=-1e9, device="cpu"))  # noqa: E731
    stopped = objects365.records(tmp_path, out, quality=-1e9, device="cpu")
    next(stopped)
    stopped.close()                                      # killed after the first image
    assert len(list(out.glob("sam/*/*.json"))) == 1 and len(calls) == 1
    whole = run()
    assert len(whole) == 2 and len(calls) == 1           # what was done is not done again, and the second has no box
    assert run() == whole and whole[0]["group"] == "1"
    sam.save_pretrained(tmp_path / "sam")
    processor.save_pretrained(tmp_path / "sam")
    monkeypatch.undo()                                   # end to end: the checkpoint from its folder, boxes to a manifest
    command = ["objects365", "--root", str(tmp_path), "--out", str(tmp_path / "again"), "--sam", str(tmp_path / "sam"), "--device", "cpu", "--partial"]
    assert main.main([*command, "--quality=-1e9"]) == 0
    for record in read_manifest(tmp_path / "again"):
        assert tuple(read_record(record)[0].shape) == (3, 16, 20)


def test_hostile_files_are_handled_or_named(tmp_path, capsys):
    def go(root):
        return main.main(["folder", "--root", str(root), "--out", str(tmp_path / "out")])
    flat(tmp_path / "a")
    (tmp_path / "a/good/._ü.png").write_bytes(b"macOS")
    os.symlink(tmp_path / "a", tmp_path / "a/good/loop")
    os.symlink(tmp_path / "a", tmp_path / "a/up")
    assert go(tmp_path / "a") == 0
    whole = (tmp_path / "a/bad/1.PNG").read_bytes()
    (tmp_path / "a/bad/1.PNG").write_bytes(whole[:len(whole) // 2])
    capsys.readouterr()
    assert go(tmp_path / "a") == 2 and "1.PNG: not a readable image" in capsys.readouterr().err
    (tmp_path / "a/bad/1.PNG").write_bytes(whole)
    marks(tmp_path / "a/mask/1.png", 9, 9)
    assert go(tmp_path / "a") == 2 and "mask is (9, 9)" in capsys.readouterr().err
    Image.fromarray((RNG.integers(0, 2, (16, 20)) * 60000).astype(np.uint16)).save(tmp_path / "a/mask/1.png")   # 16-bit
    assert go(tmp_path / "a") == 0
    Image.fromarray(RNG.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(tmp_path / "a/mask/1.png")
    assert go(tmp_path / "a") == 2 and "got colours" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert go(tmp_path / "empty") == 2 and "expected good/" in capsys.readouterr().err
    assert main.main(["mvtec", "--root", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2 and "no folder" in capsys.readouterr().err
    assert main.main(["visa", "--out", str(tmp_path / "out")]) == 2 and "image_anno.csv" in capsys.readouterr().err


def test_a_stopped_run_leaves_no_half_manifest(tmp_path):
    def broken():
        yield {"image": str(tmp_path / "x.png"), "labels": {}, "split": "test", "group": "x"}
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        common.write_manifest(broken(), tmp_path / "out")
    assert not (tmp_path / "out/manifest.jsonl").exists()


def test_records_stream_in_flat_memory(tmp_path):
    import tracemalloc
    many = ({"image": str(tmp_path / f"{i}.png"), "labels": {"1": "x"}, "split": common.split_of(str(i)), "group": str(i)} for i in range(20000))
    tracemalloc.start()
    counts = common.write_manifest(many, tmp_path)
    seen = sum(1 for _ in common.stream(tmp_path / "manifest.jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts["images"] == seen == 20000 and peak < 6 * 2 ** 20  # held as dictionaries they take 15 MiB
    from train import manifest_lines
    lines = list(manifest_lines(tmp_path / "manifest.jsonl", 100))
    assert 90 <= len({json.loads(line)["group"] for _, line in lines}) <= 110          # spread over the file, each a whole line
    assert len(list(manifest_lines(tmp_path / "manifest.jsonl", None))) == 20000
    assert 0.74 < counts["train"] / seen < 0.76
