"""Batches of a reference and a target, as training draws them (Sec. 3.3)."""
from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import icas

from .episodes import points_in
from .views import FreshViews, Rng, View, encode, rank, world


class Pairs:
    """Batches of (reference, target). Pair j of step i is a function of (seed, i, j) alone,
    whichever rank or micro-batch draws it."""

    def __init__(self, sources: list[FreshViews], weights: list[float], model: icas.ICAS,
                 args: argparse.Namespace):
        self.sources, self.model, self.args = sources, model, args
        self.weights = np.array(weights) / sum(weights)
        self.pool, self.ahead, self.waited = ThreadPoolExecutor(max(1, args.workers)), {}, 0.0

    def __call__(self, step: int) -> list[icas.Batch]:
        """This rank's share of a step, in micro-batches; the next step is drawn meanwhile."""
        args = self.args
        for coming in (step, step + 1):
            if coming not in self.ahead:   # one number of shots a step: pairs are stacked
                shots = 1 + int(np.random.default_rng([args.seed, coming]).integers(args.shots))
                rngs = [np.random.default_rng([args.seed, coming, j])
                        for j in range(rank(), args.batch_size, world())]
                self.ahead[coming] = [self.pool.submit(self.draw, rng, shots) for rng in rngs]
        began = time.perf_counter()
        pairs = [future.result() for future in self.ahead.pop(step)]
        self.waited += time.perf_counter() - began
        size = -(-len(pairs) // args.accumulate)
        return [collate(pairs[i:i + size], self.model) for i in range(0, len(pairs), size)]

    def draw(self, rng: Rng, shots: int = 1) -> dict:
        """A target, and as its prompt a marked label, a good part, or clicks on the target."""
        source = self.sources[int(rng.choice(len(self.sources), p=self.weights))]
        number = np.searchsorted(source.often[:-1], rng.random() * source.often[-1], side="right")
        label, entries = list(source.by_label.items())[number]
        target, mode = entries[rng.integers(len(entries))], rng.random()
        good = source.good.get(source.index[target]["category"], [])
        good = source.another(good, target, rng) if self.args.stage == "anomaly" else None
        alike, other = source.views_of(target, label), source.another(entries, target, rng)
        same = alike and (other is None or rng.random() < self.args.same_image)
        reference = int(rng.choice(alike)) if same else other
        if good is not None and rng.random() < self.args.good_targets:   # nothing to be found
            target, reference, mode = good, target, 1.0
        seen = source.view(target, rng, label * (label in source.shown[target]))
        wanted = {seen.names[label]} if label in seen.names else set()
        if self.args.stage == "anomaly" and mode < 0.15:   # a good part; all defects are wanted
            shown = reference if good is None else good    # or what is unmarked of a bad one
            view = seen if shown is None else source.view(shown, rng)
            prompt = [(view, torch.zeros(view.labels.shape), (view.labels == 0).float())]
            wanted = set(seen.names.values())
        elif wanted and (mode < 0.35 or reference is None):   # clicks on the target itself
            inside = (seen.labels == seen.names[label]).numpy()
            disks = (icas.disks(points_in(side, int(rng.integers(1, 6)), rng), *side.shape)
                     for side in (inside, ~inside))   # as `icas.segment` draws clicks
            prompt = [(seen, *disks)]
        else:
            views = [seen]
            if reference is not None:
                chosen = self.prompt(source, reference, label, shots, target, rng)
                views = [source.view(i, rng, label) for i in chosen]
            marks = [(v.labels.int() == v.names.get(label, -1)).float() for v in views]
            prompt = [(v, m, 1 - m) for v, m in zip(views, marks)]
        # a gain and a shift of each relation map, so that no encoder's scale is learned
        gain, shift = rng.normal(0, self.args.jitter, (2, icas.RELATIONS))
        return sides(prompt, shots, self.model.config) | {
            "target": seen, "truths": truths(seen, wanted, self.model.config),
            "jitter": torch.from_numpy(np.stack([np.exp(gain), shift]).astype(np.float32))}

    def prompt(self, source: FreshViews, reference: int, label: str, shots: int, target: int,
               rng: Rng) -> list[int]:
        """The reference and up to `shots` - 1 more views of its image, or of others without any."""
        more = [i for i in source.views_of(reference, label) if i != target]
        more = more or source.others(source.by_label[label], target, reference)
        return [reference, *(int(i) for i in rng.permutation(more)[:shots - 1])]


def sides(shown: Sequence[tuple[View, Tensor, Tensor]], shots: int, config: icas.Config) -> dict:
    """What a pair says of its prompt: views, and the shares of the two sides on either grid.

    shown  (view, foreground, background) with (S, S) masks. Of all but the first the background is
           thinned, as of turned copies. Fewer than `shots`: the last again, with shares of 0.
    """
    side, shares = shown[0][1].shape[-1], ([], [])
    for turn, (_, *both) in enumerate(shown):
        for n, kept in zip((side // config.patch_size, side // 8), shares):
            share = icas.token_share(torch.stack(both), n, n)
            if not both[0].any():
                share[1] = (share[1] > 0.999).float()
            kept.append(share * icas.kept_tokens(share[0], turn).view(n, n))
    empty = shots - len(shown)
    return {"reference": [view for view, _, _ in shown] + [shown[-1][0]] * empty,
            "sides": [torch.stack(kept + [torch.zeros_like(kept[0])] * empty) for kept in shares]}


def truths(seen: View, wanted: set[int], config: icas.Config) -> icas.Truths:
    """Truths of one target: the prompted label, up to 12 others, with the unlabelled rest."""
    present = set(seen.labels.unique().tolist())
    groups = [sorted(wanted & present)] if wanted & present else []
    groups, prompted = groups + [[v] for v in sorted(present - wanted)][:12], len(groups)
    masks = torch.stack([torch.isin(seen.labels, torch.tensor(g)) for g in groups]).float()
    masks = F.adaptive_avg_pool2d(masks, 4 * (masks.shape[-1] // config.patch_size))
    return icas.Truths(masks, torch.tensor([0] * prompted + [1] * (len(groups) - prompted)))


def collate(pairs: list[dict], model: icas.ICAS) -> icas.Batch:
    """Pairs as one batch, on the model's device; views without features are encoded here."""
    views = [p["target"] for p in pairs] + [v for p in pairs for v in p["reference"]]

    def stack(values: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(values)).to(model.device)
    if views[0].maps is None:
        found = encode(model, views)
    else:
        found = icas.Features(stack(v.maps for v in views).float())
        if views[0].detail is not None:
            found.detail = stack(v.detail for v in views).float()
    cut = ((None, None) if x is None else x.tensor_split([len(pairs)])
           for x in (found.maps, found.detail))
    target, reference = map(icas.Features, *cut)
    sides = [stack(side) for side in zip(*(p["sides"] for p in pairs))]
    truths = [icas.Truths(*(x.to(model.device) for x in p["truths"])) for p in pairs]
    return icas.Batch(target, reference, sides, truths, stack(p["jitter"] for p in pairs))
