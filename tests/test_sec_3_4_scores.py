"""Sec. 3.4: every score against its equation in NumPy float64 loops."""
import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

import icas

unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def a_prompt(tokens, foreground, background=None, **others):
    """A prompt of the same tokens and shares at every level; tokens (1, R, D), shares (1, R)."""
    background = 1 - foreground if background is None else background
    neck = torch.zeros(1, tokens[0].shape[1], 32), foreground, background
    made = icas.Prompt(tokens, [foreground] * len(tokens), [background] * len(tokens),
                       [icas.fisher_direction(t, foreground, background) for t in tokens],
                       [torch.tensor([0.1])] * len(tokens), neck)
    return made._replace(**others)


@pytest.fixture
def case(tiny, rng):
    """One target of 2 x 3 tokens, K = 5, with everything that `mask_scores` reads."""
    config, k, h0, w0 = tiny.config, 5, 2, 3
    t = lambda *shape: torch.from_numpy(rng.normal(size=shape)).float()  # noqa: E731
    decoded = icas.Decoded([t(1, k, config.dim)], [t(1, 4, config.dim)],
                           t(1, config.pixel_dim, 4 * h0, 4 * w0))
    tokens = icas.F.normalize(t(1, h0 * w0, 48), dim=-1)
    reference = [icas.F.normalize(t(1, 7, 48), dim=-1) for _ in config.blocks]
    foreground = torch.tensor([[0.0, 0.2, 1.0, 0.7, 0.0, 0.0, 0.1]])
    return tiny, decoded, tokens, a_prompt(reference, foreground)


