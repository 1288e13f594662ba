"""Sec. 3.4: every score against its equation in NumPy float64 loops."""
import numpy as np
import pytest
import torch

import icas

unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.fixture
def case(tiny, rng):
    """One target of 2 x 3 tokens, K = 5, with everything that `score` reads."""
    config, k, h0, w0 = tiny.config, 5, 2, 3
    t = lambda *shape: torch.from_numpy(rng.normal(size=shape)).float()  # noqa: E731
    decoded = icas.Decoded([t(1, k, config.dim)], [t(1, 4, config.dim)], t(1, config.pixel_dim, 4 * h0, 4 * w0), t(1, 4 * h0, 4 * w0))
    tokens = icas.F.normalize(t(1, h0 * w0, 48), dim=-1)
    reference = [icas.F.normalize(t(1, 7, 48), dim=-1) for _ in config.blocks]
    foreground = torch.tensor([[0.0, 0.2, 1.0, 0.7, 0.0, 0.0, 0.1]])
    prompt = icas.Prompt(reference, t(1, 7, config.dim), foreground, 1 - foreground, torch.eye(icas.PIXEL + 1).repeat(1, 2, 1, 1))
    return tiny, decoded, tokens, prompt, t(1, icas.APPEARANCE, 4 * h0, 4 * w0)


def by_hand(model, decoded, tokens, prompt, reference_masks=None):
    """S_s, S_s^mfm, S_n, S_n^mfm as printed, with the shares of R17 and R18."""
    content, classes = decoded.content[-1][0].double().numpy(), decoded.classes[-1][0].double().numpy()
    scale = min(100, float(model.decoder.class_scale.detach().double().exp()))
    cosine = scale * unit(content) @ unit(classes).T
    p, n = softmax(cosine[:, [0, 1, 3]]), softmax(cosine[:, [2, 1, 3]])          # {Q_p, Q_ntp, Q_bg}, {Q_fg, Q_ntp, Q_bg}
    embedded = model.decoder.mask_embed(decoded.content[-1])[0].detach().double().numpy()
    masks = 1 / (1 + np.exp(-np.einsum("kp,phw->khw", embedded, decoded.pixels[0].double().numpy())))
    k, h, w = masks.shape
    coarse = masks.reshape(k, h // 4, 4, w // 4, 4).mean(axis=(2, 4)).reshape(k, -1)
    pooled = unit(np.stack([(m[:, None] * tokens[0].double().numpy()).sum(axis=0) / m.sum() for m in coarse]))
    reference, share = prompt.tokens[model.middle][0].double().numpy(), prompt.foreground[0].double().numpy()
    q_p, q_ntp = unit((share[:, None] * reference).sum(axis=0)), unit(((1 - share)[:, None] * reference).sum(axis=0))
    q_r = q_ntp[None] if reference_masks is None else reference_masks[0].double().numpy()
    sums = np.zeros((6, h, w))
    for i in range(k):
        a, b = np.exp(pooled[i] @ q_p / 0.07), np.exp(pooled[i] @ q_ntp / 0.07)
        far = min(1 - pooled[i] @ q for q in q_r)
        ws, wn = 1 - p[i, 2], 1 - n[i, 2]
        for s, value in enumerate((p[i, 0], ws * a / (a + b), ws, n[i, 0], wn * far, wn)):
            sums[s] += value * masks[i]
    return sums[0] / sums[2], sums[1] / sums[2], sums[3] / sums[5], sums[4] / sums[5]


@pytest.mark.parametrize("with_normals", [False, True])
def test_every_score_equals_its_equation(case, rng, with_normals):
    model, decoded, tokens, prompt, looks = case
    normals = icas.F.normalize(torch.from_numpy(rng.normal(size=(1, 9, 48))).float(), dim=-1) if with_normals else None
    got = icas.score(model.decoder, decoded, tokens, prompt, looks, model.middle, normals)
    expected = by_hand(model, decoded, tokens, prompt, normals)
    for one, other in zip((got.semantic, got.semantic_mfm, got.normal, got.normal_mfm), expected):
        np.testing.assert_allclose(one[0].numpy(), other, rtol=2e-4, atol=1e-6)
    assert 0 <= got.semantic.min() and got.semantic.max() <= 1


def test_without_mfm_the_semantic_score_stands_in_its_place(case):
    model, decoded, tokens, prompt, looks = case
    got = icas.score(model.decoder, decoded, tokens, prompt, looks, model.middle, mfm=False)
    assert torch.equal(got.semantic, got.semantic_mfm) and torch.equal(got.normal, got.normal_mfm)


def test_claimed_is_zero_where_masks_claim_nothing_and_the_plain_sum_is_as_printed(rng):
    values, weights, masks = rng.random((1, 3)), np.zeros((1, 3)), rng.random((1, 3, 2, 2))
    t = [torch.from_numpy(x) for x in (values, weights, masks)]
    assert not icas.claimed(*t).any()
    np.testing.assert_allclose(icas.claimed(*t, plain_sum=True)[0].numpy(), sum(values[0, i] * masks[0, i] for i in range(3)))


def test_matching_margins_equal_loops(rng):
    target, reference = unit(rng.normal(size=(2, 6, 8))), unit(rng.normal(size=(1, 9, 8)))
    foreground = np.arange(9)[None] < 3
    best = np.zeros((2, 2, 6))
    for b, i in np.ndindex(2, 6):
        cosines = [target[b, i] @ r for r in reference[0]]
        best[0, b, i], best[1, b, i] = max(cosines[:3]), max(cosines[3:])
    t = [torch.from_numpy(x) for x in (target, reference, foreground, ~foreground)]
    for got, expected in zip(icas.nearest_margin(*t), best):
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)
    means = unit(reference[0, :3].mean(axis=0)) - unit(reference[0, 3:].mean(axis=0))
    np.testing.assert_allclose(icas.prototype_margin(*t).numpy(), target @ means, atol=1e-6)


