"""Sec. 3.2: matching and losses against brute force and NumPy; Sec. 3.3: the training loop."""
import itertools

import numpy as np
import pytest
import torch
from conftest import TINY
from test_sec_3_1_framework import pairs

import icas

sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731


def cost_of(probs, logits, classes, truths):
    cost = np.zeros((len(logits), len(truths)))
    for k, n in np.ndindex(*cost.shape):
        m, t = sigmoid(logits[k]), truths[n]
        bce = -(t * np.log(m) + (1 - t) * np.log(1 - m)).mean()
        dice = 1 - (2 * (m * t).sum() + 1) / (m.sum() + t.sum() + 1)
        cost[k, n] = -2 * (probs[0, k, classes[n]] + probs[1, k, classes[n]]) + 5 * bce + 5 * dice
    return cost


@pytest.mark.parametrize("k, n", [(5, 3), (2, 4), (4, 4)])
def test_matching_equals_brute_force_over_permutations(rng, k, n):
    probs, logits = rng.dirichlet(np.ones(3), size=(2, k)), rng.normal(size=(k, 20))
    classes, truths = rng.integers(0, 2, n), (rng.random((n, 20)) > 0.5).astype(float)
    cost = cost_of(probs, logits, classes, truths)
    if k >= n:
        best = min(sum(cost[q, j] for j, q in enumerate(p))
                   for p in itertools.permutations(range(k), n))
    else:
        best = min(sum(cost[i, t] for i, t in enumerate(p))
                   for p in itertools.permutations(range(n), k))
    rows, columns = icas.match(*map(torch.from_numpy, (probs, logits, classes, truths)))
    assert len(rows) == min(k, n)
    assert cost[rows.numpy(), columns.numpy()].sum() == pytest.approx(best, rel=1e-9)


def test_mask_loss_is_five_bce_and_five_dice(rng):
    logits, truths = rng.normal(size=(4, 30)), rng.random((4, 30))
    m = sigmoid(logits)
    bce = -(truths * np.log(m) + (1 - truths) * np.log(1 - m)).mean(axis=1)
    dice = 1 - (2 * (m * truths).sum(axis=1) + 1) / (m.sum(axis=1) + truths.sum(axis=1) + 1)
    got = icas.mask_loss(torch.from_numpy(logits), torch.from_numpy(truths)).numpy()
    np.testing.assert_allclose(got, 5 * bce + 5 * dice, rtol=1e-12)


def fresh(seed=0, **change):
    torch.manual_seed(seed)
    return icas.ICAS(icas.Config(**TINY | change))


def test_fit_lowers_the_loss_and_the_same_seed_gives_the_same_weights():
    ends = []
    for _ in range(2):
        model, losses = fresh(), []
        batch = pairs(model)
        icas.fit(model, lambda step: batch, steps=25, lr=2e-3, warmup=5,
                 callback=lambda step, parts, o: losses.append(parts["loss"]))
        assert losses[-1] < 0.8 * losses[0] and not model.training
        ends.append(model.decoder.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_a_resumed_fit_ends_where_an_unbroken_one_does():
    whole, parts = fresh(), fresh()
    batches = lambda step: pairs(whole, seed=step)  # noqa: E731
    icas.fit(whole, batches, steps=6, warmup=2)
    optimizer = icas.make_optimizer(parts.decoder, 1e-4, 0.05)
    icas.fit(parts, batches, steps=6, warmup=2, optimizer=optimizer,
             callback=lambda step, *_: step == 2)
    icas.fit(parts, batches, steps=6, warmup=2, optimizer=optimizer, start=3)
    ends = [model.decoder.state_dict().values() for model in (whole, parts)]
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def test_fit_leaves_both_frozen_encoders_as_they_are():
    model = fresh()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    icas.fit(model, lambda step: pairs(model), steps=2, lr=1e-2, warmup=1)
    changed = {k.split(".")[0] for k, v in model.state_dict().items()
               if not torch.equal(v, before[k])}
    assert changed == {"decoder"}


def test_normal_references_and_targets_without_a_defect_have_a_finite_loss():
    model = fresh()
    batch = pairs(model)
    nothing = torch.tensor([0.0, 1.0])[:, None, None]
    good = batch._replace(sides=[nothing.expand_as(side) for side in batch.sides])
    rest = batch._replace(truths=[icas.Truths(torch.ones(1, 32, 32), torch.tensor([1]))] * 2)
    for changed in (good, rest):
        parts = icas.pair_loss(model, changed, torch.Generator().manual_seed(0))
        assert torch.isfinite(sum(parts.values()))
        # of good parts there is nothing to be told from the rest: the first classifier rests
        assert (parts["target"] == 0) == (changed is good) and parts["other"] > 0


def test_the_rate_goes_up_and_down_and_matrices_alone_decay():
    model, rates = fresh(), []
    optimizer = icas.make_optimizer(model.decoder, 1e-3, 0.05)
    names = {id(p): name for name, p in model.decoder.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0]
    assert {"learned", "type_embed", "class_scale"} <= free and decayed | free == {*names.values()}
    assert all(name.endswith("weight") for name in decayed - free)
    icas.fit(model, lambda step: pairs(model), steps=6, lr=1e-3, warmup=2, optimizer=optimizer,
             callback=lambda step, losses, o: rates.append(o.param_groups[0]["lr"]))
    np.testing.assert_allclose(rates, 1e-3 * np.array([1 / 2, 1, 1, 3 / 4, 1 / 2, 1 / 4]))


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_fit_stops_before_a_step_that_would_spoil_the_weights(part):
    model = fresh()
    weight, before = model.decoder.class_scale, model.decoder.class_scale.clone()
    batch = pairs(model)
    if part == "loss":
        batch.target.maps *= torch.nan
    else:
        weight.requires_grad_(True).register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(ValueError, match="fit: .* finite|fit: .*gradient nan"):
        icas.fit(model, lambda step: batch, steps=1)
    assert torch.equal(weight, before)


def test_references_are_prepared_again_after_training():
    model = fresh(blocks=(3, 4), debias=0, queries=8, layers=1, ffn_dim=32,
                  pixel_dim=8, relation_dim=8).eval()
    image, mask = np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), bool)
    image[10:20, 10:20], mask[10:20, 10:20] = 200, True
    kept = icas.encode([(image, mask)], model=model)
    before = icas.segment(image, kept, model=model).score
    icas.fit(model, lambda step: pairs(model), steps=3, lr=1e-2, warmup=1)
    after = icas.segment(image, kept, model=model).score
    again = icas.segment(image, icas.encode([(image, mask)], model=model), model=model).score
    np.testing.assert_array_equal(after, again)
    assert np.abs(after - before).max() > 1e-3