def by_hand(model, decoded, tokens, prompt, reference_masks=None):
    """S_s, S_s^mfm, S_n, S_n^mfm over what the masks claim, and the printed sums.

    Departures 12 and 13: each mask counts by how little it is background, the temperature is 0.07.
    """
    content = decoded.content[-1][0].double().numpy()
    classes = decoded.classes[-1][0].double().numpy()
    scale = min(100, float(model.decoder.class_scale.detach().double().exp()))
    cosine = scale * unit(content) @ unit(classes).T
    # over {Q_p, Q_ntp, Q_bg} and {Q_fg, Q_ntp, Q_bg}
    p, n = softmax(cosine[:, [0, 1, 3]]), softmax(cosine[:, [2, 1, 3]])
    embedded = model.decoder.mask_embed(decoded.content[-1])[0].detach().double().numpy()
    pixels = decoded.pixels[0].double().numpy()
    masks = 1 / (1 + np.exp(-np.einsum("kp,phw->khw", embedded, pixels)))
    k, h, w = masks.shape
    coarse = masks.reshape(k, h // 4, 4, w // 4, 4).mean(axis=(2, 4)).reshape(k, -1)
    target = tokens[0].double().numpy()
    pooled = unit(np.stack([(m[:, None] * target).sum(axis=0) / m.sum() for m in coarse]))
    last = len(model.config.blocks) - 1
    reference = prompt.tokens[last][0].double().numpy()
    share = prompt.foreground[last][0].double().numpy()
    q_p = unit((share[:, None] * reference).sum(axis=0))
    q_ntp = unit(((1 - share)[:, None] * reference).sum(axis=0))
    q_r = q_ntp[None] if reference_masks is None else reference_masks[0].double().numpy()
    sums, plain = np.zeros((6, h, w)), np.zeros((4, h, w))
    for i in range(k):
        a, b = np.exp(pooled[i] @ q_p / 0.07), np.exp(pooled[i] @ q_ntp / 0.07)
        far = min(1 - pooled[i] @ q for q in q_r)
        ws, wn = 1 - p[i, 2], 1 - n[i, 2]
        for s, value in enumerate((p[i, 0], ws * a / (a + b), ws, n[i, 0], wn * far, wn)):
            sums[s] += value * masks[i]
        plain[0] += p[i, 0] * masks[i]
        plain[1] += a / (a + b) * masks[i]
        plain[2] += n[i, 0] * masks[i]
        plain[3] += far * masks[i]
    return sums[0] / sums[2], sums[1] / sums[2], sums[3] / sums[5], sums[4] / sums[5], plain


@pytest.mark.parametrize("with_normals", [False, True])
def test_every_score_equals_its_equation(case, rng, with_normals):
    model, decoded, tokens, prompt = case
    normals = torch.from_numpy(unit(rng.normal(size=(1, 9, 48)))).float() if with_normals else None
    got = icas.mask_scores(model.decoder, decoded, tokens, prompt, normals)
    expected = by_hand(model, decoded, tokens, prompt, normals)
    for one, other in zip(got.values(), expected[:4], strict=True):
        np.testing.assert_allclose(one[0].numpy(), other, rtol=2e-4, atol=1e-6)
    assert 0 <= got["S_s"].min() and got["S_s"].max() <= 1


def test_with_plain_sum_the_scores_are_the_printed_sums(case, monkeypatch):
    model, decoded, tokens, prompt = case
    printed = dataclasses.replace(model.config, plain_sum=True)
    monkeypatch.setattr(model.decoder, "config", printed)
    got = icas.mask_scores(model.decoder, decoded, tokens, prompt)
    for one, other in zip(got.values(), by_hand(*case)[-1], strict=True):
        np.testing.assert_allclose(one[0].numpy(), other, rtol=2e-4, atol=1e-6)


def test_claimed_is_zero_where_masks_claim_nothing_and_the_plain_sum_is_as_printed(rng):
    values, weights, masks = rng.random((1, 3)), np.zeros((1, 3)), rng.random((1, 3, 2, 2))
    t = [torch.from_numpy(x) for x in (values, weights, masks)]
    assert not icas.claimed(*t).any()
    printed = sum(values[0, i] * masks[0, i] for i in range(3))
    np.testing.assert_allclose(icas.claimed(*t, plain_sum=True)[0].numpy(), printed)


def test_matching_equals_loops(rng):
    target, reference = unit(rng.normal(size=(2, 6, 8))), unit(rng.normal(size=(1, 9, 8)))
    # shares: a token stands for the prompt from a half on, for the rest if it is all but free of it
    share = np.array([1, 0.5, 0.8, 0.4, 0.002, 0.0005, 0, 0, 0])
    near, free = share >= 0.5, share <= 0.001
    best = np.zeros((2, 2, 6))
    for b, i in np.ndindex(2, 6):
        cosines = np.array([target[b, i] @ r for r in reference[0]])
        best[:, b, i] = max(cosines[near]), max(cosines[free])
    prompt = a_prompt([torch.from_numpy(reference)], torch.from_numpy(share)[None])
    got = icas.match_tokens(torch.from_numpy(target), prompt, 0)
    np.testing.assert_allclose(got.best_fg.numpy(), best[0], atol=1e-6)
    np.testing.assert_allclose(got.best_bg.numpy(), best[1], atol=1e-6)
    inside = (share[:, None] * reference[0]).sum(axis=0) / share.sum()
    outside = reference[0][free].mean(axis=0)
    np.testing.assert_allclose(got.mean_fg.numpy(), target @ unit(inside), atol=1e-6)
    np.testing.assert_allclose(got.mean_bg.numpy(), target @ unit(outside), atol=1e-6)
    direction = prompt.fisher[0][0, :, 0].numpy()
    fisher = (target - (inside + outside) / 2) @ direction
    np.testing.assert_allclose(got.fisher.numpy(), fisher.clip(-3, 3), atol=1e-6)
    means = [(m - (inside + outside) / 2) @ direction for m in (inside, outside)]
    np.testing.assert_allclose(means, [0.5, -0.5], atol=1e-6)


def test_matching_with_good_parts_alone_says_nothing_of_a_foreground(rng):
    tokens = torch.from_numpy(unit(rng.normal(size=(1, 9, 8))))
    got = icas.match_tokens(tokens, a_prompt([tokens], torch.zeros(1, 9, dtype=tokens.dtype)), 0)
    assert not (got.best_fg.any() or got.mean_fg.any() or got.fisher.any())
    np.testing.assert_allclose(got.best_bg.numpy(), 1, atol=1e-6)


def test_fisher_s_direction_solves_its_equation_and_sets_the_means_one_apart(rng):
    reference = unit(rng.normal(size=(1, 40, 6)))
    foreground = (np.arange(40) < 10)[None].astype(float)
    sides = reference[0, :10], reference[0, 10:]
    gap = sides[0].mean(axis=0) - sides[1].mean(axis=0)
    scatter = sum((s - s.mean(axis=0)).T @ (s - s.mean(axis=0)) for s in sides) / 40
    expected = np.linalg.solve(scatter + (0.03 * np.trace(scatter) + 1e-6) * np.eye(6), gap)
    t = [torch.from_numpy(x) for x in (reference, foreground, 1 - foreground)]
    got = icas.fisher_direction(*t)[0, :, 0].numpy()
    np.testing.assert_allclose(got, expected / (expected @ gap), rtol=1e-6)


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("detail", [True, False])
def test_relations_equal_loops(rng, marked, detail):
    """Two blocks, which are averaged, and with `detail` a finer level."""
    grids, size = [(3, 4), (3, 4), (6, 8)][:2 + detail], (6, 8)
    values = [rng.normal(size=(5, h * w)) for h, w in grids]
    matches = [icas.Matching(*torch.from_numpy(v).float()[:, None]) for v in values]
    share = torch.tensor([[0.0, 0.5, 1.0, 0.1]]) * marked
    tokens = [icas.F.normalize(torch.from_numpy(rng.normal(size=(1, 4, 5))).float(), dim=-1)] * 3
    usual = [0.3, np.inf, 0.02]
    prompt = a_prompt(tokens, share, usual=[torch.tensor([u]) for u in usual])
    got = icas.relations(matches, grids, prompt, size, 2)[0].numpy()
    levels = []
    for (best_fg, best_bg, mean_fg, mean_bg, fisher), grid, u in zip(values, grids, usual):
        far = np.log(np.maximum(1.01 - best_bg, 0.01)) - np.log(0.01 + u)
        far = np.zeros_like(far) if u == np.inf else far.clip(-2, 2)
        maps = [4 * (best_fg - best_bg), 4 * (mean_fg - mean_bg), fisher, far]
        for x in (best_fg - best_bg, fisher, 1 - best_bg):
            maps.append((x - x.mean()) / (x.std() + 1e-3))
        levels.append([resize(x.reshape(grid), size) for x in maps])
    blocks = (np.array(levels[0]) + np.array(levels[1])) / 2
    expected = [*blocks, *(levels[2] if detail else np.zeros_like(blocks))]
    expected += [np.full(size, x) for x in ((1, np.log10(0.4 + 1e-4)) if marked else (0, 0))]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_the_detail_counts_half_at_four_marked_tokens_a_view_and_little_beyond():
    def weight(*areas):   # each of tokens that are full, and a last one that is not
        return icas.detail_weight([torch.tensor([1.0] * int(x) + [x % 1]) for x in areas])
    assert weight(4) == weight(*[4] * 8) == weight(2, 6) == 0.5 and weight() == 0
    assert weight(0.0) == 1 > weight(1) > weight(4) > weight(30) > 0
    assert weight(8) == weight(4, 12) == pytest.approx(1 / 17)


@pytest.mark.parametrize("share, expected", [(0.2, 256 / 257), (0.4, 1 / 2), (0.8, 1 / 257)])
def test_a_long_thin_mark_counts_as_a_small_one(share, expected):
    line = torch.zeros(28, 28)
    line[:, 9] = share   # a crack through the picture: many tokens, each filled a little
    weight = icas.detail_weight([line])
    assert weight == pytest.approx(max(expected, 1 / (1 + (28 * share / 4) ** 4)))
    assert icas.detail_weight([line, line]) == pytest.approx(weight)


def top(values):
    return np.sort(values.ravel())[-3:].mean()


def resize(array, size):
    return icas.F.interpolate(torch.from_numpy(array)[None, None], size=size,
                              mode="bilinear")[0, 0].numpy()


def test_detection_weighs_its_levels_by_what_they_see_of_damage(tiny, rng, monkeypatch):
    monkeypatch.setattr(icas, "fast_bf16", lambda device: False)
    goods = [rng.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(3)]
    image = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)

    def levels(features, half):
        """The tapped blocks, debiased, and the detail at strides 8 and 16, once at twice the
        side; references are kept in float16."""
        maps, detail = features.maps, features.detail
        if half:
            maps, detail = maps.half().float(), detail.half().float()
        found = {f"block {number}": block[0].double().numpy()
                 for number, block in zip(tiny.config.blocks, tiny.tokens(maps))}
        fine = icas.F.avg_pool2d(tiny.look_closer(features).float(), 2)
        for name, x in (("detail", detail), ("fine detail", fine)):   # channels 48 + 88 + 120
            found[name] = unit(x[0].flatten(1).T.double().numpy()[:, 24:])
        return found
    encoded = [icas.encode_image(picture, model=tiny).features for picture in (*goods, image)]
    shown = [levels(features, half=i < 3) for i, features in enumerate(encoded)]
    tokens = {name: [x[name] for x in shown] for name in shown[0]}

    def distances(of, others):
        return (1 - of @ np.concatenate(others).T).min(axis=1)

    def left_out(i, seen):
        return [max(1e-3, top(distances(seen[name], [x[j] for j in range(3) if j != i])))
                for name, x in tokens.items()]
    own = np.array([left_out(i, shown[i]) for i in range(3)]).T
    random, gains = np.random.default_rng(0), []
    references = icas.encode(normals=goods, turns=False, model=tiny)
    order = sorted(range(3), key=lambda i: references.shots[i].image)
    for i in order * 5 + order[:1]:   # sixteen damaged copies, each against the other parts
        pixels = icas.cut_paste(encoded[i].picture, random)
        damaged = icas.encode_pixels(pixels, pixels.shape[:2], tiny).features
        gains.append(np.log(left_out(i, levels(damaged, half=False)) / own[:, i]))
    typical = np.median(own, axis=1)
    weights = np.maximum(np.mean(gains, axis=0), 1e-3) / typical
    weights /= weights.sum()
    assert weights.min() < 0.5 / len(weights)   # it matters
    new = [distances(x[3], x[:3]) / t for x, t in zip(tokens.values(), typical)]
    found = icas.detect(image, references, parts=True, false_positive_rate=0.05, model=tiny)
    assert found.parts == pytest.approx(dict(zip(tokens, map(top, new))), rel=5e-3)
    assert found.score == pytest.approx(weights @ [*map(top, new)], rel=5e-3)
    maps = [w * resize(x.reshape(n, n), (32, 32))
            for w, x, n in zip(weights, new, (8, 8, 8, 14, 14))]
    whole = np.sum(maps, axis=0)   # whose top percent has the score as mean
    np.testing.assert_allclose(found.map, resize(whole * found.score / top(whole), (40, 40)),
                               rtol=0.02)
    # Student's t; the median deviation is shrunk towards 20 % of the median, as of 8 more parts
    scores, freedom = weights @ (own / typical[:, None]), 8 + 3 - 1
    low, middle, high = np.sort(scores)
    deviation = 1.4826 * np.sort([middle - low, 0, high - middle])[1]
    spread = (8 * (0.2 * middle) ** 2 + 2 * deviation ** 2) / freedom
    quantile = scipy.stats.t.ppf(0.95, freedom)
    cut = middle + quantile * np.sqrt(spread * (1 + 1 / 3))
    assert found.threshold == pytest.approx(cut, rel=5e-3)