def test_fisher_s_direction_solves_its_equation_and_sets_the_means_one_apart(rng):
    reference = unit(rng.normal(size=(1, 40, 6)))
    foreground = (np.arange(40) < 10)[None].astype(float)
    prompt = icas.Prompt([torch.from_numpy(reference)], torch.zeros(1, 40, 2), torch.from_numpy(foreground), torch.from_numpy(1 - foreground),
                         torch.zeros(1, 2, icas.PIXEL + 1, icas.PIXEL + 1))
    sides = reference[0, :10], reference[0, 10:]
    gap = sides[0].mean(axis=0) - sides[1].mean(axis=0)
    scatter = sum((s - s.mean(axis=0)).T @ (s - s.mean(axis=0)) for s in sides) / 40
    expected = np.linalg.solve(scatter + (0.03 * np.trace(scatter) + 1e-6) * np.eye(6), gap)
    got = icas.fisher_directions(prompt)[0][0, :, 0].numpy()
    np.testing.assert_allclose(got, expected / (expected @ gap), rtol=1e-6)


def test_appearance_is_two_gaussians_of_the_pixel_descriptors(rng):
    reference, target = (torch.from_numpy(rng.random((1, 3, 48, 40))).float() for _ in range(2))
    reference[..., 8:24, 10:30] *= 0.4
    foreground = np.zeros((24, 20), bool)
    foreground[4:12, 5:15] = True
    share = torch.from_numpy(foreground)[None].float()
    halves = [share.clone(), share.clone()]
    halves[0][:, 8:], halves[1][:, :8] = 0, 0
    whole, empty = icas.pixel_moments(reference, share, 1 - share), torch.zeros_like(share)
    parts = icas.pixel_moments(reference, halves[0], 1 - share) + icas.pixel_moments(reference, halves[1], empty)
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-3)                # shots add
    d = icas.pixel_descriptors(reference)[0].permute(1, 2, 0).double().numpy()
    x = icas.pixel_descriptors(target)[0].permute(1, 2, 0).double().numpy()
    sides = d[foreground], d[~foreground]
    means, covs = [s.mean(axis=0) for s in sides], [np.cov(s.T, bias=True) for s in sides]
    covs[0] = len(sides[0]) / (len(sides[0]) + 100) * covs[0] + 100 / (len(sides[0]) + 100) * covs[1]
    covs = [c + 0.03 * np.eye(icas.PIXEL) for c in covs]
    far = [np.einsum("hwi,ij,hwj->hw", x - m, np.linalg.inv(c), x - m) for m, c in zip(means, covs)]
    ratio = -0.5 * (far[0] - far[1]) - 0.5 * (np.linalg.slogdet(covs[0])[1] - np.linalg.slogdet(covs[1])[1])
    direction = np.linalg.solve(covs[1], means[0] - means[1])
    apart = direction @ (means[0] - means[1])
    linear = (x - (means[0] + means[1]) / 2) @ direction / apart
    expected = [linear.clip(-3, 3), (ratio / 5).clip(-4, 4), np.log(far[1] / icas.PIXEL + 0.05).clip(-3, 3), np.full((24, 20), np.log1p(apart))]
    np.testing.assert_allclose(icas.appearance(target, whole)[0], np.stack(expected), rtol=2e-3, atol=2e-3)
    normal = icas.appearance(target, icas.pixel_moments(reference, empty, 1 - share))[0]
    assert not normal[[0, 1, 3]].any() and torch.isfinite(normal).all()


