"""Wrong input: one row a message. Each must name the argument and say what was expected."""
import json
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import keep_detail
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from safetensors.torch import load_file, safe_open, save_file

import icas
from data_prep.common import size

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
MASK = np.zeros((20, 30), dtype=bool)
MASK[5:10, 5:10] = True
MISSING_FILE = "no/such/file.png"


@pytest.fixture
def c(tiny, tmp_path, monkeypatch):
    """The model, a folder, and ways to use them; files are made when a row asks for them."""
    def checkpoint(change=lambda tensors, meta: None):
        save_file(tiny.encoder.state_dict(), tmp_path / "encoder.safetensors")
        keep_detail(tiny, tmp_path / "detail.safetensors", monkeypatch)
        monkeypatch.setattr(tiny, "encoder_sha256", icas.sha256(tmp_path / "encoder.safetensors"))
        path = tmp_path / "tiny.safetensors"
        icas.save(tiny, path)
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            meta = dict(file.metadata())
        change(tensors, meta)
        save_file(tensors, path, metadata=meta)
        return path

    def text(name="text.png", content=b"not a picture"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    def truncated(path):
        path.write_bytes(path.read_bytes()[:-200])
        return path

    def png():
        noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "cut.png")
        return tmp_path / "cut.png"

    def deep_png():
        """2 x 2 pixels of three channels of 16 bits, which Pillow reads and cannot write."""
        rows = zlib.compress(2 * (b"\0" + bytes(2 * 3 * 2)))
        chunks = [(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)), (b"IDAT", rows),
                  (b"IEND", b"")]
        return text("deep.png", b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks))

    def references():
        icas.encode([(IMAGE, MASK)], model=tiny).save(tmp_path / "r.safetensors")
        return tmp_path / "r.safetensors"

    def pickled(value):
        torch.save(value, tmp_path / "state.pth")
        return tmp_path / "state.pth"

    return SimpleNamespace(
        tiny=tiny, folder=tmp_path, checkpoint=checkpoint, text=text, truncated=truncated, png=png,
        deep_png=deep_png, references=references, pickled=pickled,
        segment=lambda image=IMAGE, *a, **k: icas.segment(image, *a, model=tiny, **k),
        detect=lambda image=IMAGE, *a, **k: icas.detect(image, *a, model=tiny, **k),
        marked=lambda *entries: icas.encode(list(entries), model=tiny),
        normal=lambda *images: icas.encode(normals=list(images), model=tiny))


def without(*names):
    def change(tensors, meta):
        for name in names:
            tensors.pop(name)
    return change


def meta_is(**values):
    return lambda tensors, meta: meta.update(values)