def test_damage_is_a_piece_of_the_part_itself_elsewhere():
    picture = torch.arange(3 * 90 * 160).reshape(1, 3, 90, 160)
    changed, areas = [], []
    for seed in range(40):
        pixels = icas.cut_paste(picture, np.random.default_rng(seed))
        assert pixels.shape == (90, 160, 3)
        where = (pixels != picture[0].permute(1, 2, 0)).any(dim=2)
        y, x = where.nonzero().T
        assert where[y.min():y.max() + 1, x.min():x.max() + 1].all()   # one rectangle
        first = pixels[y.min(), x.min(), 0].item()   # which names the place it came from
        size = (y.max() - y.min() + 1, x.max() - x.min() + 1)
        top, left = divmod(first, 160)
        assert torch.equal(pixels[where], picture[0].permute(1, 2, 0)[
            top:top + size[0], left:left + size[1]].flatten(0, 1))
        areas.append(float(size[0] * size[1]) ** 0.5 / 160)
    assert 1 / 90 < min(areas) < 1 / 40 and 1 / 20 < max(areas) < 1 / 8
    assert picture.flatten()[-1] == 3 * 90 * 160 - 1   # the part itself is as it was


def test_without_good_parts_each_picture_is_compared_with_the_nearest_of_the_others(
        tiny, rng, monkeypatch):
    monkeypatch.setattr(icas, "fast_bf16", lambda device: False)
    images = [rng.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(8)]
    images += [images[0].copy()]   # 8 others, of the first 7, for a copy is not another
    tokens = [tiny.tokens(icas.encode_image(i, model=tiny).features.maps.half().float())[0][0]
              for i in images]
    found = icas.detect(images, parts=True, model=tiny)
    assert len(found) == 9 and found[0].score == pytest.approx(found[8].score, abs=1e-5)

    def score(i):
        best = [(1 - tokens[i] @ t.T).amin(dim=1) for j, t in enumerate(tokens) if j != i]
        nearest = torch.stack(best).sort(dim=0).values[:2]   # 30 % of 8
        return icas.top_mean(nearest.mean(dim=0)).item()
    scores = np.array([score(i) for i in range(9)])
    for i in range(1, 8):
        assert found[i].parts["block 2"] == pytest.approx(scores[i] / np.median(scores), rel=0.02)
    ready = icas.mutual(images, model=tiny)
    assert icas.detect(images[3], ready).score == pytest.approx(found[3].score)


