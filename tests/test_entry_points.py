"""segment, detect, encode, save and load as a user calls them, with an untrained tiny model."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import icas

HOME = Path(icas.__file__).parent
ENV = os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"}


def picture(rng, h=40, w=40):
    return rng.integers(0, 256, (h, w, 3), dtype=np.uint8)


def blob(h=40, w=40):
    mask = np.zeros((h, w), dtype=bool)
    mask[h // 4:h // 2 + 1, w // 4:w // 2 + 1] = True
    return mask


@pytest.fixture
def references(tiny, rng):
    return icas.encode([(picture(rng), blob())], [picture(rng)], model=tiny)


def same(a, b):
    np.testing.assert_array_equal(a.score, b.score)
    np.testing.assert_array_equal(a.mask, b.mask)
    assert a.labels == b.labels and a.threshold == b.threshold


# ---- images in, results out ------------------------------------------------------------------------------------------


def test_one_image_in_gives_one_result_and_a_list_gives_a_list(tiny, rng, references):
    image = picture(rng)
    one, many, none = (icas.segment(x, references, model=tiny) for x in (image, [image], []))
    assert isinstance(one, icas.Segmentation) and [type(m) for m in many] == [icas.Segmentation] and none == []
    same(one, many[0])
    one, many = icas.detect(image, references, model=tiny), icas.detect((image,), references, model=tiny)
    assert isinstance(one, icas.Detection) and isinstance(many, list) and many[0].score == one.score


@pytest.mark.parametrize("shape", [(37, 53), (53, 37), (1, 1), (120, 3), (3, 120), (20, 60), (1, 2), (130, 200)])
def test_results_have_the_size_of_their_input(tiny, rng, references, shape):
    found = icas.segment(picture(rng, *shape), references, model=tiny)
    assert found.mask.shape == found.score.shape == shape and found.label_scores.shape == (1, *shape)
    assert found.mask.dtype == bool and found.score.dtype == np.float32
    assert np.isfinite(found.score).all() and 0 <= found.score.min() and found.score.max() <= 1
    np.testing.assert_array_equal(found.mask, found.score > 0.5)
    distance = icas.detect(picture(rng, *shape), references, model=tiny)
    assert distance.map.shape == shape and np.isfinite(distance.map).all() and 0 <= distance.score <= 4


def test_a_long_image_is_tiled_and_a_long_reference_gives_a_shot_a_tile(tiny, rng):
    assert len(icas.tile_boxes(20, 60)) == 1 and len(icas.tile_boxes(3, 120)) > 10
    long = icas.encode([(picture(rng, 10, 100), blob(10, 100))], model=tiny)
    assert len(long) == 1 and len(long.shots) == 8 * len(icas.tile_boxes(10, 100))
    assert icas.segment(picture(rng), long, model=tiny).mask.shape == (40, 40)


def test_every_kind_of_picture_becomes_the_same_rgb(rng, tmp_path):
    rgb = picture(rng, 5, 7)
    grey = rgb[..., 0]
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    alpha = np.dstack([rgb, np.full((5, 7), 255, np.uint8)])
    chw = torch.from_numpy(rgb).permute(2, 0, 1)
    for same_picture in (rgb, alpha, chw, chw.float() / 255, chw.double() / 255, Image.fromarray(rgb), Image.fromarray(alpha),
                         tmp_path / "rgb.png", str(tmp_path / "rgb.png"), rgb[::-1][::-1], np.asfortranarray(rgb)):
        got = icas.to_rgb(same_picture)
        assert got.dtype == torch.uint8 and got.device.type == "cpu" and got.is_contiguous()
        np.testing.assert_array_equal(got.numpy(), rgb)
    for same_picture in (grey, grey[..., None], Image.fromarray(grey), Image.merge("LA", [Image.fromarray(grey), Image.new("L", (7, 5), 255)]),
                         np.dstack([grey] * 3)):
        np.testing.assert_array_equal(icas.to_rgb(same_picture).numpy(), np.dstack([grey] * 3))
    palette = Image.fromarray(rgb).quantize(8)
    np.testing.assert_array_equal(icas.to_rgb(palette).numpy(), np.array(palette.convert("RGB")))
    bilevel = Image.fromarray(grey > 100)
    assert bilevel.mode == "1"
    np.testing.assert_array_equal(icas.to_rgb(bilevel).numpy(), np.dstack([(grey > 100) * np.uint8(255)] * 3))


def test_alpha_is_laid_over_white():
    red = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]], dtype=np.uint8)
    expected = [[[200, 0, 0], [255, 255, 255], [244, 204, 204]]]              # 0.2 * 200 + 0.8 * 255 = 244
    np.testing.assert_array_equal(icas.to_rgb(red).numpy(), expected)
    np.testing.assert_array_equal(icas.to_rgb(Image.fromarray(red)).numpy(), expected)


def test_a_transparent_palette_colour_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([9, 9, 9, 50, 60, 70])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 0
    np.testing.assert_array_equal(icas.to_rgb(image).numpy(), [[[255, 255, 255], [50, 60, 70]]])


def test_sixteen_bits_need_a_range(tmp_path):
    deep = np.array([[0, 1000, 30000, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for image in (deep, deep.astype(">u2"), tmp_path / "deep.png", Image.open(tmp_path / "deep.png")):
        with pytest.raises(ValueError, match="value_range"):
            icas.to_rgb(image)
        got = icas.to_rgb(image, value_range=(1000, 30000)).numpy()
        np.testing.assert_array_equal(got[0, :, 0], [0, 0, 255, 255])
    np.testing.assert_array_equal(icas.to_rgb(deep, value_range=(0, 60000)).numpy()[0, 2], [128] * 3)   # 127.5, to even


def test_grey_and_rgb_of_the_same_give_the_same_result(tiny, rng, references):
    grey = picture(rng)[..., 0]
    same(icas.segment(grey, references, model=tiny), icas.segment(np.dstack([grey] * 3), references, model=tiny))


# ---- segment ---------------------------------------------------------------------------------------------------------


def test_forty_images_give_what_single_calls_give_in_any_order_and_batch(tiny, rng, references):
    images = [picture(rng, *s) for s in [(40, 40), (30, 50), (40, 40), (12, 60), (40, 41), (50, 30), (33, 40), (40, 40)] * 5]
    single = [icas.segment(x, references, model=tiny) for x in images]
    order = rng.permutation(40)
    for found in (icas.segment(images, references, model=tiny), icas.segment(images, references, batch_size=1, model=tiny),
                  icas.segment(images, references, batch_size=40, model=tiny)):
        for a, b in zip(found, single, strict=True):
            same(a, b)
    for a, i in zip(icas.segment([images[i] for i in order], references, batch_size=3, model=tiny), order, strict=True):
        same(a, single[i])


def test_encoded_references_equal_those_given_in_the_call(tiny, rng):
    image, shot, good = picture(rng), (picture(rng), blob()), picture(rng)
    same(icas.segment(image, icas.encode([shot], [good], model=tiny), model=tiny),
         icas.segment(image, anomalies=[shot], normals=[good], model=tiny))
    same(icas.segment(image, icas.encode([shot], model=tiny), normals=[good], model=tiny),
         icas.segment(image, anomalies=[shot], normals=[good], model=tiny))


def test_the_order_of_shots_does_not_matter(tiny, rng):
    shots, goods, image = [(picture(rng), blob()) for _ in range(3)], [picture(rng, 30, 50) for _ in range(2)], picture(rng)
    a = icas.segment(image, anomalies=shots, normals=goods, model=tiny)
    b = icas.segment(image, anomalies=shots[::-1], normals=goods[::-1], model=tiny)
    np.testing.assert_allclose(a.score, b.score, atol=1e-4)
    one = icas.segment(image, anomalies=shots[:1], model=tiny)
    assert np.abs(one.score - a.score).max() > 1e-4      # more shots do count


def test_several_labels_give_one_map_each_and_the_score_is_their_maximum(tiny, rng):
    shots = [(picture(rng), blob(), "scratch"), (picture(rng), blob(), "crack"), (picture(rng), blob(), "scratch")]
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


def test_normal_references_alone_segment_what_is_not_normal(tiny, rng):
    found = icas.segment(picture(rng), normals=[picture(rng)], model=tiny)
    assert found.labels == ["anomaly"] and found.mask.shape == (40, 40)


def test_the_threshold_cuts_the_score(tiny, rng, references):
    image = picture(rng)
    low, high = (icas.segment(image, references, threshold=t, model=tiny) for t in (0, 1))
    assert low.mask.all() and not high.mask.any() and high.threshold == 1
    np.testing.assert_array_equal(low.score, high.score)


@pytest.mark.parametrize("clicks", [
    {"points": [(20, 10)]}, {"points": np.array([[20.5, 10], [3, 30]]), "point_labels": [1, 0]}, {"boxes": [(5, 5, 20, 15)]},
    {"boxes": [(0, 0, 53, 37)]}, {"points": [(1, 1)], "boxes": [(5, 5, 20, 15)], "mask": blob(37, 53)},
    {"points": torch.tensor([[0.0, 0.0], [52.9, 36.9]]), "point_labels": torch.tensor([1, 1])}, {"mask": blob(37, 53)}])
def test_clicks_boxes_and_masks_on_the_image_itself(tiny, rng, references, clicks):
    image = picture(rng, 37, 53)
    alone, helped = icas.segment(image, model=tiny, **clicks), icas.segment(image, references, model=tiny, **clicks)
    for found in (alone, helped):
        assert found.mask.shape == (37, 53) and found.labels == ["defect"] and np.isfinite(found.score).all()
    assert len(references) == 2          # a click is not kept in the references that were passed


def test_where_the_click_is_matters(tiny, rng):
    image = picture(rng)
    at = [icas.segment(image, points=[p], model=tiny).score for p in ((3, 3), (35, 35))]
    assert np.abs(at[0] - at[1]).max() > 1e-3
    negative = icas.segment(image, points=[(3, 3), (35, 35)], point_labels=[1, 0], model=tiny).score
    assert np.abs(at[0] - negative).max() > 1e-3


def test_clicks_are_looked_at_twice(tiny, rng, monkeypatch):
    image, clicks = picture(rng), {"points": [(8, 8), (35, 35)], "point_labels": [1, 0]}
    twice = icas.segment(image, model=tiny, **clicks).score
    tiles, odds = icas._describe(tiny, torch.from_numpy(image)), torch.full((40, 40), -0.5)
    odds[20:30, 5:9], odds[:4] = 1.5, -1.5                                        # sure of a defect, and of a good part
    shot, = icas._second_look(tiles, odds, *clicks.values())
    foreground, background = np.zeros((40, 40)), np.zeros((40, 40))
    y, x = np.mgrid[:40, :40]
    foreground[(x - 8) ** 2 + (y - 8) ** 2 <= (40 / 74) ** 2] = foreground[20:30, 5:9] = 1
    background[(x - 35) ** 2 + (y - 35) ** 2 <= (40 / 74) ** 2] = background[:4] = 1
    for found, truth in ((shot.foreground, foreground), (shot.background, background)):
        np.testing.assert_allclose(found.numpy(), truth.reshape(8, 5, 8, 5).mean(axis=(1, 3)), atol=1e-6)
    monkeypatch.setattr(icas, "SURE", 1e9)                                        # never sure: the second look sees what the first did
    once = icas.segment(image, model=tiny, **clicks).score
    prompt = icas._join(tiny, icas._interactive(tiles, (40, 40), *clicks.values(), None, None))
    first = icas._log_odds(tiny, tiles[0].features, prompt, None, clicked=True)[0]
    np.testing.assert_allclose(once, torch.nn.functional.interpolate(first[None], (40, 40), mode="bilinear")[0, 0].sigmoid(), atol=1e-4)
    assert np.abs(once - twice).max() > 1e-4


def test_clicks_have_fusion_weights_of_their_own(tiny, rng, references, monkeypatch):
    image, point = picture(rng), {"points": [(8, 8)]}
    clicked, marked = icas.segment(image, model=tiny, **point).score, icas.segment(image, references, model=tiny).score
    monkeypatch.setitem(tiny._buffers, "fusion_clicks", tiny.fusion_clicks * 0 - 1)
    assert np.abs(icas.segment(image, model=tiny, **point).score - clicked).max() > 1e-3
    np.testing.assert_array_equal(icas.segment(image, references, model=tiny).score, marked)


def test_a_click_works_on_a_tiled_image(tiny, rng):
    assert icas.segment(picture(rng, 6, 90), points=[(85, 3)], model=tiny).mask.shape == (6, 90)


def test_boxes_are_the_connected_regions_largest_first(rng):
    mask = np.zeros((6, 9), bool)
    mask[0, 0] = mask[1, 1] = True                                            # touch at a corner: one region
    mask[3:6, 5:9] = True
    labels = rng.random((2, 6, 9)).astype(np.float32) * 0.1
    labels[1, 3:6, 5:9] += 0.5
    labels[0, :2, :2] += 0.5
    found = icas.Segmentation(mask, labels.max(axis=0), ["a", "b"], labels, 0.5).boxes()
    assert [(r["bbox"], r["area"], r["label"]) for r in found] == [([5, 3, 4, 3], 12, "b"), ([0, 0, 2, 2], 2, "a")]
    assert found[0]["score"] == pytest.approx(labels.max(axis=0)[3:6, 5:9].max())
    assert icas.Segmentation(mask & False, labels[0], ["a"], labels[:1], 0.5).boxes() == []


def test_rle_is_what_pycocotools_reads(tiny, rng, references):
    coco = pytest.importorskip("pycocotools.mask")
    score = icas.segment(picture(rng, 37, 53), references, model=tiny).score
    found = icas.segment(picture(rng, 37, 53), references, threshold=float(np.median(score)), model=tiny)
    for mask in (found.mask, np.zeros((3, 4), bool), np.ones((3, 4), bool)):
        code = icas.Segmentation(mask, mask, ["a"], mask[None], 0.5).rle()
        np.testing.assert_array_equal(coco.decode(code), mask)


# ---- detect ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_detect_scores_maps_and_thresholds(tiny, rng, count):
    goods, images = [picture(rng) for _ in range(count)], [picture(rng, 37, 53), np.full((20, 20), 255, np.uint8), picture(rng, 3, 90)]
    references = icas.encode(normals=goods, model=tiny)
    found = icas.detect(images, references, model=tiny)
    assert [f.map.shape for f in found] == [(37, 53), (20, 20), (3, 90)]
    assert len({f.threshold for f in found}) == 1                              # from the references alone
    for f in found:
        assert type(f.score) is float and type(f.is_anomalous) is bool and f.is_anomalous == (f.score > f.threshold)
        assert f.map.dtype == np.float32 and -0.5 * 1.5 <= f.map.min() and f.score >= 0
    for a, b in zip(icas.detect(images[::-1], references, model=tiny)[::-1], found, strict=True):
        assert a.score == b.score
        np.testing.assert_array_equal(a.map, b.map)
    again = icas.detect(images[0], normals=goods[::-1], model=tiny)
    assert again.score == pytest.approx(found[0].score, abs=1e-4) and again.threshold == pytest.approx(found[0].threshold, abs=1e-4)
    strict, lax = (icas.detect(images[0], references, false_positive_rate=r, model=tiny).threshold for r in (0.001, 0.2))
    assert strict > found[0].threshold > lax


def test_good_parts_of_several_tiles_have_one_score_each(tiny, rng):
    goods = [picture(rng, 12, 60) for _ in range(3)]
    references = icas.encode(normals=goods, model=tiny)
    assert len(references.shots) > 3 * 4 and len(icas._known_good(tiny, references).scores) == icas._known_good(tiny, references).parts == 3
    alone = icas._known_good(tiny, icas.encode(normals=goods[:1], model=tiny))
    assert alone.parts == 1 and len(alone.scores) > 3


def test_a_reference_itself_scores_lower_than_another_picture(tiny, rng):
    good = picture(rng)
    references = icas.encode(normals=[good], model=tiny)
    assert icas.detect(good, references, model=tiny).score < icas.detect(np.zeros((40, 40), np.uint8), references, model=tiny).score


def test_turns_make_a_turned_part_as_near_as_the_part_itself(tiny, rng):
    good, other = picture(rng), picture(rng)
    upright, turned = (icas.encode(normals=[good], turns=t, model=tiny) for t in (False, True))
    assert len(turned) == len(upright) == 1 and len({s.source for s in turned.shots}) == 8 and len(upright.shots) == 1
    lying = np.rot90(good)
    near, far = (icas.detect(lying, r, model=tiny) for r in (turned, upright))
    assert near.score < 0.8 * far.score                                         # of a turned copy every fourth token is kept
    assert near.score < icas.detect(other, turned, model=tiny).score            # noise is off everywhere: most of that is taken away


def test_what_is_off_everywhere_counts_less_but_a_strange_part_stays_strange():
    distance = torch.ones(3, 8, 8) * torch.tensor([0.5, 1.2, 9.0])[:, None, None]
    distance[:, 0, :3] += 2
    np.testing.assert_allclose(icas.local(distance)[:, 0, 0], [0.25, 0.6, 0.75], rtol=1e-6)
    assert (icas.top_share(distance - icas.local(distance), 0.03)).diff().min() > 0


def test_a_marked_image_is_shown_in_eight_turns_and_a_turned_one_shows_the_same(tiny, rng):
    image, mask = picture(rng), blob()
    one, other = (icas.encode([(i, m)], [image], model=tiny) for i, m in ((image, mask), (np.rot90(image), np.rot90(mask))))
    assert len(one) == 2 and len(one.shots) == 8 + 4
    marked = [s for s in one.shots if s.label]
    for shot in marked:
        assert any(torch.allclose(shot.maps, o.maps, atol=0.02) and torch.equal(shot.foreground, o.foreground) for o in other.shots if o.label)
    assert len({s.maps.float().sum().item() for s in marked}) == 8
    assert len(icas.encode([(image, mask)], turns=False, model=tiny).shots) == 1
    assert len(icas.encode([(image, mask)], [image], turns=True, model=tiny).shots) == 16
    many = [rng.integers(0, 256, (14, 14, 3), dtype=np.uint8) for _ in range(41)]
    assert [len(icas.encode(normals=many[:n], model=tiny).shots) for n in (40, 41)] == [160, 41]
    # of seven copies every marked token and a fourth of the others are kept
    foreground, total = marked[0].foreground > 0, marked[0].foreground.numel()
    kept = icas._join(tiny, marked).foreground.shape[1]
    others = [int((~s.foreground.flatten().bool()).numpy()[s.turn % 4::4].sum()) for s in marked[1:]]
    assert kept == total + 7 * int(foreground.sum()) + sum(others) < 4 * total


def test_the_relation_net_sees_the_prompt_as_it_lies_and_the_matching_all_turns(tiny, rng):
    image, mask, target = picture(rng), blob(), icas._describe(tiny, torch.from_numpy(picture(rng)))[0].features
    turned, lying = (icas._log_odds(tiny, target, icas._join(tiny, icas.encode([(image, mask)], turns=t, model=tiny).shots), None)[1] for t in (None, False))
    assert torch.equal(turned.relation, lying.relation) and torch.equal(turned.pixel, lying.pixel)
    assert not any(torch.equal(getattr(turned, name), getattr(lying, name)) for name in ("semantic", "semantic_mfm", "margin", "prototype", "fisher"))


def test_many_references_keep_a_bounded_number_of_tokens(tiny, rng, monkeypatch):
    goods = [picture(rng) for _ in range(6)]
    whole = icas.encode(normals=goods, turns=False, model=tiny)
    every = icas.detect(goods[0], whole, model=tiny).score
    monkeypatch.setattr(icas, "BANK", 6 * 20)
    bounded = icas.encode(normals=goods, turns=False, model=tiny)
    assert icas._join(tiny, bounded.shots).foreground.shape[1] == 6 * 20 < icas._join(tiny, bounded.shots[:1]).foreground.shape[1] * 6
    assert icas.detect(goods[0], bounded, model=tiny).score >= every - 1e-6


def test_a_known_defect_raises_what_is_like_it_good_parts_and_the_threshold_too(tiny, rng):
    goods, image = [picture(rng) for _ in range(3)], picture(rng)
    without, both = (icas.encode(a, goods, model=tiny) for a in ((), [(picture(rng), blob(), "a"), (picture(rng), blob(), "b")]))
    plain, known = (icas.detect(image, r, model=tiny) for r in (without, both))
    assert (known.map >= plain.map - 1e-5).all() and known.score > plain.score
    before, after = (np.array(icas._known_good(tiny, r).scores) for r in (without, both))
    assert (after > before).all() and known.threshold > plain.threshold


def test_seen_before_is_the_largest_mask_level_match_of_any_label(tiny, rng):
    references = icas.encode([(picture(rng), blob(), "a"), (picture(rng), blob(), "b")], [picture(rng)], model=tiny)
    (_, features), = icas._describe(tiny, torch.from_numpy(picture(rng)))
    prompts = icas._known_good(tiny, references).defects
    single = [F.avg_pool2d(icas._log_odds(tiny, features, p, None)[1].semantic_mfm, 4) for p in prompts.values()]
    assert sorted(prompts) == ["a", "b"]
    torch.testing.assert_close(icas.seen_before(tiny, features, prompts), torch.maximum(*single))
    assert not icas.seen_before(tiny, features, {}).any()


@pytest.mark.parametrize("count", [1, 2, 10])
def test_a_good_part_is_left_out_of_the_prompt_that_its_own_score_is_raised_by(tiny, rng, monkeypatch, count):
    references, asked = icas.encode([(picture(rng), blob())], [picture(rng) for _ in range(count)], model=tiny), []
    joined = icas._marked_prompts
    monkeypatch.setattr(icas, "_marked_prompts", lambda m, r, without=frozenset(): asked.append(set(without)) or joined(m, r, without))
    images = {s.image for s in references.normals}
    assert len(icas._known_good(tiny, references).scores) == (count if count > 1 else 4)
    assert asked.pop() == set() and len(asked) == min(count, 8) and set.union(*asked) == images and sum(map(len, asked)) == len(images)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_references_survive_a_file_and_a_sum(tiny, rng, tmp_path):
    image, shots, good = picture(rng), [(picture(rng), blob(), "scratch"), (picture(rng, 30, 50), blob(30, 50), "défaut")], picture(rng)
    whole = icas.encode(shots, [good], model=tiny)
    whole.save(tmp_path / "r.safetensors")
    loaded = icas.References.load(tmp_path / "r.safetensors")
    assert len(loaded) == 3 and loaded.labels == ["défaut", "scratch"] and loaded.blocks == (2, 3, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["r.safetensors"]           # no half-written file beside it
    total = icas.References() + icas.encode(shots[:1], model=tiny) + icas.encode(shots[1:], [good], model=tiny)
    expected = icas.segment(image, whole, model=tiny)
    for other in (loaded, total):
        np.testing.assert_allclose(icas.segment(image, other, model=tiny).score, expected.score, atol=2e-3)   # another memory layout moves the last bits
    for a, b in zip(loaded.shots, whole.shots, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True)) and a.label == b.label
    assert icas.detect(image, loaded, model=tiny).score == pytest.approx(icas.detect(image, whole, model=tiny).score, abs=2e-3)


def test_references_of_another_encoder_are_refused(tiny, rng, references):
    for other in (icas.References(references.shots, "another", references.blocks), icas.References(references.shots, "tiny", (1, 4))):
        for use in (lambda r: icas.segment(picture(rng), r, model=tiny), lambda r: icas.detect(picture(rng), r, model=tiny),
                    lambda r: references + r):
            with pytest.raises(ValueError, match="references: .*encode"):
                use(other)


def test_a_checkpoint_finds_its_encoder_by_hash_and_gives_the_same(tiny, rng, checkpoint):
    save_file({"x": torch.zeros(1)}, checkpoint.with_name("a_foreign.safetensors"))
    shutil.copy(checkpoint.with_name("encoder.safetensors"), checkpoint.with_name("z.safetensors"))
    checkpoint.with_name("encoder.safetensors").unlink()
    model = icas.load(checkpoint, device="cpu")
    assert not model.training and model.config == tiny.config and not any(p.requires_grad for p in model.parameters())
    image, shot, good = picture(rng), (picture(rng), blob()), picture(rng)
    a, b = (icas.segment(image, anomalies=[shot], normals=[good], model=m).score for m in (tiny, model))
    np.testing.assert_allclose(a, b, atol=0.02)                                # the trained part is stored in fp16
    icas.save(model, checkpoint.with_name("again.safetensors"))
    again = icas.load(str(checkpoint.with_name("again.safetensors")), encoder=checkpoint.with_name("z.safetensors"), device="cpu")
    same(icas.segment(image, anomalies=[shot], model=model), icas.segment(image, anomalies=[shot], model=again))


def test_an_encoder_of_another_hash_is_refused(tiny, checkpoint):
    other = checkpoint.with_name("other.safetensors")
    save_file({k: v + 1 for k, v in tiny.encoder.state_dict().items()}, other)
    with pytest.raises(ValueError, match="encoder: .*SHA-256"):
        icas.load(checkpoint, encoder=other)
    checkpoint.with_name("encoder.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="encoder: no file with SHA-256"):
        icas.load(checkpoint)


def test_a_checkpoint_alone_in_its_folder_finds_the_shipped_encoder(tmp_path):
    """What `train.py --init OUT/last.safetensors` and `evaluate.py --model` need: a run's folder holds no encoder."""
    shutil.copy(HOME / "checkpoints" / icas.CHECKPOINT, tmp_path / "last.safetensors")
    assert icas.load(tmp_path / "last.safetensors").encoder_sha256 == icas.load(icas._shipped_path()).encoder_sha256


