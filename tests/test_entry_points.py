"""segment, detect, encode, save and load as a user calls them, with an untrained tiny model."""
import copy
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
import torch.nn.functional as F
from conftest import TINY
from PIL import Image
from safetensors.torch import load_file, save_file

import icas

HOME = Path(icas.__file__).parent
ENV = os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"}


def picture(rng, h=40, w=40):
    return rng.integers(0, 256, (h, w, 3), dtype=np.uint8)


def blob(h=40, w=40):
    mask = np.zeros((h, w), dtype=bool)
    mask[h // 4:h // 2 + 1, w // 4:w // 2 + 1] = True
    return mask


def half(h=40, w=40):
    """More tokens than are matched at twice the side, as those of `blob` are."""
    mask = np.zeros((h, w), dtype=bool)
    mask[:, :w // 2] = True
    return mask


@pytest.fixture
def references(tiny, rng):
    return icas.encode([(picture(rng), blob())], [picture(rng)], model=tiny)


def same(a, b):
    np.testing.assert_array_equal(a.score, b.score)
    np.testing.assert_array_equal(a.mask, b.mask)
    assert a.labels == b.labels and a.threshold == b.threshold


def same_detection(a, b):
    np.testing.assert_array_equal(a.map, b.map)
    assert (a.score, a.threshold, a.is_anomalous) == (b.score, b.threshold, b.is_anomalous)


# ---- images in, results out ----------------------------------------------------------------------


def test_one_image_in_gives_one_result_and_a_list_gives_a_list(tiny, rng, references):
    image = picture(rng)
    one, many, none = (icas.segment(x, references, model=tiny) for x in (image, [image], []))
    assert isinstance(one, icas.Segmentation) and [type(m) for m in many] == [icas.Segmentation]
    assert none == []
    same(one, many[0])
    one, many = (icas.detect(x, references, model=tiny) for x in (image, (image,)))
    assert isinstance(one, icas.Detection) and isinstance(many, list)
    same_detection(many[0], one)


@pytest.mark.parametrize("shape", [(37, 53), (53, 37), (1, 1), (120, 3), (3, 120), (20, 60), (1, 2),
                                   (130, 200)])
def test_results_have_the_size_of_their_input(tiny, rng, references, shape):
    found = icas.segment(picture(rng, *shape), references, model=tiny)
    assert found.mask.shape == found.score.shape == shape
    assert found.label_scores.shape == (1, *shape)
    assert found.mask.dtype == bool and found.score.dtype == np.float32
    assert np.isfinite(found.score).all() and 0 <= found.score.min() and found.score.max() <= 1
    np.testing.assert_array_equal(found.mask, found.score > 0.5)
    distance = icas.detect(picture(rng, *shape), references, model=tiny)
    assert distance.map.shape == shape and np.isfinite(distance.map).all()
    assert distance.map.min() >= -1e-3 and np.isfinite(distance.score) and distance.score >= 0


@pytest.mark.parametrize("shape", [(3, 120), (120, 3)])
def test_a_picture_of_forty_to_one_is_one_grid_and_serves_as_a_reference(tiny, rng, shape):
    h0, w0 = icas.token_grid(*shape, tiny.config)
    assert max(h0, w0) > 10 * min(h0, w0) and abs(h0 * w0 - 64) < 16
    mask = np.zeros(shape, bool)
    mask[shape[0] // 2, shape[1] // 2] = True
    image, long = picture(rng), icas.encode([(picture(rng, *shape), mask)], model=tiny)
    assert len(long) == 1 and len(long.shots) == 12
    assert {s.features.maps.shape[-2:] for s in long.shots if not 3 < s.turn < 8} == {
        (h0, w0), (w0, h0)}   # the other copies are cut
    assert np.isfinite(icas.segment(image, long, model=tiny).score).all()
    good = icas.encode(normals=[picture(rng, *shape)], model=tiny)
    assert np.isfinite(icas.detect(image, good, model=tiny).score)


def test_every_kind_of_picture_becomes_the_same_rgb(rng, tmp_path):
    rgb = picture(rng, 5, 7)
    grey = rgb[..., 0]
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    alpha = np.dstack([rgb, np.full((5, 7), 255, np.uint8)])
    chw = torch.from_numpy(rgb).permute(2, 0, 1)
    for same_picture in (rgb, alpha, chw, chw.float() / 255, chw.double() / 255,
                         Image.fromarray(rgb), Image.fromarray(alpha), tmp_path / "rgb.png",
                         str(tmp_path / "rgb.png"), rgb[::-1][::-1], np.asfortranarray(rgb)):
        got = icas.to_rgb(same_picture)
        assert got.dtype == torch.uint8 and got.device.type == "cpu" and got.is_contiguous()
        np.testing.assert_array_equal(got.numpy(), rgb)
    opaque = Image.merge("LA", [Image.fromarray(grey), Image.new("L", (7, 5), 255)])
    for same_picture in (grey, grey[..., None], Image.fromarray(grey), opaque,
                         np.dstack([grey] * 3)):
        np.testing.assert_array_equal(icas.to_rgb(same_picture).numpy(), np.dstack([grey] * 3))
    palette = Image.fromarray(rgb).quantize(8)
    np.testing.assert_array_equal(icas.to_rgb(palette).numpy(), np.array(palette.convert("RGB")))
    bilevel = Image.fromarray(grey > 100)
    assert bilevel.mode == "1"
    expected = np.dstack([(grey > 100) * np.uint8(255)] * 3)
    np.testing.assert_array_equal(icas.to_rgb(bilevel).numpy(), expected)


def test_alpha_is_laid_over_white():
    red = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]], dtype=np.uint8)
    expected = [[[200, 0, 0], [255, 255, 255], [244, 204, 204]]]  # 0.2 * 200 + 0.8 * 255 = 244
    np.testing.assert_array_equal(icas.to_rgb(red).numpy(), expected)
    np.testing.assert_array_equal(icas.to_rgb(Image.fromarray(red)).numpy(), expected)
    grey = Image.merge("LA", [Image.fromarray(red[..., i]) for i in (0, 3)])
    np.testing.assert_array_equal(icas.to_rgb(grey).numpy(), [[[200] * 3, [255] * 3, [244] * 3]])


def test_a_range_of_values_does_not_scale_alpha():
    red = np.array([[[150, 100, 100, 65535], [150, 100, 100, 0], [200, 100, 100, 13107]]],
                   np.uint16)
    expected = [[[128, 0, 0], [255, 255, 255], [255, 204, 204]]]
    found = icas.to_rgb(red, value_range=(100, 200)).numpy()
    np.testing.assert_array_equal(found, expected)


def test_a_range_of_values_leaves_pictures_of_eight_bits_alone(tiny, rng, tmp_path):
    image = picture(rng)
    Image.fromarray(image).save(tmp_path / "image.png")
    for given in (image, Image.fromarray(image), tmp_path / "image.png"):
        np.testing.assert_array_equal(icas.to_rgb(given, value_range=(0, 4095)).numpy(), image)
    deep = {"value_range": (0, 4095), "model": tiny}
    plain, ranged = (icas.encode([(image, blob())], [image], **how)
                     for how in ({"model": tiny}, deep))
    for a, b in zip(plain.shots, ranged.shots, strict=True):
        assert torch.equal(a.features.maps, b.features.maps)
    assert torch.equal(icas.encode_image(image, **deep).features.maps,
                       icas.encode_image(image, model=tiny).features.maps)


def test_sixteen_bits_are_encoded_with_their_range(tiny, rng):
    image = picture(rng)
    deep, how = image.astype(np.uint16) * 257, {"value_range": (0, 65535), "model": tiny}
    eight = icas.encode([(image, blob())], [image], model=tiny)
    sixteen = icas.encode([(deep, blob())], [deep], **how)
    for a, b in zip(eight.shots, sixteen.shots, strict=True):
        assert torch.equal(a.features.maps, b.features.maps)
    same(icas.segment(icas.encode_image(deep, **how), sixteen, model=tiny),
         icas.segment(image, eight, model=tiny))