def test_of_many_pictures_the_same_31_are_compared_with(tiny, rng):
    images = [rng.integers(0, 256, (14, 14, 3), dtype=np.uint8) for _ in range(40)]
    one, two = (icas.mutual(images, model=tiny).images for _ in range(2))
    assert one == two and len(one) == 31


def test_too_few_pictures_to_compare_are_refused(tiny, rng, tmp_path):
    images = [rng.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(5)]
    for given in (images, [*images, tmp_path / "missing.png"]):
        with pytest.raises(ValueError, match="normals: none given.*at least six .* got 5"):
            icas.detect(given, model=tiny)
    with pytest.raises(FileNotFoundError, match=r"images\[2\]: no file"):
        icas.detect([*images[:2], tmp_path / "missing.png", *images, images[0]], model=tiny)


def test_the_image_score_is_the_mean_of_the_three_highest(rng):
    values = rng.random((1, 20, 20))
    expected = np.sort(values.ravel())[-3:].mean()
    assert icas.top_mean(torch.from_numpy(values)).item() == pytest.approx(expected)
    assert icas.top_mean(torch.tensor([[[0.25, 0.5]]])).item() == 0.375


def test_the_threshold_rises_as_fewer_false_alarms_are_allowed_and_falls_with_more_parts(rng):
    scores = rng.normal(1, 0.05, 40)
    cuts = [icas.upper_limit(scores, rate) for rate in (0.2, 0.05, 0.01)]
    assert cuts[0] < cuts[1] < cuts[2]
    same, limit = [1.1, 0.9] * 10, icas.upper_limit
    assert limit(same[:2], 0.01) > limit(same[:4], 0.01) > limit(same, 0.01)
    assert (scores > cuts[2]).mean() <= 0.05


