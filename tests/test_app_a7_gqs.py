"""Appendix A.7 and Algorithm 1: greedy query selection."""
import itertools

import numpy as np
import torch

import icas


def naive(points: np.ndarray, count: int) -> list[int]:
    picked = [int(np.argmax(((points - points.mean(axis=0)) ** 2).sum(axis=1)))]
    while len(picked) < count:
        gaps = [-1.0 if i in picked else min(((points[i] - points[j]) ** 2).sum() for j in picked)
                for i in range(len(points))]
        picked.append(int(np.argmax(gaps)))
    return picked


def test_equals_a_naive_loop_index_for_index(rng):
    points = rng.normal(size=(3, 60, 8))
    got = icas.greedy_queries(torch.from_numpy(points), 25)
    assert got.tolist() == [naive(p, 25) for p in points]


def test_greedy_cover_is_at_most_twice_the_best(rng):
    for _ in range(20):
        points = rng.normal(size=(9, 2))
        gap = np.linalg.norm(points[:, None] - points[None], axis=-1)
        radius = lambda picked: gap[:, list(picked)].min(axis=1).max()  # noqa: E731,B023  Eq. 2
        best = min(map(radius, itertools.combinations(range(9), 3)))    # R*
        picked = icas.greedy_queries(torch.from_numpy(points)[None], 3)[0].tolist()
        assert radius(picked) <= 2 * best + 1e-12                       # Eq. 4


def test_picks_are_distinct_even_among_equal_tokens_and_ties_take_the_lowest_index():
    same = torch.ones(1, 6, 4)
    assert icas.greedy_queries(same, 6)[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert icas.greedy_queries(same, 9).shape == (1, 6)


def test_algorithm_1_as_printed_misses_a_small_far_group_that_ours_finds(rng):
    points = rng.normal(size=(200, 16)) * 0.2 + np.eye(16)[0]
    points[190:] = rng.normal(size=(10, 16)) * 0.2 + np.eye(16)[1]      # ten defect tokens
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    similarity = points @ points.T
    # as printed: argmax of the min over all of F_t
    printed = np.argsort(-similarity.min(axis=1), kind="stable")[:10]
    assert not (printed >= 190).any()
    picked = icas.greedy_queries(torch.from_numpy(points)[None], 10)[0].tolist()
    assert any(i >= 190 for i in picked)