NAN = torch.full((3, 4, 4), torch.nan)
GOOD = {"anomalies": [(IMAGE, MASK)]}
ROWS = [
    # to_rgb
    (lambda c: icas.to_rgb(None),
     TypeError, "image: expected a path, PIL image, NumPy array or tensor, got NoneType"),
    (lambda c: icas.to_rgb([[1, 2]], name="here"), TypeError, "here: expected"),
    (lambda c: icas.to_rgb(b"bytes"), TypeError, "got bytes"),
    (lambda c: icas.to_rgb(np.float64(3)), TypeError, "got float64"),
    (lambda c: icas.to_rgb(np.array(3, np.uint8)), ValueError, "image: expected (H, W)"),
    (lambda c: icas.to_rgb(np.zeros(5, np.uint8)), ValueError, "shape (5,)"),
    (lambda c: icas.to_rgb(np.zeros((4, 4, 2), np.uint8)),
     ValueError, "shape (4, 4, 2)"),
    (lambda c: icas.to_rgb(np.zeros((3, 9, 9), np.uint8)),
     ValueError, "shape (3, 9, 9)"),
    (lambda c: icas.to_rgb(np.zeros((1, 9, 9, 3), np.uint8)),
     ValueError, "shape (1, 9, 9, 3)"),
    (lambda c: icas.to_rgb(np.zeros((0, 9, 3), np.uint8)), ValueError, "at least one pixel"),
    (lambda c: icas.to_rgb(torch.zeros(9, 9, 3)),
     ValueError, "expected a (3, H, W) tensor, got shape (9, 9, 3)"),
    (lambda c: icas.to_rgb(torch.zeros(1, 3, 9, 9)), ValueError, "expected a (3, H, W) tensor"),
    (lambda c: icas.to_rgb(torch.zeros(3, 0, 9)), ValueError, "at least one pixel"),
    (lambda c: icas.to_rgb(torch.full((3, 9, 9), 255.0)),
     ValueError, "expected a float tensor in [0, 1], got [255, 255]"),
    (lambda c: icas.to_rgb(NAN), ValueError, "NaN"),
    (lambda c: icas.to_rgb(torch.full((3, 9, 9), -torch.inf)), ValueError, "[0, 1]"),
    (lambda c: icas.to_rgb(np.zeros((9, 9, 3), np.float32)),
     ValueError, "expected 8-bit values (uint8), got torch.float32"),
    (lambda c: icas.to_rgb(np.full((9, 9), 300, np.uint16)), ValueError, "value_range=(0, 1023)"),
    (lambda c: icas.to_rgb(np.zeros((9, 9), np.int64)), ValueError, "expected 8-bit values"),
    (lambda c: icas.to_rgb(np.zeros((9, 9), np.complex64)),
     TypeError, "image: expected numbers of at most 64 bits, got an array of dtype complex64"),
    (lambda c: icas.to_rgb(np.array([["a", "b"]])), TypeError, "image: expected numbers"),
    (lambda c: icas.to_rgb(np.array([[None]])), TypeError, "dtype object"),
    (lambda c: icas.to_rgb(np.full((4, 4), np.nan), value_range=(0, 1)),
     ValueError, "expected finite values, got NaN"),
    (lambda c: icas.to_rgb(IMAGE, value_range=(5, 5)),
     ValueError, "value_range: expected (low, high) with low < high"),
    (lambda c: icas.to_rgb(IMAGE, value_range=(9, 5)), ValueError, "value_range: expected"),
    (lambda c: icas.to_rgb(IMAGE, value_range=5),
     ValueError, "value_range: expected (low, high) with low < high, got 5"),
    (lambda c: icas.to_rgb(IMAGE, value_range=(1, 2, 3)), ValueError, "value_range: expected"),
    (lambda c: icas.to_rgb(np.zeros((4, 4), np.longdouble)), TypeError, "image: expected"),
    (lambda c: icas.to_rgb(MISSING_FILE), FileNotFoundError, f"image: no file at '{MISSING_FILE}'"),
    (lambda c: icas.to_rgb(c.folder), FileNotFoundError, "image: no file at"),
    (lambda c: icas.to_rgb(c.text()), ValueError, "is not a readable image"),
    (lambda c: icas.to_rgb(c.text(content=b"")), ValueError, "is not a readable image"),
    (lambda c: icas.to_rgb(c.truncated(c.png())), ValueError, "cut.png' is not a readable image"),
    (lambda c: icas.to_rgb(Image.open(c.truncated(c.png()))), ValueError, "image: "),
    (lambda c: icas.to_rgb(c.deep_png()), ValueError, "colours of 16 bits a channel"),
    (lambda c: icas.to_rgb(c.deep_png(), value_range=(0, 65535)), ValueError, "16 bits a channel"),
    (lambda c: size(c.deep_png()), ValueError, "colours of 16 bits a channel"),
    (lambda c: icas.to_rgb(IMAGE, value_range=(np.nan, 5)), ValueError, "value_range: expected"),
    (lambda c: icas.to_rgb(IMAGE, value_range=(0, np.inf)), ValueError, "value_range: expected"),
    (lambda c: icas.to_rgb(icas.encode_image(IMAGE, model=c.tiny)), TypeError, "got EncodedImage"),
    (lambda c: icas.to_rgb(MISSING_FILE, value_range=(0, 9)), FileNotFoundError, "image: no file"),
    (lambda c: icas.to_mask(MASK, (20, 31)),
     ValueError, "mask: expected the image's size (20, 31)"),
    # encode_image, prepare
    (lambda c: icas.encode_image(MISSING_FILE, model=c.tiny),
     FileNotFoundError, "image: no file at"),
    (lambda c: icas.encode_image(NAN, "part 7", model=c.tiny),
     ValueError, "part 7: expected a float tensor"),
    (lambda c: icas.encode_image(IMAGE, model="vits14"),
     TypeError, "model: expected what icas.load returns"),
    (lambda c: icas.prepare([(IMAGE, MASK)], model=c.tiny),
     TypeError, "references: expected what icas.encode returns, got list"),
    (lambda c: icas.prepare(c.marked((IMAGE, MASK)), model=3),
     TypeError, "model: expected what icas.load returns"),
    # segment
    (lambda c: c.segment(), ValueError, "references: none given; pass anomalies="),
    (lambda c: c.segment(IMAGE, icas.References()), ValueError, "references: none given"),
    (lambda c: c.segment(IMAGE, [(IMAGE, MASK)]),
     TypeError, "references: expected what icas.encode returns, got list"),
    (lambda c: c.segment(MISSING_FILE, **GOOD),
     FileNotFoundError, f"images: no file at '{MISSING_FILE}'"),
    (lambda c: c.segment([IMAGE, c.text()], **GOOD), ValueError, "images[1]"),
    (lambda c: c.segment([IMAGE, IMAGE, None], **GOOD), TypeError, "images[2]: expected a path"),
    (lambda c: c.segment(NAN, **GOOD), ValueError, "images: expected a float tensor in [0, 1]"),
    (lambda c: c.segment((x for x in [IMAGE]), **GOOD), TypeError, "images: expected"),
    (lambda c: c.segment(np.stack([IMAGE] * 2), **GOOD), ValueError, "images: expected (H, W)"),
    (lambda c: c.segment(threshold=2, **GOOD),
     ValueError, "threshold: expected a number in [0, 1], got 2"),
    (lambda c: c.segment(threshold=float("nan"), **GOOD), ValueError, "threshold: expected"),
    (lambda c: c.segment(threshold="high", **GOOD),
     ValueError, "threshold: expected a number in [0, 1], got 'high'"),
    (lambda c: icas.segment(IMAGE, model="vits14", **GOOD),
     TypeError, "model: expected what icas.load returns, got str"),
    (lambda c: c.segment(normals=IMAGE), TypeError, "normals: expected a list, got ndarray"),
    (lambda c: c.segment(anomalies={"image": IMAGE}),
     TypeError, "anomalies: expected a list, got dict"),
    # points, boxes, mask
    (lambda c: c.segment(points=[(30, 5)]),
     ValueError, "points: expected x in [0, 30) and y in [0, 20) pixels, got (30, 5)"),
    (lambda c: c.segment(points=[(5, 5), (5, -1)]), ValueError, "points: expected x in"),
    (lambda c: c.segment(points=[(5, np.nan)]),
     ValueError, "points: expected finite numbers, (x, y) in pixels, got NaN or infinity in "
                 "[5.0, nan]"),
    (lambda c: c.segment(points=[(5, 5), (np.inf, 3)]),
     ValueError, "points: expected finite numbers, (x, y) in pixels, got NaN or infinity in "
                 "[inf, 3.0]"),
    (lambda c: c.segment(boxes=[(1, 2, 3, np.nan)]),
     ValueError, "boxes: expected finite numbers, (x0, y0, x1, y1) in pixels, got NaN"),
    (lambda c: c.segment(points=(5, 5)),
     ValueError, "points: expected at least one row, (x, y) in pixels, got shape (2,)"),
    (lambda c: c.segment(points=[]), ValueError, "points: expected at least one"),
    (lambda c: c.segment(points=[(1, 2, 3)]), ValueError, "points: expected"),
    (lambda c: c.segment(points=[("a", "b")]), TypeError, "points: expected numbers"),
    (lambda c: c.segment(points=[(5, 5)], point_labels=[1, 0]),
     ValueError, "point_labels: expected one 1 (defect) or 0 (not) for each of 1 points"),
    (lambda c: c.segment(points=[(5, 5)], point_labels=[2]),
     ValueError, "point_labels: expected one 1"),
    (lambda c: c.segment(points=[(5, 5)], point_labels=1),
     ValueError, "point_labels: expected one 1"),
    (lambda c: c.segment(points=[(5, 5)], point_labels=["x"]),
     ValueError, "point_labels: expected"),
    (lambda c: c.segment(points=[(5, 5)], point_labels=[None]),
     ValueError, "point_labels: expected"),
    (lambda c: c.segment(points=[(5, 5), (6, 6)], point_labels=[1, 0.7]),
     ValueError, "point_labels: expected"),
    (lambda c: c.segment(points=[(5, 5)], point_labels=[0]),
     ValueError, "points: expected at least one positive point"),
    (lambda c: c.segment(point_labels=[1], **GOOD),
     ValueError, "point_labels: given without points"),
    (lambda c: c.segment([IMAGE, IMAGE], points=[(5, 5)]),
     ValueError, "points, boxes, mask: expected one image with them, got a list"),
    (lambda c: c.segment([IMAGE], mask=MASK), ValueError, "expected one image with them"),
    (lambda c: c.segment(boxes=[(0, 0, 31, 20)]), ValueError, "boxes: expected 0 <= x0 < x1 <= 30"),
    (lambda c: c.segment(boxes=[(9, 9, 3, 12)]), ValueError, "got (9, 9, 3, 12)"),
    (lambda c: c.segment(boxes=[(-1, 0, 5, 5)]), ValueError, "boxes: expected 0 <= x0"),
    (lambda c: c.segment(boxes=(1, 2, 3, 4)),
     ValueError, "boxes: expected at least one row, (x0, y0, x1, y1) in pixels, got shape (4,)"),
    (lambda c: c.segment(boxes="all"), TypeError, "boxes: expected numbers"),
    (lambda c: c.segment(mask=MASK.T),
     ValueError, "mask: expected the image's size (20, 30) (height, width), got (30, 20)"),
    (lambda c: c.segment(mask=MASK & False), ValueError, "mask: nothing is marked"),
    (lambda c: c.segment(mask=[[1]]), TypeError, "mask: expected a path"),
    # encode
    (lambda c: c.marked((IMAGE, MASK & False)),
     ValueError, "anomalies[0] mask: nothing is marked in it"),
    (lambda c: c.marked((IMAGE, MASK), (IMAGE, MASK[:5])),
     ValueError, "anomalies[1] mask: expected the image's size (20, 30)"),
    (lambda c: c.marked((IMAGE, None)), TypeError, "anomalies[0] mask: expected a path"),
    (lambda c: c.marked((IMAGE, MASK.astype(str))),
     TypeError, "anomalies[0] mask: expected numbers"),
    (lambda c: c.marked((IMAGE, MISSING_FILE)), FileNotFoundError, "anomalies[0] mask: no file at"),
    (lambda c: c.marked((IMAGE, c.text())), ValueError, "anomalies[0] mask"),
    (lambda c: c.marked((IMAGE,)),
     TypeError, "anomalies[0]: expected (image, mask) or (image, mask, label), got tuple of "
                "length 1"),
    (lambda c: c.marked((IMAGE, MASK, "a", "b")), TypeError, "got tuple of length 4"),
    (lambda c: c.marked(IMAGE), TypeError, "anomalies[0]: expected (image, mask)"),
    (lambda c: c.marked((IMAGE, MASK, 3)),
     TypeError, "anomalies[0]: expected a non-empty string as label, got 3"),
    (lambda c: c.marked((IMAGE, MASK, "")), TypeError, "non-empty string"),
    (lambda c: icas.encode((IMAGE, MASK), model=c.tiny),
     TypeError, "anomalies[0]: expected (image, mask)"),
    (lambda c: icas.encode("image.png", model=c.tiny),
     TypeError, "anomalies: expected a list, got str"),
    (lambda c: icas.encode(normals="good.png", model=c.tiny),
     TypeError, "normals: expected a list, got str of length 8; put a single one in brackets"),
    (lambda c: c.normal(IMAGE, MISSING_FILE), FileNotFoundError, "normals[1]: no file at"),
    (lambda c: c.normal(NAN), ValueError, "normals[0]: expected a float tensor in [0, 1]"),
    (lambda c: icas.encode([(IMAGE, MASK)], model="vits14"), TypeError, "model: expected"),
    (lambda c: icas.encode([(IMAGE, MASK)], turns="all", model=c.tiny),
     TypeError, "turns: expected True, False or None, got 'all'"),
    (lambda c: c.normal(IMAGE) + [IMAGE], TypeError, "unsupported operand"),
    # detect
    (lambda c: c.detect(), ValueError, "normals: detect needs at least one good part"),
    (lambda c: c.detect(icas.encode_image(IMAGE, model=c.tiny)),
     ValueError, "normals: detect needs at least one good part"),
    (lambda c: c.detect([IMAGE] * 6 + [None]), TypeError, "images[6]: expected a path"),
    (lambda c: c.detect(IMAGE, c.marked((IMAGE, MASK))),
     ValueError, "normals: detect needs at least one good part"),
    (lambda c: c.detect(normals="good.png"), TypeError, "normals: expected a list, got str"),
    (lambda c: c.detect(normals=[IMAGE], false_positive_rate=0),
     ValueError, "false_positive_rate: expected a number between 0 and 1, got 0"),
    (lambda c: c.detect(normals=[IMAGE], false_positive_rate=1),
     ValueError, "false_positive_rate: expected"),
    (lambda c: c.detect(normals=[IMAGE], false_positive_rate="low"),
     ValueError, "false_positive_rate: expected"),
    (lambda c: c.detect(IMAGE, {"normals": []}),
     TypeError, "references: expected what icas.encode returns, got dict"),
    (lambda c: icas.detect(IMAGE, normals=[IMAGE], model=3),
     TypeError, "model: expected what icas.load returns, got int"),
    (lambda c: c.detect([IMAGE, np.zeros((2, 2))], normals=[IMAGE]),
     ValueError, "images[1]: expected 8-bit values"),
    (lambda c: icas.segment(IMAGE, icas.prepare(c.normal(IMAGE), model=c.tiny),
                            model=icas.ICAS(c.tiny.config)),
     ValueError, "model: expected the one that the references were prepared for"),
    # save, load
    (lambda c: icas.save(c.tiny, c.text() / "x.safetensors"),   # a file is no folder
     OSError, "x.safetensors' could not be written"),
    (lambda c: icas.load("no.safetensors"), FileNotFoundError, "path: no file at 'no.safetensors'"),
    (lambda c: icas.load(c.folder), FileNotFoundError, "path: no file at"),
    (lambda c: icas.load(5), TypeError, "path: expected a path, got int"),
    (lambda c: icas.load(c.text("x.safetensors")), ValueError, "is not a whole safetensors file"),
    (lambda c: icas.load(c.text("x.safetensors", b"")),
     ValueError, "is not a whole safetensors file"),
    (lambda c: icas.load(c.truncated(c.checkpoint())),
     ValueError, "is not a whole safetensors file"),
    (lambda c: icas.load(c.references()), ValueError, "expected a file of format 'icas-4'"),
    (lambda c: icas.load(c.checkpoint() and c.folder / "encoder.safetensors"),
     ValueError, "has 'none'; is it another kind of file?"),
    (lambda c: icas.load(c.checkpoint(meta_is(format="icas-1"))),
     ValueError, "another version of icas: make it again, or update icas"),
    (lambda c: icas.load(c.checkpoint(meta_is(config="{"))),
     ValueError, "holds no config that this version reads"),
    (lambda c: icas.load(c.checkpoint(meta_is(config='{"fancy": 1}'))),
     ValueError, "holds no config that this version reads"),
    (lambda c: icas.load(c.checkpoint(meta_is(config='{"encoder": "vits99"}'))),
     ValueError, "encoder: expected one of"),
    (lambda c: icas.load(c.checkpoint(meta_is(config="[]"))), ValueError, "holds no config"),
    (lambda c: icas.load(c.checkpoint(without("norm.weight"))),
     ValueError, "weights do not fit; missing ['norm.weight']"),
    (lambda c: icas.load(c.checkpoint(lambda t, m: t.update({"more": torch.zeros(1)}))),
     ValueError, "unexpected ['more']"),
    (lambda c: icas.load(c.checkpoint(lambda t, m: t.update({"learned": torch.zeros(3, 3)}))),
     ValueError, "learned (3, 3) for (2, 32)"),
    (lambda c: icas.load(c.checkpoint(), device="cuda:7"),
     ValueError, "device: 'cuda:7' is not available here"),
    (lambda c: icas.load(c.checkpoint(), device="gpu"),
     ValueError, "device: 'gpu' is not available here"),
    (lambda c: icas.load(c.checkpoint(), encoder=MISSING_FILE),
     FileNotFoundError, "encoder: no file at"),
    (lambda c: icas.load(c.checkpoint(), encoder=c.text()), ValueError, "is not a .pth"),
    # References.load
    (lambda c: icas.References.load("no.safetensors"), FileNotFoundError, "references: no file at"),
    (lambda c: icas.References.load(None), TypeError, "references: expected a path, got NoneType"),
    (lambda c: icas.References.load(c.truncated(c.references())), ValueError, "references: "),
    (lambda c: icas.References.load(c.checkpoint()),
     ValueError, "expected a file of format 'icas-references-4'"),
    *((lambda c, name=name: icas.References.load(cut_references(c, name)), ValueError,
       "is incomplete") for name in ("0.maps", "0.picture", "0.fine_sides")),
    # convert
    (lambda c: icas.convert({}),
     ValueError, "encoder holds no DINOv2 in Meta's, transformers' or timm's layout"),
    (lambda c: icas.convert({"conv1.weight": torch.zeros(1)}),
     ValueError, "its keys are ['conv1.weight']"),
    (lambda c: icas.convert("no.pth"), FileNotFoundError, "encoder: no file at 'no.pth'"),
    (lambda c: icas.convert(c.text("x.safetensors")),
     ValueError, "is not a whole safetensors file"),
    (lambda c: icas.convert(c.pickled({"a": torch.zeros(1)})),
     ValueError, "state.pth' holds no DINOv2"),
    (lambda c: icas.convert(5), TypeError, "encoder: expected a state dict or a path, got int"),
    (lambda c: icas.convert(c.text("x.pth")), ValueError, "x.pth' is not a .pth of tensors alone"),
    (lambda c: icas.convert(c.png()),
     ValueError, "cut.png' is not a .pth of tensors alone (UnpicklingError); get or save it again"),
    (lambda c: icas.convert(c.pickled([torch.zeros(1)])),
     TypeError, "state.pth': expected a state dict or a path, got list"),
    # Config
    (lambda c: icas.Config(encoder="resnet"), ValueError, "encoder: expected one of"),
    (lambda c: icas.Config(image_size=500),
     ValueError, "image_size: expected a positive multiple of 14, got 500; use 504"),
    (lambda c: icas.Config(image_size=0), ValueError, "image_size: expected"),
    (lambda c: icas.Config(blocks=(0, 12)),
     ValueError, "blocks: expected rising numbers from 1 to 12, got (0, 12)"),
    (lambda c: icas.Config(blocks=(12, 8)), ValueError, "blocks: expected rising"),
    (lambda c: icas.Config(blocks=(8, 8)), ValueError, "blocks: expected rising"),
    (lambda c: icas.Config(temperature=0),
     ValueError, "temperature: expected at least 1e-06, got 0"),
    (lambda c: icas.Config(dim=30),
     ValueError, "dim: expected a multiple of 4 and of heads=8, got 30"),
    (lambda c: icas.Config(queries=0), ValueError, "queries: expected at least 1, got 0"),
    (lambda c: icas.Config(layers=0), ValueError, "layers: expected at least 1, got 0"),
    (lambda c: icas.Config(debias=-1), ValueError, "debias: expected at least 0, got -1"),
    (lambda c: icas.Config(debias=384),
     ValueError, "debias: expected less than the encoder's width 384, got 384"),
    (lambda c: icas.Config(colour=True), TypeError, "colour"),
    (lambda c: icas.Config(heads=0), ValueError, "heads"),
    (lambda c: icas.Config(dim=0), ValueError, "dim: expected"),
    (lambda c: icas.Config(encoder=14), (TypeError, ValueError), "encoder: expected"),
    (lambda c: icas.Config(blocks=12), ValueError, "blocks: expected a tuple of block numbers"),
]