def test_one_odd_good_part_does_not_decide_on_the_threshold():
    alike = [0.95, 1.0, 1.05, 1.0, 0.97, 1.03]
    usual = icas.upper_limit(alike, 0.05)
    assert icas.upper_limit([*alike, 9.0], 0.05) == pytest.approx(usual, rel=0.1)


def test_the_rate_of_false_positives_is_the_threshold_read_backwards(rng):
    for count in (2, 4, 40):
        scores = rng.normal(1, 0.1, count)
        for rate in (0.5, 0.2, 0.01, 0.001):
            cut = icas.upper_limit(scores, rate)
            assert icas.false_positives(scores, cut) == pytest.approx(rate)
    assert icas.false_positives([1.0, 1.1], 99) < 1e-6
    assert icas.false_positives([1.0, 1.1], -99) > 1 - 1e-6


# ---- segment leaves alone what looks like good parts (ours) --------------------------------------

def test_a_region_that_is_nowhere_novel_falls_below_zero_and_the_rest_stays(rng):
    odds = torch.from_numpy(rng.normal(size=(20, 20)).astype(np.float32) - 5)
    odds[2:6, 2:6], odds[10:15, 10:15], odds[18, 18] = 3, 2, 1
    novelty = torch.full((20, 20), 0.5)
    novelty[12, 12] = 1.5   # one novel pixel keeps a region
    found = icas.leave_good(odds, novelty)
    expected = odds.clone()
    expected[2:6, 2:6] = expected[18, 18] = 4 * (0.5 - 1)
    torch.testing.assert_close(found, expected)


