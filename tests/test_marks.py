"""What is marked on a reference: masks that cannot be meant, boxes, LabelMe and COCO files."""
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEFECT, icas_main, lines, timeless
from PIL import Image, ImageDraw

import icas

H, W = 60, 90


@pytest.fixture
def photo(rng, tmp_path, monkeypatch):
    """A photo-like picture as part.png in the working folder: a gradient with noise."""
    monkeypatch.chdir(tmp_path)
    y, x = np.mgrid[:H, :W]
    image = (60 + y + x)[..., None] + rng.normal(0, 6, (H, W, 3))
    image = image.clip(0, 255).astype(np.uint8)
    Image.fromarray(image).save("part.png")
    return image


def drawn(size, draw, mode="L"):
    """A mask that `draw` paints into at (W, H) = `size`."""
    canvas = Image.new(mode, size)
    draw(ImageDraw.Draw(canvas))
    return canvas


def as_jpeg(image, quality=75):
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer)


# ---- masks that cannot be meant ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_defect_painted_on_a_copy_of_the_photo_is_refused(tiny, photo, kind):
    painted = Image.fromarray(photo)
    ImageDraw.Draw(painted).ellipse((20, 10, 40, 30), fill=(255, 0, 0))
    painted.save(f"painted.{kind}")
    for given in (f"painted.{kind}", f"painted.{kind}", painted, np.array(painted), photo[..., 0]):
        with pytest.raises(ValueError) as caught:
            icas.encode([("part.png", given)], model=tiny)
        said = str(caught.value)
        assert "anomalies[0] mask" in said and "is a picture, not a mask" in said
        assert "white on black" in said and "a box (x0, y0, x1, y1)" in said
    with pytest.raises(ValueError, match="is a picture, not a mask"):
        icas.segment(photo, mask=painted, model=tiny)


SCRATCH = [(10, 10), (200, 90), (390, 120)]


@pytest.mark.parametrize("mask", [
    drawn((400, 300), lambda d: d.line(SCRATCH, 255, 1)),
    drawn((400, 300), lambda d: d.line(SCRATCH, 1, 9)),
    drawn((400, 300), lambda d: [d.ellipse((20 * i, 9 * i, 20 * i + 15, 9 * i + 40), i + 1)
                                 for i in range(19)]),
    drawn((400, 300), lambda d: d.ellipse((50, 50, 250, 250), (255, 0, 0)), "RGB"),
    as_jpeg(drawn((400, 300), lambda d: d.line(SCRATCH, 255, 3))),
    as_jpeg(drawn((400, 300), lambda d: d.line(SCRATCH, 255, 1))),
    as_jpeg(drawn((400, 300), lambda d: d.ellipse((50, 50, 250, 250), (255, 0, 0)), "RGB")),
    drawn((1600, 1200), lambda d: d.line([(4 * x, 4 * y) for x, y in SCRATCH], 255, 12)).resize(
        (400, 300), Image.Resampling.LANCZOS),
    drawn((80, 60), lambda d: d.ellipse((20, 10, 50, 40), 255)).resize(
        (400, 300), Image.Resampling.BICUBIC),
], ids=["thin", "0 and 1", "label map", "red", "JPEG", "thin JPEG", "red JPEG", "antialiased",
        "enlarged"])
def test_masks_as_tools_save_them_pass_without_a_warning(mask):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = icas.to_mask(mask, (300, 400))
    marked = np.array(mask).reshape(300, 400, -1).any(axis=-1)
    np.testing.assert_array_equal(found.numpy(), marked)