def test_pixel_descriptors_do_not_depend_on_the_light():
    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    dim = icas.pixel_descriptors(0.5 * image + 0.2)
    assert (dim - icas.pixel_descriptors(image)).abs().mean() < 0.25 * icas.pixel_descriptors(image).abs().mean()


def test_novelty_is_the_nearest_cosine_and_the_residual_of_a_subspace(rng):
    bank, target = [unit(rng.normal(size=(1, 60, 8))) for _ in range(3)], [unit(rng.normal(size=(1, 5, 8))) for _ in range(3)]
    known = (np.arange(60) < 50)[None]
    t = lambda arrays: [torch.from_numpy(a) for a in arrays]  # noqa: E731
    blocks = [rng.normal(size=(1, 8, 1, 55)) for _ in range(3)]                       # maps: 50 tokens of good parts, 5 of the target
    both = (blocks[0] + blocks[1])[0, :, 0].T / 2                                     # the last block is left out
    whole = icas.middle_mean(torch.from_numpy(np.concatenate(blocks, axis=1)), 3)
    np.testing.assert_allclose(whole[0].numpy(), both, atol=1e-6)
    middle = both[:50]
    mean, basis = icas.subspace(torch.from_numpy(middle), 0.8)
    values = np.sort(np.linalg.svd(middle - middle.mean(axis=0))[1] ** 2)[::-1]
    assert values[:basis.shape[1]].sum() >= 0.8 * values.sum() > values[:basis.shape[1] - 1].sum()
    near, residual = icas.novelty(t(target), torch.from_numpy(both[None, 50:]), t(bank), torch.from_numpy(known), mean, basis)[0].numpy()
    expected = np.mean([(1 - target[b][0] @ bank[b][0, :50].T).min(axis=1) for b in range(2)], axis=0)
    np.testing.assert_allclose(near, expected, atol=1e-6)
    x = both[50:] - middle.mean(axis=0)
    axes = np.linalg.svd(middle - middle.mean(axis=0))[2][:basis.shape[1]]
    np.testing.assert_allclose(residual, np.linalg.norm(x - x @ axes.T @ axes, axis=1), atol=1e-6)


def test_the_image_score_is_the_mean_of_the_top_percent(rng):
    values = rng.random((1, 20, 20))
    assert icas.top_share(torch.from_numpy(values)).item() == pytest.approx(np.sort(values.ravel())[-4:].mean())
    assert icas.top_share(torch.tensor([[[0.25, 0.5]]])).item() == 0.5


def test_the_threshold_rises_as_fewer_false_alarms_are_allowed_and_falls_with_more_parts(rng):
    scores = rng.normal(1, 0.05, 40)
    def threshold(scores, rate, parts=None):
        return icas.normal_threshold(icas.GoodParts(*[None] * 5, list(scores), parts or len(scores), {}), rate)
    cuts = [threshold(scores, rate) for rate in (0.2, 0.05, 0.01)]
    assert cuts[0] < cuts[1] < cuts[2]
    assert threshold(scores[:4], 0.01, 1) > threshold(scores[:2], 0.01) > cuts[2]     # four quarters of one part say less than two parts
    assert (scores > cuts[2]).mean() <= 0.05