def test_four_good_parts_keep_segment_off_what_looks_like_them_and_three_do_not(tiny, rng):
    good = [rng.integers(100, 130, (90, 60, 3), dtype=np.uint8) for _ in range(4)]
    blocks = rng.integers(0, 2, (9, 6, 3), dtype=np.uint8)
    bad = np.kron(blocks, np.full((10, 10, 1), 255, np.uint8))
    mask = np.zeros((90, 60), bool)
    mask[20:40, 10:30] = True
    for count in (3, 4):
        ready = icas.prepare(icas.encode([(bad, mask)], good[:count], model=tiny), model=tiny)
        plain = icas.label_parts(ready, icas.encode_image(good[0], model=tiny), "defect")["icas"]
        raised = torch.full_like(plain, 2.0)   # as if all of it looked like the defect
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(icas, "label_parts", lambda *a, **k: {"icas": raised.clone()})
            one, other = icas.segment([good[0], bad], ready, model=tiny)
        assert one.is_anomalous == (count < 4) and other.is_anomalous
        assert (one.maps == 2).all() == (count < 4)


# ---- how far tokens are from all background (ours) -----------------------------------------------

def test_the_usual_distance_is_that_of_an_image_s_own_background_without_neighbours(rng):
    h, w = 14, 9   # 14 / 13 is one token of neighbourhood
    tokens = unit(rng.normal(size=(h * w, 6)))
    background = rng.random((h, w)) > 0.3
    places = [(y, x) for y in range(h) for x in range(w) if background[y, x]]
    nearest = [max(tokens[y * w + x] @ tokens[v * w + u] for v, u in places
                   if max(abs(y - v), abs(x - u)) > 1) for y, x in places]
    outside = torch.from_numpy(background).float()
    few, none = outside * (torch.arange(w) < 2), torch.zeros(h, w)
    sides = [torch.stack(s) for s in ((1 - outside, outside), (1 - few, few), (none, outside))]
    found = icas.usual_distance(torch.from_numpy(tokens).float().expand(3, -1, -1),
                                torch.stack(sides))
    assert found[0].item() == pytest.approx(1 - np.quantile(nearest, 0.01), abs=1e-5)
    assert found[1:].isinf().all()   # too little background; nothing is marked