def test_the_file_works_when_copied_under_another_name(tiny, rng, checkpoint, tmp_path):
    shutil.copy(HOME / "icas.py", tmp_path / "other_name.py")
    image, shot = picture(rng), picture(rng)
    np.savez(tmp_path / "in.npz", image=image, shot=shot, mask=blob())
    (tmp_path / "use.py").write_text(
        "import sys, numpy, torch\ntorch.set_num_threads(1)\nimport other_name as m\nassert 'icas' not in sys.modules\n"
        "m.ENCODERS['tiny14'] = (48, 4, 3)\ngiven = numpy.load('in.npz')\n"
        f"model = m.load({str(checkpoint)!r}, device='cpu')\n"
        "numpy.save('out.npy', m.segment(given['image'], anomalies=[(given['shot'], given['mask'])], model=model).score)\n")
    environment = {k: v for k, v in ENV.items() if k != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "", run.stderr
    expected = icas.segment(image, anomalies=[(shot, blob())], model=icas.load(checkpoint, device="cpu"))
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected.score, atol=1e-5)


def test_importing_does_nothing():
    code = """
import sys, torch, numpy, scipy.optimize, safetensors.torch, einops
before = set(sys.modules)
torch.manual_seed(3); numpy.random.seed(3)
states = torch.get_rng_state(), numpy.random.get_state()[1].copy(), torch.get_default_dtype(), torch.is_grad_enabled()
import icas
assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == numpy.random.get_state()[1]).all()
assert states[2:] == (torch.get_default_dtype(), torch.is_grad_enabled())
new = {m.split('.')[0] for m in set(sys.modules) - before}
assert not new & {'PIL', 'tqdm', 'pycocotools', 'sklearn', 'transformers', 'kornia', 'matplotlib', 'argparse', 'elpv_dataset'}, new
"""
    run = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_compiled_gives_what_eager_gives(rng, checkpoint, monkeypatch):
    # the graphs that Dynamo captures, without inductor's C++ code for them: that takes a minute to build
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: plain(self, backend="eager"))
    eager, compiled = icas.load(checkpoint, device="cpu"), icas.load(checkpoint, device="cpu", compile=True)
    assert eager.encoder._compiled_call_impl is None and compiled.encoder._compiled_call_impl and compiled.decoder._compiled_call_impl
    image, shots = picture(rng), {"anomalies": [(picture(rng), blob())]}
    got = icas.segment(image, model=compiled, **shots).score
    np.testing.assert_allclose(got, icas.segment(image, model=eager, **shots).score, atol=1e-4)
