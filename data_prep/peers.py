"""Training-free methods beside icas, on the same features of the same images."""
from __future__ import annotations

import functools
from typing import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import icas

from .episodes import Store, segments

PEERS = ("nearest patch", "prototype", "nearest patch, plain", "prototype, plain",   # segmentation
         "AnomalyDINO recipe", "SubspaceAD recipe")                                  # detection


def peer_scores(store: Store, episode: dict) -> Callable[[str], dict[str, Tensor]] | None:
    """Image -> (T,) scores of its tokens by each peer of the episode's task; without good parts
    there is none for detection."""
    if segments(episode):
        return functools.partial(segmentation_peers, store, episode)
    return detection_peers(store, episode["normals"]) if episode["normals"] else None


def segmentation_peers(store: Store, episode: dict, name: str) -> dict[str, Tensor]:
    """(T,) scores of an image's tokens, 0 is even, by matching the prompts as they lie; "plain" is
    without debiasing. Good parts join the background; of them alone there is no peer."""
    model, target, clicks = store.model, store.image(name), store.clicks(name, episode)
    if clicks:
        inside, far, other = icas.mark_sides(target.shape, *clicks.values(), None, None)
        pairs = [(target, torch.stack([inside, other if other.any() else far]))]
    elif episode["prompts"]:
        shown = [*episode["prompts"], *episode["normals"]]
        masks = [torch.from_numpy(store.truth(n, episode["label"])).float() for n in shown]
        pairs = [(store.image(n), torch.stack([m, 1 - m])) for n, m in zip(shown, masks)]
    else:
        return {}
    shares = [icas.token_share(sides.to(model.device), *image.features.maps.shape[-2:]).flatten(1)
              for image, sides in pairs]
    inside, outside = torch.cat(shares, dim=1)[:, None]
    marked, clean, scores = icas.surely(inside, 0.5), icas.surely(outside, 0.999), {}

    def tokens(image: icas.EncodedImage, plain: bool) -> Tensor:
        x = image.features.maps.float()
        block = x.chunk(len(model.config.blocks), dim=1)[-1]
        return icas.unit_tokens(block) if plain else model.tokens(x)[-1]
    for plain in (False, True):
        x, known = tokens(target, plain), torch.cat([tokens(i, plain) for i, _ in pairs], dim=1)
        near = icas.best_cosine(x, known, marked) - icas.best_cosine(x, known, clean)
        means = icas.mask_pool(known, torch.stack([inside, clean.float()], dim=1))[0]
        inner, outer = F.normalize(means, dim=-1)
        for kind, odds in (("nearest patch", near), ("prototype", x @ (inner - outer))):
            scores[kind + ", plain" * plain] = odds
    return scores


def detection_peers(store: Store, normals: Sequence[str]) -> Callable[[str], dict[str, Tensor]]:
    """Image -> (T,) novelty of its tokens. AnomalyDINO: to the nearest neighbour in the last tapped
    block in eight turns of the good parts; SubspaceAD: outside the subspace that holds 99 % of the
    variance of the tapped blocks' mean."""
    def tokens(image: icas.EncodedImage) -> tuple[Tensor, Tensor]:
        split = image.features.maps.float().chunk(len(store.model.config.blocks), dim=1)
        blocks = torch.cat(split).flatten(2).mT   # blocks, tokens, D
        return F.normalize(blocks[-1], dim=-1), blocks.mean(dim=0)
    turns = [icas.rotate(torch.from_numpy(store.pixels(n)), angle).numpy()
             for n in normals for angle in range(0, 360, 45)]
    known = [tokens(icas.encode_image(turn, model=store.model)) for turn in turns]
    last, mixed = map(torch.cat, zip(*known))
    mean = mixed.mean(dim=0)
    values, vectors = torch.linalg.eigh((mixed - mean).T @ (mixed - mean))
    basis = vectors[:, values.cumsum(0) > 0.01 * values.sum()]

    def novelty(name: str) -> dict[str, Tensor]:
        own, x = tokens(store.image(name))
        with store.model.autocast():
            near = (own @ last.T).amax(dim=1).float()
        rest = x - mean - ((x - mean) @ basis) @ basis.T
        return {"AnomalyDINO recipe": 1 - near, "SubspaceAD recipe": rest.norm(dim=-1)}
    return novelty