@pytest.mark.parametrize("side", [6, 12, 15, 40])
def test_novelty_is_the_detail_s_and_counts_more_for_small_marks(tiny, rng, side, monkeypatch):
    monkeypatch.setattr(icas, "fast_bf16", lambda device: False)
    images = [rng.integers(0, 256, (60, 60, 3), dtype=np.uint8) for _ in range(2)]
    mask = np.zeros((60, 60), bool)
    mask[20:20 + side, 10:10 + side] = True
    references = icas.encode([(images[0], mask)], model=tiny)
    prompt = icas.prepare(references, model=tiny).prompt("defect")
    target = images[1] // (32 if side == 40 else 1)   # that one is of another light
    features = icas.encode_image(target, model=tiny).features
    with_it = icas.score_parts(tiny, features, prompt)
    unknown = [torch.full((1,), np.inf)] * len(prompt.usual)
    without = icas.score_parts(tiny, features, prompt._replace(usual=unknown))
    own = tiny.levels(references.shots[0].features.to("cpu", torch.float32), prompt.scales)[-1]
    shown = icas.F.avg_pool2d(references.shots[0].sides[1], 4 // prompt.scales[-1])
    assert prompt.usual[-1].item() == pytest.approx(icas.usual_distance(own, shown[None]).item())
    seen, known = tiny.levels(features, prompt.scales)[-1][0], prompt.background[-1][0] > 0.999
    distance = 1.01 - (seen @ prompt.tokens[-1][0, known].T).amax(dim=1)
    ratio = (distance.clamp_min(0.01) / (0.01 + prompt.usual[-1])).log().clamp(-2, 2)
    grid, added = tiny.grids(features, prompt.scales)[-1], with_it["novelty"]
    expected = torch.from_numpy(resize(ratio.view(grid).numpy(), (32, 32)))
    torch.testing.assert_close(added, expected, atol=0.02, rtol=0.01)
    plain = [x["icas"] - 0.2 * (x["S_s"] + x["S_s mfm"])
             for x in (with_it, without)]   # the decoder sees it too
    share = float((ratio > 0).float().mean())
    assert (share > 0.1) == (side == 40)
    trust = (torch.where(added > 0, 3, 1.5) + prompt.weight) * min(1, 0.1 / max(share, 1e-9))
    torch.testing.assert_close(plain[0] - plain[1], trust * added, atol=1e-4,
                               rtol=1e-4)
    assert "novelty" not in without and prompt.scales == {15: (2,), 40: (1,)}.get(side, (4, 2))


def guided(odds, colours, radius, eps):
    """The guided filter as He and Sun print it, window by window, of what lies in the picture."""
    h, w = odds.shape
    clipped, slopes, offsets = odds.clip(-4, 4), np.zeros((h, w, 3)), np.zeros((h, w))

    def window(y, x):
        return tuple(slice(max(0, n - radius), n + radius + 1) for n in (y, x))
    for y, x in np.ndindex(h, w):
        seen, values = colours[window(y, x)].reshape(-1, 3), clipped[window(y, x)].ravel()
        scatter = np.cov(seen.T, bias=True) + eps * np.eye(3)
        gap = ((seen - seen.mean(0)) * (values - values.mean())[:, None]).mean(0)
        slopes[y, x] = np.linalg.solve(scatter, gap)
        offsets[y, x] = values.mean() - slopes[y, x] @ seen.mean(0)
    means = [[x[window(*place)].mean(axis=(0, 1)) for place in np.ndindex(h, w)]
             for x in (slopes, offsets)]
    return np.reshape(means[0], (h, w, 3)), np.reshape(means[1], (h, w))


def test_marks_follow_the_picture_s_edges_as_the_guided_filter_does(rng):
    h, w = 18, 23
    picture = torch.from_numpy(rng.integers(0, 256, (1, 3, 4 * h, 4 * w), dtype=np.uint8))
    odds = torch.from_numpy(rng.normal(0, 4, (h, w)).astype(np.float32))
    fine = picture[0].float().view(3, 2 * h, 2, 2 * w, 2).mean(dim=(2, 4)).numpy() / 255
    small = fine.reshape(3, h, 2, w, 2).mean(axis=(2, 4)).transpose(1, 2, 0)
    slopes, offsets = guided(odds.numpy(), small, 5, 2e-4)
    lines = np.concatenate([slopes, offsets[..., None]], axis=2).transpose(2, 0, 1)
    lines = np.stack([resize(x, (2 * h, 2 * w)) for x in lines])
    edges = (lines[:3] * fine).sum(axis=0) + lines[3]
    plain = resize(odds.numpy(), (2 * h, 2 * w))
    for share in (0.0, 0.6, 1.0):
        found = icas.follow_edges(odds, picture, share).numpy()
        np.testing.assert_allclose(found, (1 - share) * plain + share * edges, atol=2e-3)


def test_a_mark_that_spills_over_an_edge_is_drawn_back_to_it():
    picture = torch.full((1, 3, 160, 160), 60, dtype=torch.uint8)
    picture[..., :80] = 190
    odds = torch.full((40, 40), -3.0)
    odds[:, :20], odds[:, 20:22] = 3.0, 1.0   # two cells too far, less sure
    truth = (torch.arange(80) < 40).expand(80, 80)
    plain = F.interpolate(odds[None, None], (80, 80), mode="bilinear")[0, 0] > 0
    found = icas.follow_edges(odds, picture, 0.6) > 0
    assert (plain != truth).float().mean() > 0.03
    assert (found != truth).float().mean() < 0.01
    flat = torch.full_like(picture, 100)   # without an edge nothing moves far
    assert ((icas.follow_edges(odds, flat, 0.6) > 0) != plain).float().mean() < 0.02


def test_edges_count_as_far_as_colours_tell_the_mark_in_its_own_picture(rng):
    side, mark = 30, torch.zeros(30, 30)
    mark[12:15, 10:14] = torch.from_numpy(rng.random((3, 4), np.float32))
    noise = torch.from_numpy(rng.integers(0, 256, (1, 3, side, side), dtype=np.uint8))
    own = noise // 8   # dark, and where it is marked bright
    own = torch.where(mark > 0, (255 * mark).to(torch.uint8), own)
    assert icas.edge_share(mark, own) == 0.75 > icas.edge_share(mark, noise) == 0
    half = torch.where(mark > 0, (100 * mark).to(torch.uint8), noise // 4)
    lines = guided(mark.numpy(), half[0].permute(1, 2, 0).numpy() / 255, 5, 2e-4)
    told = (lines[0] * half[0].permute(1, 2, 0).numpy() / 255).sum(axis=2) + lines[1]
    near = (slice(7, 20), slice(5, 19))   # within five cells of it
    found, truth = told[near], mark.numpy()[near]
    fit = 1 - np.square(found - truth).sum() / np.square(truth - truth.mean()).sum()
    assert 0.3 < fit < 0.7
    assert icas.edge_share(mark, half) == pytest.approx(0.75 * (fit - 0.3) / 0.4, abs=1e-3)
    assert icas.edge_share(torch.ones(8, 8), noise) == 0.75   # all of a picture: no border


def test_the_printed_form_keeps_the_decoder_s_own_map(tiny, rng, monkeypatch):
    image = rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)
    monkeypatch.setattr(tiny, "config", dataclasses.replace(tiny.config, plain_sum=True))
    found = icas.segment(image, points=[(20, 30)], parts=True, model=tiny)
    h0, w0 = icas.token_grid(60, 60, tiny.config)
    assert found.maps.shape == (1, 4 * h0, 4 * w0)
    good = icas.prepare(icas.encode(normals=[image] * 4, model=tiny), model=tiny)
    marked = icas.prepare(icas.encode([(image, (5, 5, 20, 20))], model=tiny), model=tiny)
    for ready, side, label in ((marked, "S_s", "defect"), (good, "S_n", "")):
        parts = icas.score_parts(tiny, icas.encode_image(image, model=tiny).features,
                                 ready.prompt(label), ready.reference_masks)
        one, other, both = (parts[name].exp() / 2 for name in (side, f"{side} mfm", "icas"))
        torch.testing.assert_close(both, one + other, atol=3e-4, rtol=1e-4)   # each at least 1e-4
        found = icas.segment(image, ready, parts=True)
        torch.testing.assert_close(torch.from_numpy(found.maps[0]), parts["icas"])
        assert (found.mask == (found.parts["icas"] > 0)).mean() > 0.99 and both.max() > 0.1


def test_clicks_and_good_parts_alone_have_no_novelty(tiny, rng):
    image = rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)
    good = icas.prepare(icas.encode(normals=[image], model=tiny), model=tiny)
    found = icas.segment(image, points=[(30, 30)], parts=True, model=tiny)
    assert good.prompt("").usual[-1].isinf() and "novelty" not in found.parts