def test_a_mask_of_more_than_half_is_warned_of_with_what_was_read(tiny, photo):
    inverted = np.full((H, W), 255, np.uint8)
    inverted[10:30, 20:71] = 0   # 1020 of 5400 pixels: 81 % are marked
    Image.fromarray(inverted).save("inverted.png")
    with pytest.warns(UserWarning, match="anomalies.0. mask 'inverted.png': 81% marked.*invert it"):
        icas.encode([("part.png", "inverted.png")], turns=False, model=tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        icas.encode([("part.png", 255 - inverted)], turns=False, model=tiny)


def test_the_warning_is_one_line_on_the_command_line(model, parts, monkeypatch):
    mask = np.full((40, 40), 255, np.uint8)
    mask[10:20, 10:20] = 0
    Image.fromarray(mask).save("inverted.png")
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # set back afterwards
    with pytest.warns(UserWarning, match="inverted.png': 94% marked"):
        assert icas_main("segment", "parts/a.png", "--anomaly", "defect.png", "inverted.png",
                         "--out", "out", model=model) == 0
    assert warnings.formatwarning("94% marked", UserWarning, "icas.py", 9) == "icas: 94% marked\n"


# ---- a box in place of a mask --------------------------------------------------------------------


def same_shots(a, b):
    assert len(a.shots) == len(b.shots) and a.labels == b.labels
    for one, other in zip(a.shots, b.shots, strict=True):
        assert one[2:] == other[2:] and all(map(torch.equal, one.sides, other.sides))
        assert torch.equal(one.features.maps, other.features.maps)
        assert torch.equal(one.features.picture, other.features.picture)


@pytest.mark.parametrize("box, rows, columns", [
    ((20, 10, 40, 30), (10, 30), (20, 40)), ([20.2, 10.9, 39.1, 29.5], (10, 30), (20, 40)),
    ((0, 0, 90, 20), (0, 20), (0, 90)), (np.array([20, 10, 40, 30]).tolist(), (10, 30), (20, 40))])
def test_a_box_is_the_mask_of_the_pixels_that_it_touches(tiny, photo, box, rows, columns):
    mask = np.zeros((H, W), bool)
    mask[slice(*rows), slice(*columns)] = True
    same_shots(*(icas.encode([("part.png", given, "dent")], model=tiny) for given in (box, mask)))
    assert icas.encode([("part.png", box)], turns=False, model=tiny).labels == ["defect"]


@pytest.mark.parametrize("box, kind, said", [
    ((20, 10, 91, 30), ValueError, "expected 0 <= x0 < x1 <= 90"),
    ((40, 10, 20, 30), ValueError, "expected 0 <= x0 < x1 <= 90"),
    ((20, 10, 20, 30), ValueError, "expected 0 <= x0 < x1 <= 90"),
    ((20, 10, 40, float("nan")), ValueError, "expected finite numbers"),
    ((20, 10, 40), TypeError, "expected a mask, a path or a box (x0, y0, x1, y1)"),
    (("a", "b", "c", "d"), TypeError, "expected numbers")])
def test_a_wrong_box_is_refused_by_its_place_in_the_list(tiny, photo, box, kind, said):
    with pytest.raises(kind) as caught:
        icas.encode([("part.png", (20, 10, 40, 30)), ("part.png", box)], model=tiny)
    assert said in str(caught.value) and "anomalies[1]" in str(caught.value)


def test_a_box_on_the_command_line_is_the_mask_of_the_box(model, parts):
    # mask.png marks rows and columns 10 to 19
    box = ["--anomaly", "defect.png", 10, 10, 20, 20]
    for out, given in (("mask", DEFECT), ("box", box)):
        assert icas_main("segment", "parts", *given, "--out", out, model=model) == 0
    assert timeless(lines("box")) == timeless(lines("mask"))


# ---- LabelMe -------------------------------------------------------------------------------------


def label_me(*shapes, size=(H, W), **more):
    """Write part.json as LabelMe does. shapes: (label, type, points) each."""
    pytest.importorskip("pycocotools")
    drawn = [{"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}}
             for label, kind, points in shapes]
    Path("part.json").write_text(json.dumps({
        "version": "5.5.0", "flags": {}, "shapes": drawn, "imagePath": "part.png",
        "imageData": None, "imageHeight": size[0], "imageWidth": size[1]} | more))
    return "part.json"


def marks_of(path, image="part.png", shape=(H, W)):
    return icas.read_marks(path, image, shape, "mask")


def box_mask(y0, y1, x0, x1):
    mask = np.zeros((H, W), bool)
    mask[y0:y1, x0:x1] = True
    return mask


TRIANGLE = [[10, 10], [50, 10], [10, 50]]


def test_a_polygon_of_labelme_marks_what_it_encloses(tiny, photo):
    found = marks_of(label_me(("crack", "polygon", TRIANGLE)))
    y, x = np.mgrid[:H, :W] + 0.5
    inside = (x > 10) & (y > 10) & (x + y < 60)
    near = np.abs(x + y - 60) < 3   # tools differ on pixels that the outline cuts
    assert list(found) == ["crack"]
    np.testing.assert_array_equal(found["crack"] | near, inside | near)
    references = icas.encode([("part.png", "part.json")], model=tiny)
    assert references.labels == ["crack"]
    same_shots(references, icas.encode([(photo, found["crack"], "crack")], model=tiny))


@pytest.mark.parametrize("corners", [[[20, 10], [40, 30]], [[40, 30], [20, 10]],
                                     [[40, 10], [20, 30]]])
def test_a_rectangle_of_labelme_is_a_box_whichever_corners_are_given(photo, corners):
    found = marks_of(label_me(("dent", "rectangle", corners)))
    np.testing.assert_array_equal(found["dent"], box_mask(10, 30, 20, 40))


def test_several_labels_are_several_prompts_and_shapes_of_one_label_are_one(tiny, photo):
    path = label_me(("dent", "rectangle", [[20, 10], [40, 30]]), ("crack", "polygon", TRIANGLE),
                    ("dent", "rectangle", [[60, 40], [80, 50]]))
    found = marks_of(path)
    assert set(found) == {"dent", "crack"}
    np.testing.assert_array_equal(found["dent"],
                                  box_mask(10, 30, 20, 40) | box_mask(40, 50, 60, 80))
    references = icas.encode([("part.png", path)], model=tiny)
    assert references.labels == ["crack", "dent"] and len(references) == 2
    assert icas.segment(photo, references, model=tiny).labels == ["crack", "dent"]
    assert set(marks_of(label_me(("", "rectangle", [[20, 10], [40, 30]])))) == {"defect"}
    path = label_me(("dent", "rectangle", [[20, 10], [40, 30]]), ("crack", "polygon", TRIANGLE),
                    ("dent", "rectangle", [[60, 40], [80, 50]]))
    # a label that is given joins all of them
    joined = icas.encode([("part.png", path, "any")], model=tiny)
    same_shots(joined, icas.encode([(photo, found["dent"] | found["crack"], "any")], model=tiny))


@pytest.mark.parametrize("change, said", [
    (lambda: label_me(("a", "rectangle", [[20, 10], [40, 30]]), size=(W, H)),
     "made for a picture of (90, 60) (height, width), this has (60, 90)"),
    (lambda: label_me(), "nothing is outlined in it"),
    (lambda: label_me(("a", "circle", [[20, 10], [40, 30]])), "shape_type 'circle'"),
    (lambda: label_me(("a", "polygon", [])), "holds no outlines"),
    (lambda: label_me(("a", "polygon", [[200, 200], [250, 200], [200, 250]])),
     "nothing is marked in it"),
    (lambda: Path("part.json").write_text('{"shapes": [') and "part.json", "holds no outlines"),
    (lambda: Path("part.json").write_text('{"shapes": 3}') and "part.json", "holds no outlines"),
    (lambda: Path("part.json").write_text("[1, 2]") and "part.json", "holds no outlines"),
    (lambda: Path("part.json").write_text("3") and "part.json", "holds no outlines"),
    (lambda: Path("part.json").write_bytes(b"\xff\xfe\x00") and "part.json", "holds no outlines"),
    (lambda: "none.json", "no such file")], ids=range(11))
def test_a_file_that_cannot_be_meant_is_refused_by_name(tiny, photo, change, said):
    pytest.importorskip("pycocotools")
    path = change()
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        icas.encode([("part.png", path)], model=tiny)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert f"anomalies[0] mask '{path}'" in str(caught.value)


# ---- COCO ----------------------------------------------------------------------------------------


def coco_file(*annotations, image="part.png", size=(H, W), others=()):
    """Write coco.json of one image and its annotations, among `others`' file names."""
    pytest.importorskip("pycocotools")
    images = [{"id": 7, "file_name": image, "height": size[0], "width": size[1]}]
    images += [{"id": 8 + i, "file_name": name, "height": 5, "width": 5}
               for i, name in enumerate(others)]
    rows = [{"id": i, "image_id": 7, "iscrowd": 0} | a for i, a in enumerate(annotations, 1)]
    rows += [{"id": 99 + i, "image_id": 8 + i, "category_id": 1, "bbox": [0, 0, 5, 5]}
             for i in range(len(others))]
    kinds = [{"id": 1, "name": "dent"}, {"id": 5, "name": "crack"}]
    Path("coco.json").write_text(json.dumps({"images": images, "annotations": rows,
                                             "categories": kinds}))
    return "coco.json"


def counts(mask):
    """COCO's plain run lengths, down the columns."""
    flat = np.concatenate([[0], mask.T.ravel(), [1 - mask.T.ravel()[-1]]])
    changes = np.flatnonzero(np.diff(flat)).tolist()
    return np.diff([0, *changes]).tolist()


BOX = box_mask(10, 30, 20, 40)
OUTLINE = [20, 10, 40, 10, 40, 30, 20, 30]


@pytest.mark.parametrize("marks", [
    lambda: {"segmentation": [OUTLINE], "bbox": [0, 0, 90, 60]},
    lambda: {"segmentation": [OUTLINE[:6], [20, 10, 40, 30, 20, 30]]},
    lambda: {"segmentation": {"size": [H, W], "counts": counts(BOX.astype(int))}, "iscrowd": 1},
    lambda: {"segmentation": icas.run_lengths(BOX), "iscrowd": 1},
    lambda: {"bbox": [20, 10, 20, 20]}, lambda: {"segmentation": [], "bbox": [20, 10, 20, 20]}],
    ids=["polygon", "two polygons", "run lengths", "compressed", "bbox", "empty and bbox"])
def test_what_coco_outlines_is_marked(photo, marks):
    pytest.importorskip("pycocotools")
    found = marks_of(coco_file({"category_id": 1} | marks()))
    np.testing.assert_array_equal(found["dent"], BOX)


def test_coco_s_categories_are_labels_and_other_images_are_left_out(tiny, photo):
    path = coco_file({"category_id": 1, "bbox": [20, 10, 20, 20]},
                     {"category_id": 5, "segmentation": [[10, 40, 50, 40, 50, 55, 10, 55]]},
                     {"category_id": 1, "segmentation": icas.run_lengths(box_mask(50, 55, 60, 80))},
                     others=["other.png", "art.png", "part.jpg"])
    found = marks_of(path)
    assert set(found) == {"dent", "crack"}
    np.testing.assert_array_equal(found["dent"], BOX | box_mask(50, 55, 60, 80))
    np.testing.assert_array_equal(found["crack"], box_mask(40, 55, 10, 50))
    assert icas.encode([("part.png", path)], turns=False, model=tiny).labels == ["crack", "dent"]


@pytest.mark.parametrize("image, name, found", [
    ("data/train/part.png", "part.png", True), ("data/train/part.png", "train/part.png", True),
    ("data/train/part.png", "test/part.png", False), ("data/art.png", "part.png", False)])
def test_an_image_is_known_by_the_end_of_its_path(photo, image, name, found):
    path = coco_file({"category_id": 1, "bbox": [20, 10, 20, 20]}, image=name)
    if found:
        assert set(marks_of(path, image)) == {"dent"}
    else:
        with pytest.raises(ValueError, match="holds no outlines of this image"):
            marks_of(path, image)


@pytest.mark.parametrize("outline", [{}, {"segmentation": []}, {"segmentation": [[]]}])
def test_where_coco_outlines_nothing_its_box_counts(photo, outline):
    found = marks_of(coco_file({"category_id": 1, "bbox": [20, 10, 20, 20]} | outline))
    np.testing.assert_array_equal(found["dent"], BOX)


def test_an_image_is_known_from_within_its_folder_too(photo, tmp_path, monkeypatch):
    path = tmp_path / coco_file({"category_id": 1, "bbox": [20, 10, 20, 20]}, image="train/a.png")
    Path("train").mkdir()
    Image.fromarray(photo).save("train/a.png")
    monkeypatch.chdir(tmp_path / "train")
    assert set(marks_of(path, "a.png")) == {"dent"}


@pytest.mark.parametrize("make, said", [
    (lambda: coco_file({"category_id": 1, "bbox": [20, 10, 20, 20]}, size=(61, 90)),
     "made for a picture of (61, 90)"),
    (lambda: coco_file({"category_id": 1, "bbox": [20, 10, 20, 20]}, image="b.png"),
     "holds no outlines of this image"),
    (lambda: coco_file(), "nothing is outlined in it"),
    (lambda: coco_file({"category_id": 2, "bbox": [20, 10, 20, 20]}), "holds no outlines"),
    (lambda: coco_file({"category_id": 1}), "holds no outlines"),
    (lambda: coco_file({"category_id": 1, "segmentation": icas.run_lengths(BOX[:30])}), "size"),
    (lambda: coco_file({"category_id": 1, "segmentation": icas.run_lengths(BOX & False)}),
     "nothing is marked in it"),
    (lambda: coco_file({"category_id": 1, "segmentation": [["a"] * 6]}), "holds no outlines"),
    (lambda: coco_file({"category_id": 1, "segmentation": [[3, 4]]}), "holds no outlines"),
    (lambda: coco_file({"category_id": 1, "segmentation": "far"}), "holds no outlines")],
    ids=["size", "name", "none", "category", "no shape", "size of the code", "empty", "letters",
         "one point", "text"])
def test_coco_that_does_not_fit_the_image_is_refused_by_name(tiny, photo, make, said):
    pytest.importorskip("pycocotools")
    path = make()
    with pytest.raises(ValueError) as caught:
        icas.encode([("part.png", path)], turns=False, model=tiny)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert "anomalies[0] mask 'coco.json'" in str(caught.value)


def test_outlines_are_those_of_the_upright_picture(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(photo))).save("turned.png", exif=exif)
    pixels, shape = icas.read_rgb("turned.png")
    assert shape == (H, W) == tuple(pixels.shape[:2])
    found = marks_of(label_me(("a", "rectangle", [[20, 10], [40, 30]])), "turned.png", shape)
    np.testing.assert_array_equal(found["a"], BOX)


def test_what_icas_writes_as_coco_is_read_as_marks_again(model, parts):
    pytest.importorskip("pycocotools")
    assert icas_main("segment", "parts", *DEFECT, "--threshold", 0.4, "--out", "out",
                     model=model) == 0
    marked_ones = [r for r in lines() if r["regions"]]
    assert marked_ones
    for r in marked_ones:
        marked = np.array(Image.open(Path("out", r["mask"]))) > 0
        found = icas.read_marks("out/coco.json", f"parts/{r['image']}", marked.shape, "mask")
        np.testing.assert_array_equal(found["defect"], marked)


def test_the_command_line_takes_a_file_of_either_tool(model, parts):
    shape = {"label": "defect", "shape_type": "rectangle", "points": [[10, 10], [20, 20]]}
    Path("defect.json").write_text(json.dumps({"shapes": [shape], "imageHeight": 40,
                                               "imageWidth": 40}))
    coco_file({"category_id": 1, "bbox": [10, 10, 10, 10]}, image="defect.png", size=(40, 40))
    for out, given in (("mask", "mask.png"), ("me", "defect.json"), ("coco", "coco.json")):
        assert icas_main("segment", "parts", "--anomaly", "defect.png", given, "--out", out,
                         "--threshold", 0.4, model=model) == 0
    expected = [(r["score"], r["area"]) for r in lines("mask")]
    for out, label in (("me", "defect"), ("coco", "dent")):
        assert [(r["score"], r["area"]) for r in lines(out)] == expected
        assert {b["label"] for r in lines(out) for b in r["regions"]} == {label}
    # another file behind the same argument is another run
    coco_file({"category_id": 1, "bbox": [10, 10, 9, 9]}, image="defect.png", size=(40, 40))
    assert icas_main("segment", "parts", "--anomaly", "defect.png", "coco.json", "--out", "coco",
                     model=model) == 2