@pytest.mark.parametrize("highest, likely", [
    (1, 1), (200, 255), (256, 1023), (1023, 1023), (1024, 4095), (4000, 4095), (9000, 16383),
    (16384, 65535), (65535, 65535)])
def test_the_likeliest_range_is_named_where_one_is_needed(highest, likely):
    deep = np.array([[0, highest]], np.uint16)
    with pytest.raises(ValueError) as caught:
        icas.to_rgb(deep)
    assert f"value_range=(0, {likely})" in str(caught.value)
    assert f"--range 0 {likely} on the command line" in str(caught.value)
    assert icas.to_rgb(deep, value_range=(0, likely)).max() == round(255 * highest / likely)


def test_a_transparent_palette_colour_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([9, 9, 9, 50, 60, 70])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 0
    np.testing.assert_array_equal(icas.to_rgb(image).numpy(), [[[255, 255, 255], [50, 60, 70]]])


def test_sixteen_bits_need_a_range(tmp_path):
    deep = np.array([[0, 1000, 30000, 65535]], dtype=np.uint16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
    for image in (deep, deep.astype(">u2"), tmp_path / "deep.png", tmp_path / "deep.tif",
                  Image.open(tmp_path / "deep.png")):
        with pytest.raises(ValueError, match="value_range"):
            icas.to_rgb(image)
        got = icas.to_rgb(image, value_range=(1000, 30000)).numpy()
        np.testing.assert_array_equal(got[0, :, 0], [0, 0, 255, 255])
    half = icas.to_rgb(deep, value_range=(0, 60000)).numpy()[0, 2]
    np.testing.assert_array_equal(half, [128] * 3)  # 127.5, to even


def test_grey_and_rgb_of_the_same_give_the_same_result(tiny, rng, references):
    grey = picture(rng)[..., 0]
    colours = np.dstack([grey] * 3)
    same(*(icas.segment(x, references, model=tiny) for x in (grey, colours)))
    same_detection(*(icas.detect(x, references, model=tiny) for x in (grey, colours)))


def turned(path: Path, array: np.ndarray, **how) -> Path:
    """A file whose pixels lie a quarter turn off, and whose EXIF says so (orientation 6)."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise before it is shown
    Image.fromarray(np.ascontiguousarray(np.rot90(array))).save(path, exif=exif, **how)
    return path


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
def test_a_file_with_an_exif_orientation_is_read_upright(tmp_path, suffix):
    grey = np.kron(np.arange(6).reshape(2, 3) * 40, np.ones((16, 16))).astype(np.uint8)
    how = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "jpg" else {}
    path = turned(tmp_path / f"turned.{suffix}", np.dstack([grey] * 3), **how)
    for given in (path, Image.open(path)):
        got = icas.to_rgb(given).numpy()
        assert got.shape == (32, 48, 3)
        assert np.abs(got[..., 0].astype(int) - grey).max() <= (2 if suffix == "jpg" else 0)


def test_turned_files_of_picture_and_mask_give_what_upright_ones_give(tiny, rng, tmp_path):
    image, mask, target = picture(rng, 30, 50), blob(30, 50) * np.uint8(255), picture(rng, 37, 53)
    good = picture(rng, 30, 50)
    files = [turned(tmp_path / f"{i}.png", x) for i, x in enumerate((image, mask, target, good))]
    upright = icas.encode([(image, mask)], [good], model=tiny)
    other = icas.encode([(files[0], files[1])], [files[3]], model=tiny)
    found = icas.segment(target, upright, model=tiny)
    same(icas.segment(files[2], other, model=tiny), found)
    assert found.mask.shape == (37, 53)
    same_detection(icas.detect(files[2], other, model=tiny),
                   icas.detect(target, upright, model=tiny))
    same(*(icas.segment(x, mask=m, model=tiny) for x, m in ((image, mask), (files[0], files[1]))))


@pytest.mark.parametrize("kind", ["L", "1", "P", "LA", "RGB", "RGBA", "I;16"])
def test_a_mask_file_of_any_kind_marks_what_is_not_zero(tmp_path, kind):
    marked = blob(6, 9)
    bright = Image.fromarray(marked * np.uint8(255))
    images = {"L": Image.fromarray(marked * np.uint8(1)), "1": bright.convert("1"),
              "P": Image.fromarray(marked * np.uint8(3)),
              "LA": Image.merge("LA", [bright, Image.new("L", (9, 6), 255)]),
              "RGB": Image.merge("RGB", [Image.new("L", (9, 6)), bright, bright]),
              "RGBA": Image.merge("RGBA", [bright, bright, bright, Image.new("L", (9, 6), 255)]),
              "I;16": Image.fromarray(marked * np.uint16(700))}
    if kind == "P":  # index 0 is not black in its palette: what counts is the index
        images["P"].putpalette([200, 10, 10, 0, 0, 0, 9, 9, 9, 0, 0, 0])
    images[kind].save(tmp_path / "mask.png")
    assert Image.open(tmp_path / "mask.png").mode == kind
    np.testing.assert_array_equal(icas.to_mask(tmp_path / "mask.png", (6, 9)).numpy(), marked)


def test_a_mask_of_one_pixel_is_a_prompt_like_any_other(tiny, rng):
    mask = np.zeros((130, 200), bool)
    mask[77, 31] = True
    shown = picture(rng, 130, 200)
    references = icas.encode([(shown, mask)], model=tiny)
    assert all(side[0].max() > 0 for s in references.shots for side in s.sides)
    elsewhere = icas.encode([(shown, np.roll(mask, 60))], model=tiny)
    image = picture(rng)
    scores = [icas.segment(image, r, model=tiny).score for r in (references, elsewhere)]
    assert np.isfinite(scores).all() and np.abs(scores[0] - scores[1]).max() > 1e-3


# ---- large pictures ------------------------------------------------------------------------------


def test_shrinking_takes_the_means_of_blocks_and_at_the_edge_of_what_is_there(rng):
    image = picture(rng, 300, 10)
    found = icas.shrink(torch.from_numpy(image), 4).numpy()
    assert found.shape == (75, 3, 3)
    for y, x in ((0, 0), (74, 1), (40, 2)):
        block = image[4 * y:4 * y + 4, 4 * x:4 * x + 4]
        np.testing.assert_allclose(found[y, x], block.mean(axis=(0, 1)), rtol=1e-5)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_large_file_is_read_reduced_and_its_own_size_is_kept(rng, tmp_path, suffix):
    image = np.kron(picture(rng, 30, 50), np.ones((8, 8, 1))).astype(np.uint8)
    path = turned(tmp_path / f"large.{suffix}", image, **({"quality": 95} if suffix == "jpg" else
                                                          {}))
    whole, shape = icas.read_rgb(path)
    assert tuple(whole.shape[:2]) == shape == (240, 400)
    small, shape = icas.read_rgb(path, most=6000)
    h, w = small.shape[:2]
    assert shape == (240, 400) and 1500 < h * w <= 6000 and small.dtype == torch.uint8
    assert w / h == pytest.approx(400 / 240, rel=0.05)
    expected = np.array(Image.fromarray(image).resize((w, h), Image.Resampling.BOX))
    assert np.abs(expected.astype(int) - small.numpy()).mean() < 12


def test_marks_on_a_large_picture_lie_where_they_lie_on_a_small_one(tiny, rng, monkeypatch):
    image = np.kron(picture(rng, 30, 50), np.ones((4, 4, 1))).astype(np.uint8)
    dot, spot = np.zeros((2, 120, 200), bool)
    dot[77, 31] = spot[40:80, 60:120] = True
    clicks = ({"points": [(90, 60), (199.9, 119.9)], "point_labels": [1, 0]},
              {"boxes": [(60, 40, 120, 80)]}, {"mask": spot}, {"points": [(199.9, 119.9)]})
    prompts = [icas.encode([(image, m)], turns=False, model=tiny) for m in (dot, spot)]
    found = [icas.segment(image, model=tiny, **c) for c in clicks]
    monkeypatch.setattr(icas, "PIXELS", 1600)   # blocks of 4 x 4 pixels
    for m, whole in zip((dot, spot), prompts, strict=True):
        shot, = icas.encode([(image, m)], turns=False, model=tiny).shots
        levels = [(coarse, F.avg_pool2d(fine, 4), F.avg_pool2d(fine, 2))
                  for coarse, fine in (shot.sides, whole.shots[0].sides)]
        for side, expected, near in zip(*levels, (1e-4, 0.2, 0.4), strict=True):
            np.testing.assert_allclose(side, expected, atol=near)   # a block lies in several
            assert side[0].max() > 0
    for c, whole in zip(clicks, found, strict=True):
        sides = icas.mark_sides((120, 200), *(c.get(k) for k in (
            "points", "point_labels", "boxes", "mask")))
        assert sides.shape == (3, 30, 50) and sides[0].any() and sides[1].any()
        again = icas.segment(image, model=tiny, **c)
        assert again.mask.shape == (120, 200)
        assert np.corrcoef(again.maps.ravel(), whole.maps.ravel())[0, 1] > 0.8


# ---- overlays ------------------------------------------------------------------------------------


def test_an_overlay_is_red_where_the_heat_is_and_outlines_the_mask_in_white():
    image, mask = np.full((60, 60, 3), 128, np.uint8), np.zeros((60, 60), bool)
    heat, mask[20:30, 40:50] = np.repeat(np.linspace(1, 0, 60)[None], 60, axis=0), True
    shown = icas.overlay(image, heat, mask).astype(int)
    red, _, blue = shown[5, 0] - 128
    assert red > 0 > blue   # of what scores highest
    red, _, blue = shown[5, 59] - 128
    np.testing.assert_array_equal((red, blue), 0)   # where nothing is, the picture
    outline = scipy.ndimage.binary_dilation(mask) & ~mask
    assert (shown[outline] == 255).all() and (shown[mask] < 255).any(axis=-1).all()


def test_an_overlay_has_a_scale_with_the_two_ends_in_numbers_where_there_is_room(rng):
    image, heat, none = np.zeros((120, 160, 3), np.uint8), np.zeros((120, 160)), np.zeros(
        (120, 160), bool)
    one, other = (icas.overlay(image, heat + low, none, low, high)
                  for low, high in ((0, 1), (1, 2.5)))
    lower = np.s_[90:]
    assert (one[lower] != other[lower]).any() and (one[:90] == other[:90]).all()
    small = [icas.overlay(image[:40, :40], heat[:40, :40] + low, none[:40, :40], low, high)
             for low, high in ((0, 1), (1, 2.5))]
    np.testing.assert_array_equal(*small)


# ---- segment -------------------------------------------------------------------------------------


def test_a_list_of_images_gives_what_single_calls_give_in_any_order(tiny, rng, references):
    shapes = [(40, 40), (30, 50), (40, 40), (12, 60), (40, 41), (50, 30), (33, 40), (40, 40)]
    images = [picture(rng, *s) for s in shapes * 2]
    single = [icas.segment(x, references, model=tiny) for x in images]
    for a, b in zip(icas.segment(images, references, model=tiny), single, strict=True):
        same(a, b)
    order = rng.permutation(len(images))
    found = icas.segment([images[i] for i in order], references, model=tiny)
    for a, i in zip(found, order, strict=True):
        same(a, single[i])


def test_encoded_references_equal_those_given_in_the_call(tiny, rng):
    image, shot, good = picture(rng), (picture(rng), blob()), picture(rng)
    given = icas.segment(image, anomalies=[shot], normals=[good], model=tiny)
    same(icas.segment(image, icas.encode([shot], [good], model=tiny), model=tiny), given)
    same(icas.segment(image, icas.encode([shot], model=tiny), normals=[good], model=tiny), given)
    ready = icas.prepare(icas.encode([shot], model=tiny), model=tiny)
    same(icas.segment(image, ready, normals=[good]), given)
    assert len(ready.references) == 1  # what a call adds is not kept


def test_the_order_of_shots_does_not_matter(tiny, rng):
    shots, image = [(picture(rng), blob()) for _ in range(3)], picture(rng)
    goods = [picture(rng, 30, 50) for _ in range(2)]
    a = icas.segment(image, anomalies=shots, normals=goods, model=tiny)
    b = icas.segment(image, anomalies=shots[::-1], normals=goods[::-1], model=tiny)
    np.testing.assert_allclose(a.score, b.score, atol=1e-3)
    one = icas.segment(image, anomalies=shots[:1], model=tiny)
    assert np.abs(one.score - a.score).max() > 1e-2  # more shots do count


def test_several_labels_give_one_map_each_and_the_score_is_their_maximum(tiny, rng):
    shots = [(picture(rng), blob(), label) for label in ("scratch", "crack", "scratch")]
    found = icas.segment(picture(rng, 37, 53), anomalies=shots, normals=[picture(rng)], model=tiny)
    assert found.labels == ["crack", "scratch"] and found.label_scores.shape == (2, 37, 53)
    assert 0 <= found.label_scores.min() and found.label_scores.max() <= 1
    np.testing.assert_array_equal(found.score, found.label_scores.max(axis=0))


def test_several_labels_give_what_each_gives_alone(tiny, rng):
    shots = [(picture(rng), blob(), "crack"), (picture(rng), blob(), "scratch")]
    image, good = picture(rng), picture(rng)
    both = icas.segment(image, anomalies=shots, normals=[good], model=tiny)
    for i, shot in enumerate(shots):
        alone = icas.segment(image, anomalies=[shot], normals=[good], model=tiny)
        np.testing.assert_array_equal(both.label_scores[i], alone.score)


def test_good_parts_alone_mark_what_detect_does_where_that_passes_its_threshold(tiny, rng):
    goods, image = [picture(rng) for _ in range(2)], picture(rng)
    found = icas.segment(image, normals=goods, model=tiny)
    assert found.labels == ["anomaly"] and found.mask.shape == (40, 40)
    detected = icas.detect(image, normals=goods, model=tiny)
    novelty = detected.maps[0] / detected.threshold
    regions, count = scipy.ndimage.label(novelty > 0.8, np.ones((3, 3)))
    reach = [i for i in range(1, count + 1) if novelty[regions == i].max() > 1]
    np.testing.assert_array_equal(found.maps[0] > 0, np.isin(regions, reach))


def test_of_more_than_200_good_parts_evenly_spread_ones_are_encoded(tiny, rng):
    goods = [picture(rng, 14, 14) for _ in range(401)]
    found = icas.encode(normals=goods, model=tiny)
    alone = [icas.encode(normals=[goods[i]], model=tiny).shots[0].image for i in (0, 3, 399)]
    assert len(found) == 134 and [found.shots[i].image for i in (0, 1, 133)] == alone
    with pytest.raises(FileNotFoundError, match=r"normals\[3\]: no file"):
        icas.encode(normals=[*goods[:3], "missing.png", *goods[4:]], model=tiny)


def test_the_threshold_cuts_the_score(tiny, rng, references):
    image = picture(rng)
    low, high = (icas.segment(image, references, threshold=t, model=tiny) for t in (0, 1))
    assert low.mask.all() and not high.mask.any() and high.threshold == 1
    np.testing.assert_array_equal(low.score, high.score)


def test_parts_are_filled_only_when_asked_for(tiny, rng):
    shots = [(picture(rng), blob(), label) for label in ("crack", "scratch")]
    ready = icas.prepare(icas.encode(shots, [picture(rng)], model=tiny), model=tiny)
    image = picture(rng, 37, 53)
    plain, full = (icas.segment(image, ready, parts=p) for p in (False, True))
    same(plain, full)
    assert plain.parts == {} and all(p.shape == (37, 53) for p in full.parts.values())
    first = torch.from_numpy(full.parts["icas"]).sigmoid().numpy()
    np.testing.assert_allclose(first, full.label_scores[0], atol=1e-6)   # of the first label
    levels = ("block 2", "block 3", "block 4", "detail")
    assert set(full.parts) == {"icas", "S_s", "S_s mfm", "S_n", "S_n mfm", "novelty"} | {
        f"{level} {kind}" for level in levels for kind in ("nearest", "Fisher")}
    plain, full = (icas.detect(image, ready, parts=p) for p in (False, True))
    same_detection(plain, full)
    assert plain.parts == {} and "block 3" in full.parts
    assert any(name.startswith("detail") for name in full.parts)
    low, high = min(full.parts.values()), max(full.parts.values())
    assert low <= full.score <= high and low < high


@pytest.mark.parametrize("clicks", [
    {"points": [(20, 10)]}, {"points": np.array([[20.5, 10], [3, 30]]), "point_labels": [1, 0]},
    {"boxes": [(5, 5, 20, 15)]}, {"boxes": [(0, 0, 53, 37)]},
    {"points": [(1, 1)], "boxes": [(5, 5, 20, 15)], "mask": blob(37, 53)},
    {"points": torch.tensor([[0.0, 0.0], [52.9, 36.9]]), "point_labels": torch.tensor([1, 1])},
    {"mask": blob(37, 53)}])
def test_clicks_boxes_and_masks_on_the_image_itself(tiny, rng, references, clicks):
    image = picture(rng, 37, 53)
    alone = icas.segment(image, model=tiny, **clicks)
    helped = icas.segment(image, references, model=tiny, **clicks)
    for found in (alone, helped):
        assert found.mask.shape == (37, 53) and found.labels == ["defect"]
        assert np.isfinite(found.score).all()
    assert np.abs(alone.score - helped.score).max() > 1e-4
    assert len(references) == 2  # a click is not kept in the references that were passed


def test_where_the_click_is_matters(tiny, rng):
    image = picture(rng)
    at = [icas.segment(image, points=[p], model=tiny).score for p in ((3, 3), (35, 35))]
    assert np.abs(at[0] - at[1]).max() > 1e-3
    both = {"points": [(3, 3), (35, 35)], "point_labels": [1, 0]}
    negative = icas.segment(image, model=tiny, **both).score
    assert np.abs(at[0] - negative).max() > 1e-3


def test_clicks_are_looked_at_twice(tiny, rng, monkeypatch):
    image, clicks = picture(rng), {"points": [(8, 8), (35, 35)], "point_labels": [1, 0]}
    twice = icas.segment(image, model=tiny, **clicks).score
    features, odds = icas.encode_image(image, model=tiny).features, torch.full((40, 40), -0.5)
    odds[20:30, 5:9], odds[:4] = 1.5, -1.5  # sure of a defect, and of a good part
    odds[33:38, 33:38] = 1.5                # over a negative click
    tiny.look_closer(features)
    sides = icas.mark_sides((40, 40), *clicks.values(), None, None)
    shot = icas.make_shot(features, icas.join_sure(sides, odds.numpy()), "defect")
    foreground, background = np.zeros((40, 40)), np.zeros((40, 40))
    y, x = np.mgrid[:40, :40]
    foreground[(x - 8) ** 2 + (y - 8) ** 2 <= (40 / 74) ** 2] = foreground[20:30, 5:9] = 1
    foreground[33:38, 33:38] = 1
    negative = (x - 35) ** 2 + (y - 35) ** 2 <= (40 / 74) ** 2
    foreground[negative] = 0
    background[negative] = background[:4] = 1
    for found, truth in zip(shot.sides[0], (foreground, background), strict=True):
        expected = truth.reshape(8, 5, 8, 5).mean(axis=(1, 3))
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    # the first look: the mean of what the negative click says alone, and with all that is far
    inside, far, other = sides
    prompts = [icas.pool_shots(tiny, [icas.make_shot(features, torch.stack(x), "defect")])
               for x in ((inside, other), (inside, torch.maximum(far, other)))]
    assert prompts[0].decoder == 1.0   # of marks on other images 0.2
    first = [icas.score_parts(tiny, features, p._replace(weight=0.5))["icas"] for p in prompts]
    assert (first[0] - first[1]).abs().max() > 1e-3
    first = icas.to_shape(((first[0] + first[1]) / 2)[None].numpy(), (40, 40))[0]
    shot = icas.make_shot(features, icas.join_sure(sides, first), "defect")
    prompt = icas.pool_shots(tiny, [shot])
    odds = icas.score_parts(tiny, features, prompt)["icas"]
    odds = icas.follow_edges(odds, features.picture, prompt.edges)
    odds = icas.to_shape(odds[None].numpy(), (40, 40))[0]
    np.testing.assert_allclose(twice, 1 / (1 + np.exp(-odds)), atol=1e-4)
    # never sure: the clicks alone
    monkeypatch.setattr(icas, "SURE", 1e9)
    assert np.abs(icas.segment(image, model=tiny, **clicks).score - twice).max() > 1e-4


@pytest.mark.parametrize("labels", [[1], [1, 0]])
@pytest.mark.parametrize("level", [-9.0, 9.0])
def test_boxes_and_a_mask_stay_in_the_second_look_at_clicks(labels, level):
    box, mask = [(20, 3, 30, 12)], np.zeros((40, 40), bool)
    mask[30:36, 4:9] = True
    points = [(8, 8), (36, 20)][:len(labels)]
    sides = icas.mark_sides((40, 40), points, labels, box, mask)
    found = icas.join_sure(sides, np.full((40, 40), level, np.float32))
    inside = torch.zeros(40, 40, dtype=torch.bool)
    inside[3:12, 20:30] = inside[30:36, 4:9] = inside[8, 8] = True
    assert found[0][inside].all() and not found[1][inside].any()
    if len(labels) == 2:
        assert found[0][20, 36] == 0 and found[1][20, 36] == 1
    assert not (found[0] * found[1]).any()


def test_segment_looks_twice_with_its_boxes_and_mask(tiny, rng, monkeypatch):
    shown, make = [], icas.make_shot
    monkeypatch.setattr(icas, "make_shot", lambda features, sides, *rest: shown.append(
        sides.clone()) or make(features, sides, *rest))
    box, image, mask = (20, 3, 30, 12), picture(rng), np.zeros((40, 40), bool)
    mask[30:36, 4:9] = True
    icas.segment(image, points=[(8, 8)], boxes=[box], mask=mask, model=tiny)
    assert len(shown) == 2
    for sides in shown:
        assert sides[0][3:12, 20:30].all() and sides[0][30:36, 4:9].all() and sides[0][8, 8] == 1
    icas.segment(image, boxes=[box], mask=mask, model=tiny)
    assert len(shown) == 3  # without clicks one look is enough
    icas.segment(image, points=[(8, 8), (30, 20)], point_labels=[1, 0], model=tiny)
    sides = shown[3:]        # two backgrounds, and what is sure
    assert len(sides) == 3 and sides[0][1].sum() < 10 and sides[1][1].sum() > 1500


def test_marks_are_the_clicks_what_is_far_from_them_and_the_negative_ones():
    y, x = np.mgrid[:74, :74]
    away = (x - 20) ** 2 + (y - 30) ** 2 > 9        # a disk is of 1 / 74 of the side
    sides = icas.mark_sides((74, 74), [(20, 30)], None, None, None).numpy()
    foreground, background, negative = sides
    assert foreground.sum() == 5 and foreground[30, 20] == 1 and not negative.any()
    np.testing.assert_array_equal(background, away)
    clicks = [(20, 30), (60, 60)], [1, 0]
    foreground, far, negative = icas.mark_sides((74, 74), *clicks, None, None).numpy()
    assert foreground.sum() == negative.sum() == 5 and negative[60, 60] == 1
    np.testing.assert_array_equal(far, away)
    boxed = icas.mark_sides((74, 74), None, None, [(20, 20, 60, 40)], None).numpy()
    assert boxed[0].sum() == 40 * 20 and boxed[0][20:40, 20:60].all()
    assert not boxed[1][19:41, 18:62].any() and boxed[1].sum() == 74 * 74 - 22 * 44


def test_a_click_works_on_a_long_image(tiny, rng):
    assert icas.segment(picture(rng, 6, 90), points=[(85, 3)], model=tiny).mask.shape == (6, 90)


def sure_of(*masks, labels=("a", "b"), threshold=0.5):
    """The result of log-odds 2 (score 0.88) in each label's mask and -2 elsewhere."""
    maps = np.where(np.stack(masks), np.float32(2), np.float32(-2))
    return icas.Segmentation(maps, list(labels[:len(maps)]), masks[0].shape, threshold)


def test_boxes_are_the_connected_regions_largest_first():
    small, large = np.zeros((2, 6, 9), bool)
    small[0, 0] = small[1, 1] = True  # touch at a corner: one region
    large[3:6, 5:9] = True
    found = sure_of(small, large).boxes()
    assert [(r["bbox"], r["area"], r["label"]) for r in found] == [
        ([5, 3, 4, 3], 12, "b"), ([0, 0, 2, 2], 2, "a")]
    assert [r["score"] for r in found] == pytest.approx([1 / (1 + np.exp(-2))] * 2)
    assert sure_of(small & False).boxes() == []
    heat = large * np.float32(3)
    bad = icas.Detection(2.0, heat[None], heat.shape, 1.0)
    assert [(r["bbox"], r["score"]) for r in bad.boxes()] == [([5, 3, 4, 3], 3.0)]
    assert icas.Detection(0.5, heat[None], heat.shape, 1.0).boxes() == []


def test_rle_is_what_pycocotools_reads(tiny, rng, references):
    coco, image = pytest.importorskip("pycocotools.mask"), picture(rng, 37, 53)
    cut = float(np.median(icas.segment(image, references, model=tiny).score))
    found = icas.segment(image, references, threshold=cut, model=tiny)
    assert 0 < found.mask.mean() < 1
    heat = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    for result in (found, sure_of(np.zeros((3, 4), bool)), sure_of(np.ones((3, 4), bool)),
                   icas.Detection(9.0, heat, (3, 4), 5.0)):
        np.testing.assert_array_equal(coco.decode(result.rle()), result.mask)


def test_a_result_is_judged_anew_at_another_threshold_without_the_model(tiny, rng, references):
    image = picture(rng, 37, 53)
    found = icas.segment(image, references, model=tiny)
    detected = icas.detect(image, references, model=tiny)
    cuts = np.quantile(found.score, [0.2, 0.8])
    for cut in map(float, cuts):
        again = dataclasses.replace(found, threshold=cut)
        same(again, icas.segment(image, references, threshold=cut, model=tiny))
        assert 0 < again.mask.mean() < 1 and again.threshold == cut
        assert again.boxes() != found.boxes()
    for cut, is_anomalous in ((detected.score - 0.01, True), (detected.score + 0.01, False)):
        again = dataclasses.replace(detected, threshold=cut)
        assert again.is_anomalous == is_anomalous
        np.testing.assert_array_equal(again.mask, (again.map > 0.8 * cut) & is_anomalous)
        assert (again.boxes() == []) == (not again.mask.any())


def test_results_keep_the_small_maps_and_show_them_at_any_size(tiny, rng, references):
    image, (h0, w0) = picture(rng, 370, 530), icas.token_grid(370, 530, tiny.config)
    for found, fine in ((icas.segment(image, references, model=tiny), 8),
                        (icas.detect(image, references, model=tiny), 4)):
        assert found.maps.shape == (1, fine * h0, fine * w0) and found.maps.dtype == np.float32
        assert found.mask.shape == found.shape == (370, 530)
        small = dataclasses.replace(found, shape=(37, 53))
        assert small.mask.shape == (37, 53) and small.label_scores.shape == (1, 37, 53)
        assert small.mask is small.mask  # made once


# ---- encoded once, used many times ---------------------------------------------------------------


def test_an_encoded_image_gives_what_the_picture_gives(tiny, rng, references):
    image = picture(rng, 37, 53)
    seen = icas.encode_image(image, model=tiny)
    assert seen.shape == (37, 53) and seen.kind == tiny.kind
    for given in ({}, {"points": [(20, 10), (3, 30)], "point_labels": [1, 0]},
                  {"boxes": [(5, 5, 20, 15)]}, {"mask": blob(37, 53)}):
        same(*(icas.segment(x, references, model=tiny, **given) for x in (seen, image)))
    same_detection(*(icas.detect(x, references, model=tiny) for x in (seen, image)))
    many = icas.segment([seen, image], references, model=tiny)
    same(*many)
    same_detection(*icas.detect([image, seen], references, model=tiny))
    assert isinstance(icas.segment(seen, references, model=tiny), icas.Segmentation)


def test_prepared_references_give_what_the_references_give(tiny, rng, references):
    images, clicks = [picture(rng), picture(rng, 30, 50)], {"points": [(20, 10)]}
    ready = icas.prepare(references, model=tiny)
    for _ in range(2):  # the model goes with them
        for a, b in zip(icas.segment(images, ready), icas.segment(images, references, model=tiny)):
            same(a, b)
        same(icas.segment(images[0], ready, **clicks),
             icas.segment(images[0], references, model=tiny, **clicks))
        for a, b in zip(icas.detect(images, ready), icas.detect(images, references, model=tiny)):
            same_detection(a, b)


def test_references_are_pooled_once_when_prepared(tiny, rng, references, monkeypatch):
    pooled, pool = [], icas.pool_shots
    monkeypatch.setattr(icas, "pool_shots", lambda m, shots: pooled.append(len(shots))
                        or pool(m, shots))
    learned, learn = [], icas.learn_good
    monkeypatch.setattr(icas, "learn_good", lambda r: learned.append(r) or learn(r))
    ready, image = icas.prepare(references, model=tiny), picture(rng)
    assert not pooled and not learned
    icas.segment(image, ready)
    once = list(pooled)
    assert once and not learned  # nothing for `detect` yet
    icas.detect(image, ready)
    for _ in range(2):
        icas.segment(image, ready)
        icas.detect(image, ready)
    assert pooled == once and len(learned) == 1


def test_the_prompt_of_a_label_is_made_when_asked_for_and_once(tiny, rng):
    shots = [(picture(rng), blob(), label) for label in ("crack", "scratch")]
    ready = icas.prepare(icas.encode(shots, [picture(rng)], model=tiny), model=tiny)
    assert ready.made == {}
    crack = ready.prompt("crack")
    assert set(ready.made) == {"crack"} and ready.prompt("crack") is crack and crack.good == 1
    assert ready.prompt("").good == 1 and not ready.prompt("").foreground[0].any()


def count_details(model, monkeypatch):
    """A list that grows by the (h, w) of each picture that the small CNN sees."""
    seen, see = [], model.detail.forward
    monkeypatch.setattr(model.detail, "forward",
                        lambda x: seen.append(tuple(x.shape[-2:])) or see(x))
    return seen


def test_the_detail_of_a_larger_picture_is_made_for_small_marks_alone_and_once(
        tiny, rng, monkeypatch):
    image, dot = picture(rng), np.zeros((40, 40), bool)
    dot[10:16, 10:18] = True   # less than two tokens
    large, small, tiniest = (icas.prepare(icas.encode([(picture(rng), m)], model=tiny), model=tiny)
                             for m in (half(), blob(), dot))
    scales = [ready.prompt("defect").scales for ready in (large, small, tiniest)]
    assert scales == [(1,), (2,), (4, 2)]
    looks = count_details(tiny, monkeypatch)
    found = icas.encode_image(image, model=tiny)
    icas.segment(found, large)
    assert looks == [(112, 112)] and found.features.closer == {}
    for _ in range(2):   # references too, once they are prepared
        icas.segment(found, small)
    for at in ((8, 8), (30, 5)):
        icas.segment(found, points=[at], model=tiny)
    assert looks == [(112, 112), (224, 224)] and tiny.look_closer(found.features).shape[-1] == 28
    for _ in range(2):
        icas.segment(found, tiniest)
    assert looks == [(112, 112), (224, 224), (448, 448)]
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    expected = tiny.detail((255 * x).round() / 255)
    torch.testing.assert_close(found.features.closer[2], expected.half(), atol=0.01, rtol=0)
    assert [len(x[0]) for x in tiny.levels(found.features, (4, 2))] == [64] * 3 + [56**2, 28**2]
    assert tiny.grids(found.features, (4, 2)) == [(8, 8)] * 3 + [(56, 56), (28, 28)]
    assert tiny.grids(found.features) == [(8, 8)] * 3 + [(14, 14)]
    # the prompt's own cells, of the enlarged picture: they lie nowhere but at the mark
    shares = tiniest.prompt("defect").foreground
    expected = dot.reshape(8, 5, 8, 5).mean(axis=(1, 3)).sum() / 64
    for share, cells in zip(shares, [64] * 3 + [56**2, 28**2], strict=True):
        copies = 8 + 4 / 0.8**2   # of which four are larger
        assert float(share.sum()) / copies / cells == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("shape", [(40, 40), (6, 90), (120, 3)])
def test_the_larger_picture_gives_twice_the_grid_of_the_detail(tiny, rng, shape):
    features = icas.encode_image(picture(rng, *shape), model=tiny).features
    (h, w), (h0, w0) = features.detail.shape[-2:], features.maps.shape[-2:]
    assert features.picture.dtype == torch.uint8 and (h, w) == (h0 * 14 // 8, w0 * 14 // 8)
    assert features.picture.shape == (1, 3, 16 * h, 16 * w)
    for scale in (1, 2, 4):
        assert tiny.look_closer(features, scale).shape == (1, 280, scale * h, scale * w)
    mask = torch.zeros(2, *shape)
    mask[0, shape[0] // 2, shape[1] // 2] = 1
    sides = icas.make_shot(features, mask, "defect").sides
    assert [s.shape for s in sides] == [(2, h0, w0), (2, 4 * h, 4 * w)]
    np.testing.assert_allclose([float(s[0].sum()) / s[0].numel() for s in sides],
                               1 / np.prod(shape), rtol=0.6)


def test_what_another_model_encoded_is_refused(tiny, rng, references):
    image = picture(rng)
    seen = icas.encode_image(image, model=tiny)
    for change in ({}, {"image_size": 98}, {"blocks": (3, 4)}, {"detail": False}):
        other = icas.ICAS(dataclasses.replace(tiny.config, **change)).eval()
        other.encoder_sha256 = tiny.encoder_sha256 if change else "another"
        own = icas.encode([(image, blob())], [picture(rng)], model=other)
        for use, name in ((lambda: icas.segment(image, references, model=other), "references"),
                          (lambda: icas.detect(image, references, model=other), "references"),
                          (lambda: icas.prepare(references, model=other), "references"),
                          (lambda: references + own, "references"),
                          (lambda: icas.segment(seen, own, model=other), "images"),
                          (lambda: icas.segment([image, seen], own, model=other), r"images\[1\]"),
                          (lambda: icas.segment(seen, points=[(3, 3)], model=other), "images"),
                          (lambda: icas.detect(seen, own, model=other), "images")):
            with pytest.raises(ValueError, match=f"{name}: made with .*encode again"):
                use()


# ---- detect --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_detect_scores_maps_and_thresholds(tiny, rng, count):
    goods = [picture(rng) for _ in range(count)]
    images = [picture(rng, 37, 53), np.full((20, 20), 255, np.uint8), picture(rng, 3, 90)]
    references = icas.encode(normals=goods, model=tiny)
    found = icas.detect(images, references, model=tiny)
    assert [f.map.shape for f in found] == [(37, 53), (20, 20), (3, 90)]
    assert len({f.threshold for f in found}) == 1  # from the references alone
    for f in found:
        assert type(f.score) is float and type(f.is_anomalous) is bool
        assert f.is_anomalous == (f.score > f.threshold)
        assert f.map.dtype == np.float32 and f.map.min() >= -1e-3 and f.score >= 0
    turned_round = icas.detect(images[::-1], references, model=tiny)[::-1]
    for a, b in zip(turned_round, found, strict=True):
        same_detection(a, b)
    again = icas.detect(images[0], normals=goods[::-1], model=tiny)
    assert again.score == pytest.approx(found[0].score, abs=1e-4)
    assert again.threshold == pytest.approx(found[0].threshold, abs=1e-4)
    strict, lax = (icas.detect(images[0], references, false_positive_rate=r, model=tiny).threshold
                   for r in (0.001, 0.2))
    assert strict > found[0].threshold > lax


def test_each_good_part_has_one_score_and_of_a_single_one_turned_copies_are_the_other(tiny, rng):
    goods = [picture(rng, 12, 60) for _ in range(3)]
    for count, parts in ((3, 3), (2, 2), (1, 2)):
        ready = icas.prepare(icas.encode(normals=goods[:count], model=tiny), model=tiny)
        assert len(ready.good.scores) == count
        assert all(len(owner.unique()) == parts for owner in ready.good.owner)


def test_turned_copies_count_where_they_bring_a_part_that_is_left_out_nearer(tiny, rng):
    goods = [picture(rng) for _ in range(4)]

    def tokens(normals, **options):
        references = icas.encode(normals=normals, model=tiny, **options)
        return icas.prepare(references, model=tiny).good.bank[0].shape[1]
    alike = [np.rot90(goods[0], i).copy() for i in range(4)]   # the same, turned
    tilted = [scipy.ndimage.rotate(goods[0], 45 * i, reshape=False, order=1, mode="reflect",
                                   axes=(1, 0)) for i in range(4)]
    plain, every = 4 * (64 + 3 * 16), 4 * (64 + 10 * 16)   # of a turned copy every fourth token
    assert tokens(tilted) == every and tokens(tilted, turns=False) == 4 * 64
    assert tokens(alike * 1 + goods[1:2]) == 5 * (64 + 3 * 16)   # of more than four none
    assert tokens([np.full((40, 40), 9 * i, np.uint8) for i in range(4)]) == plain


def test_a_reference_itself_scores_lower_than_another_picture(tiny, rng):
    good = picture(rng)
    references = icas.encode(normals=[good], model=tiny)
    own, other = (icas.detect(x, references, model=tiny)
                  for x in (good, np.zeros((40, 40), np.uint8)))
    assert own.score < other.score


def test_turns_make_a_turned_part_as_near_as_the_part_itself(tiny, rng):
    good, other = picture(rng), picture(rng)
    upright, all_round = (icas.encode(normals=[good], turns=t, model=tiny) for t in (False, True))
    assert len(all_round) == len(upright) == 1 and len(upright.shots) == 1
    assert [s.turn for s in all_round.shots] == list(range(8))
    # beside a picture of something else: each set of references has a unit of its own. The random
    # encoder's tokens are all place; the detail's are not.
    lying = np.rot90(good)
    near, far = (a.parts["detail"] / b.parts["detail"] for a, b in (
        icas.detect([lying, other], r, parts=True, model=tiny) for r in (all_round, upright)))
    assert near < 0.8 * far and near < 1


def test_a_marked_image_is_shown_in_twelve_copies_and_a_turned_one_shows_the_same(tiny, rng):
    image, mask = picture(rng), blob()
    one, other = (icas.encode([(i, m)], [image], model=tiny)
                  for i, m in ((image, mask), (np.rot90(image), np.rot90(mask))))
    assert len(one) == 2 and len(one.shots) == 12 + 4
    marked = [s for s in one.shots if s.label]
    for shot in marked:
        assert any(torch.allclose(shot.features.maps, o.features.maps, atol=0.02)
                   and torch.allclose(shot.features.detail, o.features.detail, atol=0.02)
                   and all(map(torch.equal, shot.sides, o.sides)) for o in other.shots if o.label)
    assert len({s.features.maps.float().sum().item() for s in marked}) == 12
    assert len(icas.encode([(image, mask)], turns=False, model=tiny).shots) == 1
    assert len(icas.encode([(image, mask)], [image], turns=True, model=tiny).shots) == 20
    many = [rng.integers(0, 256, (14, 14, 3), dtype=np.uint8) for _ in range(41)]
    counts = [len(icas.encode(normals=many[:n], model=tiny).shots) for n in (40, 41)]
    assert counts == [160, 41]


@pytest.mark.parametrize("rows, columns, piece", [
    (slice(20, 30), slice(45, 50), (slice(5, 45), slice(8, 88))),     # the mark in its middle
    (slice(0, 2), slice(97, 99), (slice(0, 40), slice(20, 100))),     # near a corner
    (slice(0, 50), slice(0, 100), (slice(5, 45), slice(10, 90)))])
def test_larger_copies_show_four_fifths_around_the_mark(rows, columns, piece):
    marked = torch.zeros(50, 100)
    marked[rows, columns] = 1
    assert icas.around(marked) == piece
    assert icas.around(torch.ones(1, 1)) == (slice(0, 1), slice(0, 1))


@pytest.mark.parametrize("mask, scales", [(half(), (1,)), (blob(), (2,))])
def test_of_copies_every_marked_token_and_a_fourth_of_the_others_are_kept(
        tiny, rng, mask, scales):
    marked = icas.encode([(picture(rng), mask)], model=tiny).shots
    prompt = icas.pool_shots(tiny, marked)
    assert prompt.scales == scales
    for level, grid, side in ((0, 0, 8), (3, 1, 14 * scales[0])):
        shares = [F.adaptive_avg_pool2d(s.sides[grid][:1], side).flatten() for s in marked]
        total = side ** 2
        every = max(4, -(-total // 200))
        copies = [int((share > 0).sum() + (share == 0)[s.turn % every::every].sum())
                  for s, share in zip(marked[1:], shares[1:])]
        kept = prompt.foreground[level].shape[1]
        assert kept == prompt.tokens[level].shape[1] == prompt.background[level].shape[1]
        assert kept == total + sum(copies) < 12 * total


def test_every_part_sees_the_prompt_in_all_turns(tiny, rng):
    image, mask = picture(rng), blob()
    target = icas.encode_image(picture(rng), model=tiny)
    turned_round, lying = (icas.segment(target, icas.encode([(image, mask)], turns=t, model=tiny),
                                        parts=True, model=tiny).parts for t in (None, False))
    for name in ("S_s", "S_s mfm", "block 3 nearest", "block 3 Fisher",
                 "detail nearest"):
        assert not np.array_equal(turned_round[name], lying[name]), name


def test_many_references_keep_a_bounded_number_of_tokens(tiny, rng, monkeypatch):
    goods = [picture(rng) for _ in range(6)]
    whole = icas.encode(normals=goods, turns=False, model=tiny)
    kept = [t.shape[1] for t in icas.pool_shots(tiny, whole.shots).tokens]
    assert kept == [64 * 6] * 3 + [196 * 6]

    def far():
        ready = icas.prepare(whole, model=tiny)
        features = icas.encode_image(goods[0], model=tiny).features
        levels = [tokens for tokens, _ in icas.detect_levels(tiny, features).values()]
        return [icas.novelty(ready, *level, -1) for level in zip(levels, *ready.good[:2])]
    every = far()
    for cap in ("CAP", "BANK"):
        monkeypatch.setattr(icas, cap, 6 * 20)
    assert [t.shape[1] for t in icas.pool_shots(tiny, whole.shots).tokens] == [6 * 20] * 4
    shots = [*icas.encode([(goods[0], blob())], turns=False, model=tiny).shots, *whole.shots[1:]]
    kept = [t.shape[1] for t in icas.pool_shots(tiny, shots).tokens]   # at twice the side a fourth
    assert max(kept[:3]) <= 6 * 20 + 9 and kept[3] < 6 * 16 + 100
    assert {t.shape[1] for t in icas.prepare(whole, model=tiny).good.bank} == {6 * 20}
    for fewer, more in zip(far(), every, strict=True):  # fewer tokens can only be further away
        assert (fewer >= more - 1e-5).all() and fewer.mean() > more.mean()


def test_what_is_marked_is_not_shown_to_detect(tiny, rng):
    goods, image = [picture(rng) for _ in range(3)], picture(rng)
    marked = [(picture(rng), blob(), "a"), (image, blob(), "b")]
    same_detection(*(icas.detect(image, icas.encode(a, goods, model=tiny), model=tiny)
                     for a in ((), marked)))


# ---- without the detail, without a decoder ------------------------------------------------------


def test_without_detail_everything_goes_by_the_encoder_alone(rng, tmp_path, monkeypatch):
    monkeypatch.setattr(icas, "Detail", None)  # it is not even made
    torch.manual_seed(0)
    model = icas.ICAS(icas.Config(**TINY | {"detail": False})).eval().requires_grad_(False)
    assert model.detail is None and "no detail" in model.kind
    image, shot, good = picture(rng, 37, 53), (picture(rng), blob()), picture(rng)
    seen = icas.encode_image(image, model=model)
    assert seen.features.detail is None
    references = icas.encode([shot], [good], model=model)
    references.save(tmp_path / "r.safetensors")
    loaded = icas.References.load(tmp_path / "r.safetensors")
    assert loaded.kind == references.kind and len(loaded) == 2
    found = icas.segment(seen, references, parts=True, model=model)
    np.testing.assert_allclose(icas.segment(image, loaded, model=model).score, found.score,
                               atol=2e-3)  # another memory layout moves the last bits
    assert not any("detail" in name for name in found.parts)
    for clicks in ({"points": [(20, 10)]}, {"boxes": [(5, 5, 20, 15)]}):
        assert np.isfinite(icas.segment(seen, references, model=model, **clicks).score).all()
    detected = icas.detect(image, loaded, parts=True, model=model)
    assert min(detected.parts.values()) <= detected.score <= max(detected.parts.values())
    assert [*detected.parts] == ["block 2", "block 3", "block 4"]


def test_the_small_cnn_is_found_beside_the_encoder(checkpoint, monkeypatch):
    monkeypatch.setattr(icas, "DETAIL", Path(icas.DETAIL).name)   # in no other folder
    assert icas.load(checkpoint, device="cpu").detail is not None


def test_without_detail_a_checkpoint_needs_no_detail_file(rng, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = icas.ICAS(icas.Config(**TINY | {"detail": False})).eval().requires_grad_(False)
    save_file(model.encoder.state_dict(), tmp_path / "encoder.safetensors")
    model.encoder_sha256 = icas.sha256(tmp_path / "encoder.safetensors")
    icas.save(model, tmp_path / "icas.safetensors")
    monkeypatch.setattr(icas, "DETAIL", "no such file")
    loaded = icas.load(tmp_path / "icas.safetensors", device="cpu")
    assert loaded.config == model.config and loaded.detail is None
    image, shot = picture(rng), (picture(rng), blob())
    a, b = (icas.segment(image, anomalies=[shot], model=m).score for m in (model, loaded))
    np.testing.assert_allclose(a, b, atol=0.02)  # the trained part is stored in fp16


# ---- files ---------------------------------------------------------------------------------------


def test_references_survive_a_file_and_a_sum(tiny, rng, tmp_path):
    image, good = picture(rng), picture(rng)
    shots = [(picture(rng), blob(), "scratch"), (picture(rng, 30, 50), half(30, 50), "défaut")]
    whole = icas.encode(shots, [good], model=tiny)
    whole.save(tmp_path / "r.safetensors")
    loaded = icas.References.load(tmp_path / "r.safetensors")
    assert len(loaded) == 3 and loaded.labels == ["défaut", "scratch"]
    assert loaded.kind == whole.kind == tiny.kind
    assert [p.name for p in tmp_path.iterdir()] == ["r.safetensors"]  # no half-written file
    total = icas.References() + icas.encode(shots[:1], model=tiny)
    total = total + icas.encode(shots[1:], [good], model=tiny) + icas.References()
    expected = icas.segment(image, whole, model=tiny)
    for other in (loaded, total):
        found = icas.segment(image, other, model=tiny).label_scores
        np.testing.assert_allclose(found, expected.label_scores, atol=2e-3)  # other memory layout
        prompts = [icas.prepare(other, model=tiny).prompt(label) for label in other.labels]
        assert [p.scales for p in prompts] == [(1,), (2,)]
    for a, b in zip(loaded.shots, whole.shots, strict=True):
        assert a[2:] == b[2:] and a.features.closer == b.features.closer == {}
        for name in ("maps", "detail", "picture"):
            x, y = getattr(a.features, name), getattr(b.features, name)
            assert torch.equal(x, y) and x.dtype == y.dtype
        assert all(map(torch.equal, a.sides, b.sides))
    again = icas.detect(image, loaded, model=tiny).score
    assert again == pytest.approx(icas.detect(image, whole, model=tiny).score, abs=2e-3)


def test_references_of_another_kind_are_refused(tiny, rng, references):
    other = icas.References(references.shots, "another")
    for use in (lambda r: icas.segment(picture(rng), r, model=tiny),
                lambda r: icas.detect(picture(rng), r, model=tiny),
                lambda r: icas.prepare(r, model=tiny),
                lambda r: references + r, lambda r: r + references):
        with pytest.raises(ValueError, match="references: .*encode"):
            use(other)


def test_a_checkpoint_finds_its_encoder_by_hash_and_gives_the_same(tiny, rng, checkpoint):
    save_file({"x": torch.zeros(1)}, checkpoint.with_name("a_foreign.safetensors"))
    encoder, moved = (checkpoint.with_name(f"{n}.safetensors") for n in ("encoder", "z"))
    shutil.move(encoder, moved)
    model = icas.load(checkpoint, device="cpu")
    assert not model.training and model.config == tiny.config
    assert not any(p.requires_grad for p in model.parameters())
    image, shot, good = picture(rng), (picture(rng), blob()), picture(rng)
    rounded = copy.deepcopy(tiny)   # the trained part is stored in fp16, norms are folded
    rounded.decoder.half().float()
    rounded.detail.fuse()
    same(*(icas.segment(image, anomalies=[shot], normals=[good], model=m)
           for m in (rounded, model)))
    again = checkpoint.with_name("again.safetensors")
    icas.save(model, again)
    model_again = icas.load(str(again), encoder=moved, device="cpu")
    same(*(icas.segment(image, anomalies=[shot], model=m) for m in (model, model_again)))


def test_an_encoder_of_another_hash_is_refused(tiny, checkpoint):
    other = checkpoint.with_name("other.safetensors")
    save_file({k: v + 1 for k, v in tiny.encoder.state_dict().items()}, other)
    with pytest.raises(ValueError, match="encoder: .*SHA-256"):
        icas.load(checkpoint, encoder=other)
    checkpoint.with_name("encoder.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="encoder: no file with SHA-256"):
        icas.load(checkpoint)


@pytest.mark.parametrize("name, fragment", [
    ("tiny", "is not a whole safetensors file"), ("encoder", "encoder: no file with SHA-256"),
    ("detail", "detail.safetensors' is not a whole safetensors file")])
def test_half_a_file_of_a_model_is_refused_by_name(checkpoint, name, fragment):
    path = checkpoint.with_name(f"{name}.safetensors")
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises((ValueError, FileNotFoundError), match=fragment):
        icas.load(checkpoint, device="cpu")


def test_a_detail_file_of_another_net_is_refused_by_name(checkpoint):
    path = checkpoint.with_name("detail.safetensors")
    save_file({k: v for k, v in load_file(path).items() if "blocks.3." not in k}, path)
    with pytest.raises(ValueError, match="detail.safetensors: weights do not fit; missing"):
        icas.load(checkpoint, device="cpu")


@pytest.mark.skipif(not (HOME / "checkpoints" / icas.CHECKPOINT).is_file(),
                    reason="no checkpoints/ beside icas.py")
def test_a_checkpoint_alone_in_its_folder_finds_the_shipped_encoder(tmp_path):
    """What `train.py --init OUT/last.safetensors` and `evaluate.py --model` need."""
    shutil.copy(HOME / "checkpoints" / icas.CHECKPOINT, tmp_path / "last.safetensors")
    shipped = icas.load(icas.find_shipped(icas.CHECKPOINT)).encoder_sha256
    assert icas.load(tmp_path / "last.safetensors").encoder_sha256 == shipped


def test_the_file_works_when_copied_under_another_name(tiny, rng, checkpoint, tmp_path):
    shutil.copy(HOME / "icas.py", tmp_path / "other_name.py")
    image, shot = picture(rng), picture(rng)
    np.savez(tmp_path / "in.npz", image=image, shot=shot, mask=blob())
    (tmp_path / "use.py").write_text(
        "import sys, numpy, torch\ntorch.set_num_threads(1)\nimport other_name as m\n"
        "assert 'icas' not in sys.modules\nm.ENCODERS['tiny14'] = (48, 4, 3)\n"
        f"m.DETAIL = {icas.DETAIL!r}\ngiven = numpy.load('in.npz')\n"
        f"model = m.load({str(checkpoint)!r}, device='cpu')\n"
        "found = m.segment(given['image'], anomalies=[(given['shot'], given['mask'])], "
        "model=model)\nnumpy.save('out.npy', found.score)\n")
    environment = {k: v for k, v in ENV.items() if k != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, env=environment,
                         capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "", run.stderr
    expected = icas.segment(image, anomalies=[(shot, blob())],
                            model=icas.load(checkpoint, device="cpu"))
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected.score, atol=1e-5)


def test_importing_does_nothing():
    code = """
import sys, torch, numpy, scipy.optimize, safetensors.torch, einops
before = set(sys.modules)
torch.manual_seed(3); numpy.random.seed(3)
def states():
    return (torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(),
            torch.get_default_dtype(), torch.is_grad_enabled())
old = states()
import icas
assert states() == old
new = {m.split('.')[0] for m in set(sys.modules) - before}
assert not new & {'PIL', 'tqdm', 'pycocotools', 'sklearn', 'transformers', 'kornia', 'matplotlib',
                  'argparse', 'elpv_dataset'}, new
"""
    run = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_compiled_gives_what_eager_gives(rng, checkpoint, monkeypatch):
    # the graphs that Dynamo captures, without inductor's C++ code for them, a minute to build
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: plain(self, backend="eager"))
    eager, compiled = (icas.load(checkpoint, device="cpu", compile=c) for c in (False, True))
    assert eager.encoder._compiled_call_impl is None
    assert compiled.encoder._compiled_call_impl and compiled.decoder._compiled_call_impl
    image, shots = picture(rng), {"anomalies": [(picture(rng), blob())]}
    got, expected = (icas.segment(image, model=m, **shots).score for m in (compiled, eager))
    np.testing.assert_allclose(got, expected, atol=1e-4)