def test_what_is_usual_is_the_mean_of_the_images_that_tell(tiny, rng):
    images = [rng.integers(0, 256, (60, 60, 3), dtype=np.uint8) for _ in range(2)]
    small, large = (images[0], (20, 20, 30, 30)), (images[1], (0, 0, 60, 55))

    def usual(*marked):
        prompt = icas.prepare(icas.encode(list(marked), model=tiny), model=tiny).prompt("defect")
        return prompt.usual[0]
    assert usual(large).isinf() and usual(small).isfinite()
    torch.testing.assert_close(usual(small, large), usual(small))


def test_clicks_keep_a_background_where_a_first_look_is_sure_of_nothing():
    marks = icas.mark_sides((40, 40), [(20, 20)], None, None, None)
    foreground, background = icas.join_sure(marks, np.zeros((40, 40), np.float32))
    assert torch.equal(background, marks[1]) and background.any()
    assert torch.equal(foreground, marks[0])


def test_a_picture_that_is_marked_and_among_the_good_ones_counts_as_marked(tiny, rng):
    image, other = (rng.integers(0, 256, (60, 60, 3), dtype=np.uint8) for _ in range(2))
    marked = icas.encode([(image, (20, 20, 30, 30))], model=tiny)
    both = [icas.prepare(marked + icas.encode(normals=normals, model=tiny), model=tiny)
            for normals in ([other], [image, other])]
    one, two = (ready.prompt("defect") for ready in both)
    assert one.good == two.good == 1
    assert all(torch.equal(a, b) for a, b in zip(one.tokens, two.tokens))


def test_with_four_good_parts_a_picture_that_is_marked_too_is_none_of_them(tiny, rng):
    image, *good = (rng.integers(0, 256, (60, 60, 3), dtype=np.uint8) for _ in range(5))
    shown = [(image, (20, 20, 30, 30), "a"), (good[0], (5, 5, 20, 20), "b")]
    for few in (good[1:3], good[1:]):   # with the two that are marked, four at least
        found = [icas.segment(image, anomalies=shown, normals=normals, model=tiny).maps
                 for normals in (few, [image, good[0], *few])]
        np.testing.assert_array_equal(*found)
        ready = icas.prepare(icas.encode(shown, [image, *few], model=tiny), model=tiny)
        assert len(ready.images) == len(few) and len(ready.good.scores) == len(few)
    with pytest.raises(ValueError, match="detect needs at least one good part"):
        icas.detect(image, icas.encode(shown, [image], model=tiny), model=tiny)