def cut_references(c, name):
    path = c.references()
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        meta = dict(file.metadata())
    assert [label for label, _, _ in json.loads(meta["shots"])] == ["defect"] * 12
    tensors.pop(name)
    save_file(tensors, path, metadata=meta)
    return path


@pytest.mark.parametrize("call, kind, fragment", ROWS)
def test_wrong_input_is_refused_by_name(c, call, kind, fragment):
    with pytest.raises(kind) as caught:
        call(c)
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


ALLOWED = (ValueError, TypeError, FileNotFoundError)
DTYPES = st.sampled_from(["u1", "u1", "?", "i1", "u2", ">u2", "i4", "u8", "f2", "f4", "f8", "c8",
                          "U2", "O"])


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_array_is_taken_or_refused_with_one_of_three_errors(tiny, data):
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=6)
                      | st.just(()) | st.just((5, 4, 3)))
    dtype = data.draw(DTYPES)
    array = np.full(shape, None) if dtype == "O" else data.draw(hnp.arrays(dtype, shape))
    known = array.dtype.isnative and dtype not in ("O", "U2")
    image = torch.from_numpy(array) if data.draw(st.booleans()) and known else array
    for call in (lambda: icas.to_rgb(image), lambda: icas.to_rgb(image, value_range=(0, 10)),
                 lambda: icas.segment(image, points=[(0, 0)], model=tiny),
                 lambda: icas.segment(IMAGE, mask=image, model=tiny)):
        try:
            got = call()
        except ALLOWED as error:
            assert str(error)
            continue
        if isinstance(got, icas.Segmentation):
            assert np.isfinite(got.score).all() and got.score.shape == got.mask.shape
        else:
            assert got.dtype == torch.uint8 and got.shape[-1] == 3 and got.numel()
