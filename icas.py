"""iCAS: in-context anomaly segmentation.

Show it one marked defect, a few good parts, or a click, and it marks defects in pictures it was never trained on.
The method of *iCAS: an in-context anomaly segmentation framework for industrial visual inspection*, in one module.

    from icas import encode, segment
    scratch = encode(anomalies=[("scratched.png", "scratched_mask.png")])    # once
    for result in segment(["part_1.png", "part_2.png"], scratch):             # many times
        print(result.mask.shape, result.score.max(), result.boxes())

The file follows the paper: 3.1 framework, 3.2 objective, 3.3 training, 3.4 inference, then files and the command line.
Where the paper is open or wrong, a comment says what we read; `Config` has a switch that gives the paper's own form.

    paper              code                     shape
    I_r, I_t           reference, target        (B, 3, H, W)      RGB in [0, 1]
    F_r, F_t           features                 (B, D, H0, W0)    one map for each tapped encoder block
    Q_c^0, Q_c         content                  (B, K, C)
    Q_p, Q_ntp         prompt, other            (B, N, C)         prompted label; everything that is not it
    Q_fg, Q_bg         foreground, background   (C,)              learned
    P_t                pixels                   (B, C, 4 H0, 4 W0)
    script M_t         mask_logits              (B, K, 4 H0, 4 W0)
    S_s, S_n, S^mfm    semantic_score, normal_score, semantic_mfm, normal_mfm
"""
from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import numbers
import os
import pickle
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import numpy as np
import scipy.optimize
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__version__ = "0.6.0"
__all__ = ["Config", "ICAS", "References", "Segmentation", "Detection", "segment", "detect", "encode", "fit", "load", "save",
           "convert", "to_rgb", "overlay"]

# name: (width D, depth, heads); "-reg" adds the four register tokens. The variants that Meta released (METHOD 6).
ENCODERS = {"vits14": (384, 12, 6), "vitb14": (768, 12, 12), "vitl14": (1024, 24, 16), "vitg14": (1536, 40, 24)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as DINOv2 was trained


@dataclass(frozen=True)
class Config:
    """What decides shapes and results; it is saved with the weights. Defaults are the paper's where METHOD keeps them.

    The paper's own form, field by field: `blocks=(depth,)`, `debias=0`, `correspondence=False`, `learned_queries` is its
    row without greedy query selection, `plain_sum=True` its unnormalised scores and fusion.
    """
    encoder: str = "vits14"         # a key of ENCODERS, or that with "-reg"
    image_size: int = 518           # pixels: a square image becomes (image_size / 14)^2 tokens (Sec. 4.2)
    patch_size: int = 14            # pixels, fixed by DINOv2
    blocks: tuple[int, ...] = ()    # encoder blocks that are tapped, counted from 1; () is (two thirds of the depth, last)
    debias: int = 20                # positional directions projected out before a cosine is taken (R2); 0: none
    queries: int = 200              # K, content queries (A.1)
    learned_queries: bool = False   # K learned vectors in place of greedy query selection (Table 7 without GQS)
    dim: int = 256                  # C, width of the decoder
    layers: int = 6                 # decoder layers (A.1)
    heads: int = 8
    ffn_dim: int = 1728             # open in the paper: the widest multiple of 64 that keeps ViT-L below half of SAM ViT-H (Table 14)
    separate_ffn: bool = True       # content and prompt queries have feed-forward nets of their own (R5)
    prompt_attends: bool = True     # prompt queries cross-attend to the target too (the paper's text; SINE's do not)
    masked_attention: bool = False  # each layer attends inside the mask of the one before (R6)
    pixel_dim: int = 256            # channels of P_t (R7)
    correspondence: bool = True     # per-token maps of training-free matching, and the net that reads them (R9)
    relation_dim: int = 64          # width of that net
    plain_sum: bool = False         # S = sum_i p_i M_i and S + S^mfm, as printed (R17, R18)
    temperature: float = 0.07       # of mask-level feature matching (R18)

    def __post_init__(self) -> None:
        if not isinstance(self.encoder, str):
            raise TypeError(f"encoder: expected a name, got {self.encoder!r}")
        if not isinstance(self.blocks, (tuple, list)):
            raise TypeError(f"blocks: expected a tuple of numbers, got {self.blocks!r}")
        name = self.encoder.removesuffix("-reg")
        if name not in ENCODERS:
            raise ValueError(f"encoder: expected one of {sorted(ENCODERS)}, with or without '-reg', got {self.encoder!r}")
        depth = ENCODERS[name][1]
        object.__setattr__(self, "blocks", tuple(self.blocks) or (depth * 3 // 4 if depth == 12 else depth * 2 // 3, depth))
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            near = max(1, round(self.image_size / self.patch_size)) * self.patch_size
            raise ValueError(f"image_size: expected a positive multiple of {self.patch_size}, got {self.image_size}; use {near}")
        if not all(1 <= b <= depth for b in self.blocks) or list(self.blocks) != sorted(set(self.blocks)):
            raise ValueError(f"blocks: expected rising numbers in 1 to {depth} for {self.encoder}, got {self.blocks}")
        if min(self.dim, self.heads, self.ffn_dim, self.pixel_dim, self.relation_dim - 1) < 1 or self.temperature <= 0:
            raise ValueError("dim, heads, ffn_dim, pixel_dim: expected at least 1, relation_dim at least 2, temperature above 0; got "
                             f"{self.dim}, {self.heads}, {self.ffn_dim}, {self.pixel_dim}, {self.relation_dim}, {self.temperature}")
        if self.dim % self.heads or self.dim % 4:
            raise ValueError(f"dim: expected a multiple of 4 and of heads={self.heads}, got {self.dim}")
        if self.queries < 1 or self.layers < 1 or not 0 <= self.debias < ENCODERS[name][0]:
            raise ValueError(f"queries, layers: expected at least 1, and debias at least 0 and below the encoder's width; got "
                             f"{self.queries}, {self.layers}, {self.debias}")


# ---- 3.1 Unified framework: the frozen encoder ----------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention under Meta's parameter names."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, out: int | None = None):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, out or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """The feed-forward net of ViT-g."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class EncoderBlock(nn.Module):
    def __init__(self, dim: int, heads: int, swiglu: bool):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads), LayerScale(dim)
        # 4096 for ViT-g: two thirds of 4 x 1536, rounded up to a multiple of 8
        self.norm2, self.ls2 = nn.LayerNorm(dim, eps=1e-6), LayerScale(dim)
        self.mlp = SwiGLU(dim, (int(dim * 8 / 3) + 7) // 8 * 8) if swiglu else Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """DINOv2 ViT with Meta's key names, frozen (Sec. 3.1). Returns the patch tokens of any set of blocks in one pass."""

    def __init__(self, name: str = "vits14", patch_size: int = 14, position_offset: float = 0.1):
        super().__init__()
        dim, depth, heads = ENCODERS[name.removesuffix("-reg")]
        self.patch_size, self.registers = patch_size, 4 * name.endswith("-reg")
        self.position_offset = position_offset  # Meta's resize scales by (h0 + 0.1) / 37; transformers' by h0 / 37
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + 37 * 37, dim) * 0.02)
        if self.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, self.registers, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, patch_size)})
        self.blocks = nn.ModuleList(EncoderBlock(dim, heads, name.startswith("vitg")) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).reshape(3, 1, 1), persistent=False)

    def positions(self, h0: int, w0: int) -> Tensor:
        """(1, H0 W0, D): the 37 x 37 position embedding, resized as each release does it."""
        grid = rearrange(self.pos_embed[:, 1:], "1 (h w) d -> 1 d h w", h=37)
        if (h0, w0) != (37, 37):
            if self.registers:
                grid = F.interpolate(grid, size=(h0, w0), mode="bicubic", antialias=True)
            elif self.position_offset:
                scale = ((h0 + self.position_offset) / 37, (w0 + self.position_offset) / 37)
                grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
            else:
                grid = F.interpolate(grid, size=(h0, w0), mode="bicubic")
        return rearrange(grid, "1 d h w -> 1 (h w) d")

    def forward(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Patch tokens after each of `blocks` (from 1, rising), each through the final LayerNorm (R1).

        images   (B, 3, H, W) RGB in [0, 1]; H and W multiples of 14.
        returns  one (B, D, H0, W0) float32 map a block.
        """
        h0, w0 = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        x = self.patch_embed["proj"]((images - self.mean) / self.std)
        x = rearrange(x, "b d h w -> b (h w) d") + self.positions(h0, w0)
        first = [self.cls_token + self.pos_embed[:, :1]] + ([self.register_tokens] if self.registers else [])
        x = torch.cat([t.expand(len(x), -1, -1) for t in first] + [x], dim=1)
        taken = []
        for number, block in enumerate(self.blocks[:max(blocks)], start=1):
            x = block(x)
            if number in blocks:
                tokens = self.norm(x)[:, 1 + self.registers:].float()
                taken.append(rearrange(tokens, "b (h w) d -> b d h w", h=h0))
        return taken


def positional_basis(encoder: Encoder, h0: int, w0: int, blocks: Sequence[int], count: int) -> list[Tensor]:
    """Directions in which tokens differ by place alone (R2; the idea is INSID3's). No parameters.

    Encodes one blank and three noise images (fixed seed) of the grid and takes the leading right singular vectors of
    the centred tokens. returns: one (D, count) orthonormal float32 basis a block.
    """
    weight = encoder.cls_token
    noise = torch.rand(3, 3, h0 * encoder.patch_size, w0 * encoder.patch_size, generator=torch.Generator().manual_seed(0))
    images = torch.cat([torch.full_like(noise[:1], 0.5), noise]).to(weight.device)
    bases = []
    for tokens in encoder(images, blocks):
        tokens = rearrange(tokens, "b d h w -> (b h w) d")
        tokens = tokens - tokens.mean(dim=0)
        # eigenvectors of the (D, D) scatter are the right singular vectors, and do not grow with the grid
        bases.append(torch.linalg.eigh(tokens.T.double() @ tokens.double())[1].flip(1)[:, :count].float())
    return bases


def unit_tokens(features: Tensor, basis: Tensor | None) -> Tensor:
    """Unit vectors with the positional subspace projected out (R2).

    features  (B, D, H0, W0); basis (D, n) orthonormal or None. returns (B, H0 W0, D) float32, rows of length 1.
    """
    tokens = rearrange(features, "b d h w -> b (h w) d").float()
    if basis is not None:
        tokens = tokens - (tokens @ basis) @ basis.T
    return F.normalize(tokens, dim=-1)


# ---- 3.1 Unified framework: prompts and query selection -------------------------------------------------------------


def token_share(masks: Tensor, h0: int, w0: int) -> Tensor:
    """Share of each token's area that a mask covers (R8). masks (B, H, W) in [0, 1]; returns (B, H0, W0).

    Every bin that a marked pixel touches gets a share, so a mask of one pixel never vanishes.
    """
    return F.adaptive_avg_pool2d(masks.float()[:, None], (h0, w0))[:, 0]


def mask_pool(features: Tensor, masks: Tensor) -> Tensor:
    """Mean feature under each mask (MaskPooling, Sec. 3.1).

    features  (B, T, C): tokens, or pixels, of one image or of all shots together (R8).
    masks     (B, N, T) weights >= 0.
    returns   (B, N, C). An empty mask gives zeros, never NaN, and so do its gradients.
    """
    total = masks.sum(dim=-1, keepdim=True)
    return torch.einsum("btc,bnt->bnc", features, masks) / total.clamp_min(1e-8)  # far less than one pixel's share of a token


def greedy_queries(tokens: Tensor, count: int) -> Tensor:
    """Greedy query selection: farthest-point sampling, a 2-approximation of k-center (Alg. 1, Eq. 2, A.7).

    tokens   (B, T, D); unit vectors make the distance a monotone of the cosine.
    returns  (B, min(count, T)) int64, in the order of picking.

    As printed, Algorithm 1 takes the minimum over all of F_t and on a similarity, which picks the most central tokens; A.7 proves
    its bound for the distance to the chosen set, so that is what we follow (R3). It starts at the token farthest from the mean; a
    picked token is barred; the lowest index wins ties.
    """
    wide = tokens.double() if tokens.dtype == torch.float64 else tokens.float()
    square = (wide * wide).sum(dim=-1)
    gaps = square[:, :, None] + square[:, None, :] - 2 * wide @ wide.transpose(1, 2)       # b t t, squared distances
    order = torch.arange(wide.shape[1], 0, -1, device=wide.device)
    farthest = lambda d: ((d >= d.amax(dim=1, keepdim=True)) * order).argmax(dim=1)        # noqa: E731  lowest index on ties
    batch = torch.arange(len(wide), device=wide.device)
    picked = [farthest((wide - wide.mean(dim=1, keepdim=True)).square().sum(dim=-1))]
    nearest = gaps[batch, picked[0]].clamp_min(0).index_put((batch, picked[0]), wide.new_tensor(-1.0))
    for _ in range(min(count, wide.shape[1]) - 1):
        picked.append(farthest(nearest))
        nearest = torch.minimum(nearest, gaps[batch, picked[-1]].clamp_min(0)).index_put((batch, picked[-1]), wide.new_tensor(-1.0))
    return torch.stack(picked, dim=1)


class Prompt(NamedTuple):
    """One label's references, all shots pooled, as the decoder reads them. R tokens in all."""
    tokens: list[Tensor]    # (B, R, D) a block: debiased unit vectors
    neck: Tensor            # (B, R, C) the neck's map, for Q_p^0 and Q_ntp^0
    foreground: Tensor      # (B, R) share of the prompted label; all 0 where only normal references are given
    background: Tensor      # (B, R) share of what is surely not it
    moments: Tensor         # (B, 2, P + 1, P + 1) of pixel descriptors on the two sides, see `pixel_moments`
    fisher: list[Tensor] | None = None  # (B, D, 1) a block, where they are kept: they do not depend on the target
    lying: Prompt | None = None         # of the images as they lie, if some are turned copies: the relation net was trained on such

    @property
    def marked(self) -> Tensor:
        """(B,) 1.0 where the prompt marks an anomaly, 0.0 where it only shows what is normal."""
        return (self.foreground.amax(dim=1) > 0).float()


def _surely(share: Tensor, floor: float) -> Tensor:
    """(B, R) bool: tokens that stand for a region: at least `floor` of the largest share, half a token at the most."""
    top = share.amax(dim=1, keepdim=True)
    return (share >= torch.minimum(top * floor, torch.full_like(top, 0.5 if floor < 0.9 else 1.0))) & (top > 0)


def best_cosines(target: Tensor, reference: Tensor, *sets: Tensor) -> list[Tensor]:
    """Best cosine of each target token to each set of reference tokens.

    target (B, T, D), reference (B or 1, R, D) unit vectors; sets (B or 1, R) bool. returns one (B, T) a set; a set that is empty gives
    -1, the lowest cosine.
    """
    best = [target.new_full(target.shape[:2], -1.0) for _ in sets]
    shared = len(reference) == 1 and all(len(chosen) == 1 for chosen in sets)  # one prompt for all: its set is cut out once
    for i, chosen in enumerate(sets):
        among = reference[:, chosen[0]] if shared else reference
        for part in range(0, among.shape[1], 4096):  # bounds memory at T x 4096 cosines an image
            cosine = target @ among[:, part:part + 4096].transpose(1, 2)
            if not shared:
                cosine = cosine.masked_fill(~chosen[:, None, part:part + 4096], -1.0)
            best[i] = torch.maximum(best[i], cosine.amax(dim=2).float())
    return best


def nearest_margin(target: Tensor, reference: Tensor, foreground: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """Best cosine to the prompt's foreground and to its background: nearest-patch matching, the first baseline. Two (B, T)."""
    near, far = best_cosines(target, reference, foreground, background)
    return near, far


def prototype_margin(target: Tensor, reference: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
    """Cosine to the foreground's mean minus cosine to the background's: prototype matching, the second baseline. (B, T)."""
    means = F.normalize(mask_pool(reference, torch.stack([foreground, background], dim=1).to(reference.dtype)), dim=-1)
    return (target @ (means[:, 0] - means[:, 1])[:, :, None])[..., 0].float()


class Matching(NamedTuple):
    """What training-free matching says of target tokens, (B, T) each; all of the foreground is 0 where nothing is marked."""
    best_fg: Tensor     # best cosine to the prompt's foreground
    best_bg: Tensor     # and to its background
    mean_fg: Tensor     # cosine to the foreground's mean
    mean_bg: Tensor
    fisher: Tensor      # see `fisher_score`


@torch.no_grad()
def token_matching(target: Tensor, prompt: Prompt, block: int) -> Matching:
    """Compare target tokens (B, T, D), debiased unit vectors of a tapped block (its index), with the prompt's of that block (R9)."""
    foreground, background = _surely(prompt.foreground, 0.5), _surely(prompt.background, 0.999)
    reference, marked = prompt.tokens[block], prompt.marked[:, None]
    means = mask_pool(reference, torch.stack([prompt.foreground, background.to(reference.dtype)], dim=1))
    mean_fg, mean_bg = (target @ F.normalize(means, dim=-1).transpose(1, 2)).unbind(dim=-1)
    best_fg, best_bg = nearest_margin(target, reference, foreground, background)
    direction = (prompt.fisher or fisher_directions(prompt))[block]
    return Matching(best_fg * marked, best_bg, mean_fg * marked, mean_bg, fisher_score(target, means, direction) * marked)


RELATIONS = 12  # maps a block that `relations` makes


@torch.no_grad()
def relations(target: Sequence[Tensor], prompt: Prompt, middle: int, h0: int) -> Tensor:
    """What training-free matching knows of each target token (R9): RELATIONS maps a block and two of the prompt.

    target   one (B, T, D) a block, debiased unit vectors; `middle` indexes the block whose self-similarity spreads the margins.
    returns  (B, RELATIONS * blocks + 2, H0, W0) float32, all of order one. With normal references alone every map of the
             foreground is 0, so that margins say how far a token is from all that is normal.
    """
    prompt = prompt._replace(fisher=prompt.fisher or fisher_directions(prompt))
    foreground, marked, b = _surely(prompt.foreground, 0.5), prompt.marked[:, None], len(target[0])
    spread = (target[middle] @ target[middle].transpose(1, 2) / 0.05).softmax(dim=-1)
    standard = lambda m: (m - m.mean(dim=1, keepdim=True)) / (m.std(dim=1, keepdim=True) + 1e-3)  # noqa: E731
    maps = []
    for block, tokens in enumerate(target):
        best_fg, best_bg, mean_fg, mean_bg, fisher = token_matching(tokens, prompt, block)
        margin = best_fg - best_bg
        backward = _backward_share(tokens, prompt.tokens[block], foreground) * marked
        rarity = 1 - (tokens * F.normalize(tokens.mean(dim=1, keepdim=True), dim=-1)).sum(dim=-1)
        maps += [best_fg, best_bg, 4 * margin, mean_fg, mean_bg, 4 * (mean_fg - mean_bg), fisher, standard(fisher), standard(margin),
                 4 * (spread @ margin[..., None])[..., 0], backward, rarity]
    area = (prompt.foreground.mean(dim=1, keepdim=True) + 1e-4).log10() * marked
    maps += [m.expand(b, maps[0].shape[1]) for m in (marked, area)]
    return rearrange(torch.stack(maps, dim=1), "b r (h w) -> b r h w", h=h0)


@torch.no_grad()
def fisher_directions(prompt: Prompt) -> list[Tensor]:
    """Fisher's linear discriminant between the prompt's two sides, (B, D, 1) a block, scaled so that their means lie 1 apart.

    The within-class scatter is shrunk by 0.03 of its trace: better than plain prototypes on held-out leather (mean IoU 25.2 to 22.2).
    """
    foreground, background = _surely(prompt.foreground, 0.5), _surely(prompt.background, 0.999)
    weight = (foreground | background).to(prompt.foreground.dtype)
    directions = []
    for reference in prompt.tokens:
        means = mask_pool(reference, torch.stack([prompt.foreground, background.to(reference.dtype)], dim=1))
        centred = (reference - torch.where(foreground[..., None], means[:, :1], means[:, 1:])) * weight[..., None]
        scatter = centred.transpose(1, 2) @ centred / weight.sum(dim=1)[:, None, None].clamp_min(1)
        ridge = 0.03 * scatter.diagonal(dim1=1, dim2=2).sum(dim=1) + 1e-6
        gap = (means[:, 0] - means[:, 1])[..., None]
        direction = torch.cholesky_solve(gap, torch.linalg.cholesky(scatter + torch.diag_embed(ridge[:, None].expand(gap.shape[:2]))))
        directions.append(direction / (gap * direction).sum(dim=1, keepdim=True).clamp_min(1e-6))
    return directions


def fisher_score(target: Tensor, means: Tensor, direction: Tensor) -> Tensor:
    """(B, T) place of each token along a direction of `fisher_directions`: +0.5 at the foreground's mean, -0.5 at the background's.

    target (B, T, D), means (B, 2, D), direction (B, D, 1); clamped to [-3, 3].
    """
    return ((target - means.mean(dim=1, keepdim=True)) @ direction)[..., 0].clamp(-3, 3)


def _backward_share(target: Tensor, reference: Tensor, foreground: Tensor) -> Tensor:
    """(B, T) log of how much more than its share each token is matched by the prompt's foreground tokens (softmax at 0.05)."""
    count = max(1, min(256, int(foreground.sum(dim=1).max())))
    chosen = foreground.float().topk(count, dim=1)                                       # the first `count` marked tokens
    picked = reference.gather(1, repeat(chosen.indices, "b n -> b n d", d=reference.shape[-1]))
    match = (picked @ target.transpose(1, 2) / 0.05).softmax(dim=-1) * chosen.values[..., None]
    return torch.log1p(match.sum(dim=1) / chosen.values.sum(dim=1, keepdim=True).clamp_min(1) * target.shape[1]) / 3


PIXEL = 12       # numbers that `pixel_descriptors` gives a pixel
APPEARANCE = 4   # maps that `appearance` makes


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of a (B, 1, H, W) map; the border is repeated."""
    radius = max(1, round(2.5 * sigma))
    kernel = torch.exp(-torch.arange(-radius, radius + 1, device=image.device).square() / (2 * sigma * sigma))
    kernel = kernel / kernel.sum()
    image = F.conv2d(F.pad(image, (radius, radius, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    return F.conv2d(F.pad(image, (0, 0, radius, radius), mode="replicate"), kernel.view(1, 1, -1, 1))


@torch.no_grad()
def pixel_descriptors(small: Tensor) -> Tensor:
    """What the encoder's 14 px tokens blur: local contrast at five scales, edges, texture, level, colour; on each image's own scale.

    small (B, 3, 8 H0, 8 W0) RGB in [0, 1]. returns (B, PIXEL, 4 H0, 4 W0) float32 of order one.
    """
    small = F.avg_pool2d(small.float(), 2)
    grey = small.mean(dim=1, keepdim=True)
    grey = (grey - grey.mean(dim=(2, 3), keepdim=True)) / (grey.std(dim=(2, 3), keepdim=True) + 0.03)
    scales = [grey, *(_blur(grey, sigma) for sigma in (1, 2, 4, 8, 16))]
    contrast = [fine - coarse for fine, coarse in zip(scales, scales[1:])]
    edges = []
    for weight, scale in enumerate(scales[:3], start=1):
        padded = F.pad(scale, (1, 1, 1, 1), mode="replicate")
        down, right = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1], padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
        edges.append(weight * (down.square() + right.square() + 1e-6).sqrt())
    texture = (_blur((scales[0] - scales[2]).square(), 3) + 1e-6).sqrt()
    red, green, blue = small.split(1, dim=1)
    colour = torch.cat([red - green, (red + green) / 2 - blue], dim=1)
    return torch.cat([*contrast, *edges, texture, scales[2], 8 * (colour - colour.mean(dim=(2, 3), keepdim=True))], dim=1)


@torch.no_grad()
def pixel_moments(small: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
    """Sums over each side's pixels of x x^T with x = (descriptor, 1): they add over shots, and hold count, mean and covariance.

    small (B, 3, 8 H0, 8 W0); foreground, background (B, 4 H0, 4 W0) shares. returns (B, 2, PIXEL + 1, PIXEL + 1) float32.
    """
    x = F.pad(pixel_descriptors(small).flatten(2), (0, 0, 0, 1), value=1.0)
    sides = [_surely(share.flatten(1), floor).float() for share, floor in ((foreground, 0.5), (background, 0.999))]
    return torch.stack([(x * side[:, None]) @ x.transpose(1, 2) for side in sides], dim=1)


@torch.no_grad()
def appearance(small: Tensor, moments: Tensor) -> Tensor:
    """How likely each target pixel is to belong to the prompt's two sides by its descriptor alone (R9, at stride 4).

    small (B, 3, 8 H0, 8 W0) of the target, moments (B or 1, 2, PIXEL + 1, PIXEL + 1) of the prompt.
    returns  (B, APPEARANCE, 4 H0, 4 W0) float32: linear discriminant in [-3, 3], log likelihood ratio of two Gaussians / 5 in [-4, 4],
             log Mahalanobis distance to the background in [-3, 3], and how far apart the sides lie (one number). Without a foreground
             only the third is not 0. Alone they reach what prototypes of tokens do; both together more (held-out sets: 25.6 to 27.9).
    """
    x = pixel_descriptors(small)
    shape, x = x.shape[-2:], x.flatten(2)                                                       # (B, P, N)
    count = moments[..., -1, -1]
    mean = moments[..., :-1, -1] / count.clamp_min(1e-6)[..., None]
    spread = moments[..., :-1, :-1] / count.clamp_min(1e-6)[..., None, None] - mean[..., :, None] * mean[..., None, :]
    trust = (count / (count + 100))[..., None, None]    # few pixels say little of their spread: the background's stands in
    spread = trust * spread + (1 - trust) * spread[:, 1:]
    root = torch.linalg.cholesky(spread + 0.03 * torch.eye(PIXEL, device=x.device))
    from_mean = torch.linalg.solve_triangular(root, x[:, None] - mean[..., None], upper=False).square().sum(dim=2)   # (B, 2, N)
    log_density = -0.5 * from_mean - root.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)[..., None]
    gap = (mean[:, 0] - mean[:, 1])[..., None]
    direction = torch.cholesky_solve(gap, root[:, 1])
    apart = (gap * direction).sum(dim=1)                                                        # (B, 1)
    linear = ((x - mean.mean(dim=1)[..., None]) * direction).sum(dim=1) / apart.clamp_min(1e-6)
    marked = (count[:, :1] > 0).float()
    maps = [linear.clamp(-3, 3) * marked, ((log_density[:, 0] - log_density[:, 1]) / 5).clamp(-4, 4) * marked,
            (from_mean[:, 1] / PIXEL + 0.05).log().clamp(-3, 3), (torch.log1p(apart) * marked).expand_as(linear)]
    return torch.stack(maps, dim=1).unflatten(2, shape)


# ---- 3.1 Unified framework: the in-context decoder and the mask decoder ------------------------------------------------


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a (B, C, H, W) map."""

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(super().forward(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")


class CrossAttention(nn.Module):
    """Multi-head attention with separate queries, keys and values; `bias` is added to the logits."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (rearrange(f(x), "b n (h d) -> b h n d", h=self.heads)
                   for f, x in ((self.q, queries), (self.k, keys), (self.v, values)))
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), "b h n d -> b n (h d)"))


class DecoderLayer(nn.Module):
    """Self-attention among all queries, cross-attention to F_t, feed-forward; pre-norm (Sec. 3.1, R5)."""

    def __init__(self, config: Config):
        super().__init__()
        self.prompt_attends = config.prompt_attends
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(config.dim) for _ in range(3))
        self.self_attention = CrossAttention(config.dim, config.heads)
        self.cross_attention = CrossAttention(config.dim, config.heads)
        self.content_ffn = Mlp(config.dim, config.ffn_dim)
        self.prompt_ffn = Mlp(config.dim, config.ffn_dim) if config.separate_ffn else None

    def forward(self, x: Tensor, place: Tensor, memory: Tensor, memory_place: Tensor, k: int, bias: Tensor | None) -> Tensor:
        """x, place (B, K + prompts, C): content first. memory (B, T, C). bias (B, 1, K, T) of masked attention or None."""
        y = self.norm1(x)
        x = x + self.self_attention(y + place, y + place, y)
        y = (self.norm2(x) + place)[:, :None if self.prompt_attends else k]
        if bias is not None and self.prompt_attends:
            bias = F.pad(bias, (0, 0, 0, y.shape[1] - k))  # prompts look everywhere
        seen = self.cross_attention(y, memory + memory_place, memory, bias)
        x = x + F.pad(seen, (0, 0, 0, x.shape[1] - seen.shape[1]))
        y = self.norm3(x)
        if self.prompt_ffn is None:
            return x + self.content_ffn(y)
        return x + torch.cat([self.content_ffn(y[:, :k]), self.prompt_ffn(y[:, k:])], dim=1)


def sine_positions(h0: int, w0: int, dim: int, device: torch.device) -> Tensor:
    """(H0 W0, C) two-dimensional sine encoding of the token's place, each axis scaled to 2 pi (R4)."""
    rate = 10000 ** (torch.arange(dim // 4, device=device) / (dim // 4))
    y, x = ((torch.arange(n, device=device) + 0.5)[:, None] / n * 2 * math.pi * 10 / rate for n in (h0, w0))
    axis = lambda a: torch.cat([a.sin(), a.cos()], dim=1)  # noqa: E731
    return torch.cat([repeat(axis(y), "h c -> (h w) c", w=w0), repeat(axis(x), "w c -> (h w) c", h=h0)], dim=1)


class ResidualConv(nn.Module):
    def __init__(self, dim: int, dilation: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm1, self.norm2 = ChannelNorm(dim), ChannelNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.gelu(self.norm2(self.conv1(F.gelu(self.norm1(x))))))


class RelationNet(nn.Module):
    """Reads how the target relates to the prompt, never what either looks like (R9): this carries over to new parts.

    Token maps at (H0, W0) and pixel maps at (4 H0, 4 W0) -> (B, dim, H0, W0) for the decoder's memory and (B, dim / 2, 4 H0, 4 W0)
    for P_t, with an image stem for thin defects, and the logit of a dense mask.
    """

    def __init__(self, channels: int, dim: int):
        super().__init__()
        half = dim // 2
        self.enter = nn.Conv2d(channels + APPEARANCE, dim, 1)
        self.trunk = nn.Sequential(ResidualConv(dim), ResidualConv(dim, 2), ResidualConv(dim))
        self.up1, self.up2 = nn.ConvTranspose2d(dim, half, 2, 2), nn.ConvTranspose2d(half, half, 2, 2)
        self.stem1 = nn.Conv2d(3, half, 5, 2, padding=2)     # 8 H0 -> 4 H0
        self.stem2 = nn.Conv2d(half, half, 3, padding=1)
        self.mix = nn.Sequential(nn.Conv2d(2 * half + APPEARANCE, half, 3, padding=1), ResidualConv(half), ResidualConv(half, 2))
        self.norm, self.logit = ChannelNorm(half), nn.Conv2d(half, 1, 1)

    def forward(self, relations: Tensor, looks: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """relations (B, R, H0, W0); looks (B, APPEARANCE, 4 H0, 4 W0); image (B, 3, 8 H0, 8 W0) RGB.

        returns token map, pixel map, (B, 4 H0, 4 W0) logits.
        """
        # each image on its own scale: what counts is the local contrast, not the light
        image = (image - image.mean(dim=(1, 2, 3), keepdim=True)) / (image.std(dim=(1, 2, 3), keepdim=True) + 0.05)
        tokens = self.trunk(self.enter(torch.cat([relations, F.avg_pool2d(looks, 4)], dim=1)))
        fine = self.stem2(F.gelu(self.stem1(image)))
        coarse = self.up2(F.gelu(self.up1(F.gelu(tokens))))
        pixels = F.gelu(self.norm(self.mix(torch.cat([coarse, fine, looks.to(fine.dtype)], dim=1))))
        return tokens, pixels, self.logit(pixels)[:, 0].float()


class Decoded(NamedTuple):
    """What the decoder says of B targets; K content queries, N prompts. Everything float32."""
    content: list[Tensor]      # (B, K, C) after each layer
    classes: list[Tensor]      # (B, N + 3, C) after each layer: prompts, other, foreground, background
    pixels: Tensor             # (B, P, 4 H0, 4 W0): P_t
    relation_logits: Tensor    # (B, 4 H0, 4 W0): the dense mask of the relation net; zeros without correspondence


class Decoder(nn.Module):
    """Everything that is trained: neck, relation net, in-context decoder, mask decoder, classifiers (Sec. 3.1)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, dim = config, config.dim
        width = ENCODERS[config.encoder.removesuffix("-reg")][0] * len(config.blocks)
        self.neck = nn.Sequential(nn.Conv2d(width, dim, 1), ChannelNorm(dim), nn.Conv2d(dim, dim, 3, padding=1), ChannelNorm(dim))
        self.type_embed = nn.Parameter(torch.randn(5, dim) * 0.02)      # content, prompt, other, foreground, background
        self.learned = nn.Parameter(torch.randn(2, dim) * 0.02)         # Q_fg, Q_bg
        self.content_embed = nn.Parameter(torch.randn(config.queries, dim) * 0.02) if config.learned_queries else None
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(dim)
        self.mask_embed = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, config.pixel_dim))
        self.up = nn.Sequential(nn.ConvTranspose2d(dim, config.pixel_dim, 2, 2), ChannelNorm(config.pixel_dim), nn.GELU(),
                                nn.ConvTranspose2d(config.pixel_dim, config.pixel_dim, 2, 2))
        self.class_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # cosine x exp(scale), at most 100 (R10)
        if config.correspondence:
            self.relation = RelationNet(RELATIONS * len(config.blocks) + 2, config.relation_dim)
            self.relation_to_memory = nn.Conv2d(config.relation_dim, dim, 1)
            self.relation_to_pixels = nn.Conv2d(config.relation_dim // 2, config.pixel_dim, 1)

    def prompt_queries(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Q_p^0 and Q_ntp^0, (B, 1, C) each. Without a marked anomaly Q_fg stands for Q_p."""
        pooled = mask_pool(prompt.neck, torch.stack([prompt.foreground, prompt.background], dim=1).to(prompt.neck.dtype))
        marked = prompt.marked[:, None, None]
        return pooled[:, :1] * marked + self.learned[0] * (1 - marked), pooled[:, 1:]

    def forward(self, neck: Tensor, image: Tensor, prompt: Prompt, relations: Tensor, looks: Tensor, picked: Tensor) -> Decoded:
        """neck (B, C, H0, W0), image (B, 3, 8 H0, 8 W0), relations and looks as in `RelationNet`, picked (B, K) token indices."""
        b, _, h0, w0 = neck.shape
        memory, pixels = neck, self.up(neck)
        logits = neck.new_zeros((b, 4 * h0, 4 * w0))
        if self.config.correspondence:
            tokens, fine, logits = self.relation(relations, looks, image)
            memory, pixels = memory + self.relation_to_memory(tokens), pixels + self.relation_to_pixels(fine)
        pixels = pixels.float()
        memory = rearrange(memory, "b c h w -> b (h w) c")
        memory_place = sine_positions(h0, w0, self.config.dim, neck.device).to(memory.dtype)
        content, place = self.content_init(memory, memory_place, picked)
        k = content.shape[1]
        prompts = [q.expand(b, -1, -1) for q in (*self.prompt_queries(prompt), *self.learned[:, None, None])]
        x = torch.cat([content, *prompts], dim=1)
        types = repeat(self.type_embed[1:], "n c -> b n c", b=b)
        place = torch.cat([place + self.type_embed[0], types.to(place.dtype)], dim=1)
        contents, classes, bias = [], [], None
        for layer in self.layers:
            if self.config.masked_attention and contents:
                bias = self.attention_bias(contents[-1], pixels, h0)
            x = layer(x, place, memory, memory_place, k, bias)
            y = self.norm(x).float()
            contents.append(y[:, :k])
            classes.append(y[:, k:])
        return Decoded(contents, classes, pixels, logits)

    def content_init(self, memory: Tensor, memory_place: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
        """Q_c^0 and its position: the picked tokens of F_t (Alg. 1), or learned vectors without a place."""
        if self.content_embed is not None:
            content = repeat(self.content_embed, "k c -> b k c", b=len(memory)).to(memory.dtype)
            return content, torch.zeros_like(content)
        return memory.gather(1, repeat(picked, "b k -> b k c", c=memory.shape[-1])), memory_place[picked]

    def mask_logits(self, content: Tensor, pixels: Tensor) -> Tensor:
        """(B, K, ...) logits of script M_t = sigmoid(Q_c . P_t); pixels (B, P, ...)."""
        return torch.einsum("bkp,bp...->bk...", self.mask_embed(content).to(pixels.dtype), pixels)

    def attention_bias(self, content: Tensor, pixels: Tensor, h0: int) -> Tensor:
        """(B, 1, K, T): -inf outside each query's current mask; a query without any mask sees everything (R6)."""
        coarse = F.adaptive_avg_pool2d(pixels, (h0, pixels.shape[-1] * h0 // pixels.shape[-2]))
        inside = self.mask_logits(content, coarse).flatten(2) > 0
        inside = inside | ~inside.any(dim=-1, keepdim=True)
        return torch.zeros(inside.shape, device=inside.device).masked_fill(~inside, -torch.inf)[:, None]

    def class_logits(self, content: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both classifiers (Sec. 3.2): over {Q_p, Q_ntp, Q_bg} and over {Q_fg, Q_ntp, Q_bg}; two (B, K, 3)."""
        scale = self.class_scale.exp().clamp(max=100)
        cosine = scale * F.normalize(content, dim=-1) @ F.normalize(classes, dim=-1).transpose(1, 2)
        prompt, other, foreground, background = cosine.unbind(dim=-1)
        return torch.stack([prompt, other, background], dim=-1), torch.stack([foreground, other, background], dim=-1)


# ---- 3.2 Objective ---------------------------------------------------------------------------------------------------


def match(class_probs: Tensor, mask_logits: Tensor, truth_class: Tensor, truth_masks: Tensor) -> tuple[Tensor, Tensor]:
    """Bipartite matching of Eq. 1 for one image: queries and truths of least total cost (R12, R13).

    class_probs (2, K, 3) of both classifiers, mask_logits (K, P) at sampled points, truth_class (N,) 0 prompted or 1 other,
    truth_masks (N, P) in [0, 1]. returns two int64 (min(K, N),): query index, truth index.
    """
    # SciPy needs float64 on the CPU: bf16 costs tie and the match changes
    cost = -2 * class_probs[:, :, truth_class].sum(dim=0).double() + 5 * _pair_bce(mask_logits, truth_masks) + \
        5 * _pair_dice(mask_logits, truth_masks)
    if not torch.isfinite(cost).all():
        raise ValueError("fit: a mask or class of the decoder is not finite; lower lr, or check that the images and weights are finite")
    rows, columns = scipy.optimize.linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(rows, device=mask_logits.device), torch.as_tensor(columns, device=mask_logits.device)


def _pair_bce(logits: Tensor, truths: Tensor) -> Tensor:
    """(K, N) mean binary cross-entropy of every query with every truth."""
    return (F.softplus(logits).mean(dim=1)[:, None] - logits @ truths.T / logits.shape[1]).double()


def _pair_dice(logits: Tensor, truths: Tensor) -> Tensor:
    """(K, N) dice loss, 1 - (2 overlap + 1) / (sizes + 1), of every query with every truth."""
    probs = logits.sigmoid()
    return (1 - (2 * probs @ truths.T + 1) / (probs.sum(dim=1)[:, None] + truths.sum(dim=1)[None] + 1)).double()


def mask_loss(logits: Tensor, truths: Tensor) -> Tensor:
    """(N,) BCE x 5 + dice x 5 of mask logits (N, P) against truths (N, P) in [0, 1] (R12)."""
    probs = logits.sigmoid()
    dice = 1 - (2 * (probs * truths).sum(dim=1) + 1) / (probs.sum(dim=1) + truths.sum(dim=1) + 1)
    return 5 * F.binary_cross_entropy_with_logits(logits, truths, reduction="none").mean(dim=1) + 5 * dice


class Truths(NamedTuple):
    """Segments of one target: masks (N, 4 H0, 4 W0) in [0, 1]; classes (N,) 0 prompted label, 1 other (R11)."""
    masks: Tensor
    classes: Tensor


def objective(decoder: Decoder, decoded: Decoded, marked: Tensor, truths: Sequence[Truths], points: Tensor,
              totals: Tensor | None = None) -> dict[str, Tensor]:
    """Eq. 1 over every layer (deep supervision), and the relation net's dense mask. Returns the loss parts, to be summed.

    marked      (B,) 1.0 where the prompt marks an anomaly: only there the first classifier is trained.
    points      (P,) indices of the flattened (4 H0, 4 W0) grid where masks are compared, shared by all.
    totals      what each part is divided by, from `loss_totals` over all ranks; by default that of this batch.
    """
    pixels = decoded.pixels.flatten(2)[..., points]
    sampled = [t.masks.flatten(1)[:, points] for t in truths]
    totals = loss_totals(truths, marked > 0, decoded.content[0].shape[1]) if totals is None else totals
    total = totals.to(pixels.device).clamp_min(1)
    no_object = torch.tensor([1.0, 1.0, 0.1], device=pixels.device)  # R12
    parts = {name: pixels.new_zeros(()) for name in ("target", "other", "mask", "dense")}
    for content, classes in zip(decoded.content, decoded.classes):
        masks = decoder.mask_logits(content, pixels)
        logits = decoder.class_logits(content, classes)
        probs = torch.stack(logits).softmax(dim=-1).detach()
        wanted = torch.full(masks.shape[:2], 2, device=masks.device)  # unmatched queries belong to Q_bg
        for i, truth in enumerate(truths):
            rows, columns = match(probs[:, i], masks[i].detach(), truth.classes, sampled[i])
            wanted[i, rows] = truth.classes[columns]
            parts["mask"] = parts["mask"] + mask_loss(masks[i, rows], sampled[i][columns]).sum() / total[0]
        for name, logit, counts, whole in zip(("target", "other"), logits, (marked, torch.ones_like(marked)), total[1:3]):
            each = F.cross_entropy(logit.flatten(0, 1), wanted.flatten(), no_object, reduction="none").view(wanted.shape)
            parts[name] = parts[name] + 2 * (each * counts[:, None]).sum() / whole
    if decoder.config.correspondence:
        parts["dense"] = dense_loss(decoded.relation_logits, truths, total[3])
    return parts


def dense_loss(logits: Tensor, truths: Sequence[Truths], pairs: Tensor | int) -> Tensor:
    """Mask loss of the relation net's (B, 4 H0, 4 W0) logits against the prompted label, over all `pairs`."""
    wanted = torch.stack([t.masks[t.classes == 0].amax(dim=0) if (t.classes == 0).any() else torch.zeros_like(t.masks[0]) for t in truths])
    return mask_loss(logits.flatten(1), wanted.flatten(1)).sum() / pairs


def loss_totals(truths: Sequence[Truths], marked: Tensor, queries: int) -> Tensor:
    """(4,): matched masks, class weights of either classifier, pairs. Known before the forward pass: every truth is matched while
    there are queries left, and the others weigh 0.1 (R12)."""
    matched = torch.tensor([min(queries, len(t.classes)) for t in truths], dtype=torch.float32)
    weights = matched + 0.1 * (queries - matched)
    return torch.stack([matched.sum(), (weights * marked.cpu()).sum(), weights.sum(), torch.tensor(float(len(truths)))])


def count_queries(config: Config, maps: Tensor) -> int:
    """K, or the number of tokens where there are fewer to pick from."""
    return config.queries if config.learned_queries else min(config.queries, maps.shape[-2] * maps.shape[-1])


# ---- The model -------------------------------------------------------------------------------------------------------


class Features(NamedTuple):
    """What the frozen encoder and the decoder's stem need of B images of one size."""
    maps: Tensor    # (B, blocks * D, H0, W0): F of every tapped block, after the final LayerNorm
    small: Tensor   # (B, 3, 8 H0, 8 W0) RGB in [0, 1], for the image stem


EQUAL = [0.3] * 7 + [0.0]  # fusion weights before they are learned: of the seven terms of `evidence`, and the offset
FUSIONS = ("fusion_marked", "fusion_clicks", "fusion_normal")  # for marked prompts, for clicks, for good parts alone


class ICAS(nn.Module):
    """Frozen encoder, trained decoder and the weights of the score fusion. `load` makes one; the entry points use it."""

    def __init__(self, config: Config = Config()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder, config.patch_size)
        self.decoder = Decoder(config)
        # log-odds = evidence . weight[:-1] + weight[-1] (R18); the first two learned on held-out sets
        self.register_buffer("fusion_marked", torch.tensor(EQUAL))
        self.register_buffer("fusion_clicks", torch.tensor(EQUAL))
        self.register_buffer("fusion_normal", torch.tensor([0.3] * 3 + [0.0] * 5))
        self.encoder_sha256 = ""  # of the file that the encoder came from; set by `load`
        self._bases: dict[tuple[int, int], list[Tensor] | list[None]] = {}

    @property
    def device(self) -> torch.device:
        return self.encoder.cls_token.device

    @property
    def middle(self) -> int:
        """Index of the tapped block in which cosines are taken: the last but one (R1)."""
        return max(0, len(self.config.blocks) - 2)

    def state(self, name: str) -> tuple:
        """Key for what was computed with these weights: it holds the model, and changes when the decoder is trained."""
        return self, name, sum(p._version for p in self.decoder.parameters())

    def autocast(self) -> torch.autocast:
        """bf16 where the device gains from it, else float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=fast_bf16(self.device))

    @torch.no_grad()
    def bases(self, h0: int, w0: int) -> list[Tensor] | list[None]:
        """Positional bases of a token grid, one a tapped block; computed once and kept (R2)."""
        if not self.config.debias:
            return [None] * len(self.config.blocks)
        if (h0, w0) not in self._bases:
            with torch.autocast(self.device.type, enabled=False):
                self._bases[h0, w0] = positional_basis(self.encoder, h0, w0, self.config.blocks, self.config.debias)
        return self._bases[h0, w0]

    @torch.no_grad()
    def describe(self, images: Tensor) -> Features:
        """Encode (B, 3, H, W) RGB in [0, 1], sides multiples of the patch."""
        with self.autocast():
            maps = torch.cat(self.encoder(images, self.config.blocks), dim=1)
        h0, w0 = maps.shape[-2:]
        return Features(maps, F.interpolate(images, size=(8 * h0, 8 * w0), mode="bilinear", antialias=True))

    def tokens(self, maps: Tensor) -> list[Tensor]:
        """(B, blocks * D, H0, W0) -> one (B, T, D) of debiased unit vectors a block."""
        split = rearrange(maps, "b (n d) h w -> n b d h w", n=len(self.config.blocks))
        return [unit_tokens(m, basis) for m, basis in zip(split, self.bases(*maps.shape[-2:]))]

    def neck(self, maps: Tensor) -> Tensor:
        """(B, C, H0, W0) float32."""
        with self.autocast():
            return self.decoder.neck(maps.float()).float()

    def decode(self, tokens: Sequence[Tensor], neck: Tensor, small: Tensor, prompt: Prompt,
               gqs: bool = True) -> tuple[Decoded, Tensor]:
        """Decoder, and appearance maps, of B targets against one prompt. `gqs=False`: evenly spaced tokens (or the learned queries).

        Relation and appearance maps are those of the prompt as it lies: of turned copies too, the relation net marks more, on good parts
        as well (eight training sets with good images, false marks on these counted: mean IoU 40.6 so, 38.4 with all copies)."""
        lying = prompt.lying or prompt
        maps, looks = relations(tokens, lying, self.middle, neck.shape[-2]), appearance(small, lying.moments)
        count = count_queries(self.config, neck)
        if self.config.learned_queries or not gqs:
            even = torch.linspace(0, tokens[0].shape[1] - 1, count, device=neck.device).round().long()
            picked = even.expand(len(neck), -1)
        else:
            with torch.no_grad():
                picked = greedy_queries(tokens[self.middle], count)
        with self.autocast():
            return self.decoder(neck, small, prompt, maps, looks, picked), looks


# ---- 3.3 Training ----------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """B pairs of one grid, encoded. A pair with an all-zero foreground shows only what is normal."""
    target: Features
    reference: Tensor        # (B, S, blocks * D, H0, W0), S shots
    foreground: Tensor       # (B, S, H0, W0) share of the prompted label in the reference
    background: Tensor       # (B, S, H0, W0) share of what is surely not it
    moments: Tensor          # (B, 2, PIXEL + 1, PIXEL + 1) of the reference, see `pixel_moments`
    hidden: Tensor           # (B,) 1.0 where raw features are hidden from the decoder, so that it leans on relations, which carry over
    truths: list[Truths]     # segments of each target


def pair_loss(model: ICAS, batch: Batch, generator: torch.Generator, totals: Tensor | None = None) -> dict[str, Tensor]:
    """Loss parts of one batch of pairs, to be summed; `totals` as in `objective`."""
    b, _, _, h0, w0 = batch.reference.shape
    reference, seen = batch.reference.flatten(0, 1), (1 - batch.hidden)[:, None, None]
    target_neck, reference_neck = model.neck(torch.cat([batch.target.maps, reference])).tensor_split([b])
    pool = lambda x: rearrange(x, "(b s) t d -> b (s t) d", b=b)  # noqa: E731
    prompt = Prompt([pool(t) for t in model.tokens(reference)], pool(rearrange(reference_neck, "n c h w -> n (h w) c")) * seen,
                    batch.foreground.flatten(1), batch.background.flatten(1), batch.moments)
    decoded, _ = model.decode(model.tokens(batch.target.maps), target_neck * seen[..., None], batch.target.small, prompt)
    # one pixel of every 2 x 2: sampled points (R12) that miss no defect of two pixels
    y, x = (2 * torch.arange(2 * n)[:, None] + torch.randint(2, (2 * n, 2 * m), generator=generator) for n, m in ((h0, w0), (w0, h0)))
    points = (y * 4 * w0 + x.T).flatten().to(target_neck.device)
    return objective(model.decoder, decoded, prompt.marked, batch.truths, points, totals)


def fit(model: ICAS, batches: Callable[[int], Batch | Sequence[Batch]], *, steps: int, lr: float = 1e-4, weight_decay: float = 0.05,
        warmup: int = 100, clip: float = 1.0, seed: int = 0, start: int = 0,
        optimizer: torch.optim.Optimizer | None = None,
        callback: Callable[[int, dict[str, float], torch.optim.Optimizer], Any] | None = None) -> ICAS:
    """Train the decoder in place; both stages are this loop on other pairs (Sec. 3.3, R16).

    batches    gives the pairs of step i, a function of i alone, so that a run that resumes at `start` sees what it would have; several
               batches are accumulated into one step. Under torch.distributed each rank gives its share, and gradients are summed:
               losses are divided by what all ranks and batches hold, so that any division of the pairs gives the same step.
    lr         AdamW (0.9, 0.999): linear warm-up, then linear decay to 0 at `steps`; no decay of norms, biases and embeddings.
    callback   called after each step with its number, the loss parts and the optimizer; a true result ends the training.
    returns    the model, in eval mode.
    Raises ValueError if the loss or its gradient is not finite.
    """
    import torch.distributed as dist
    optimizer = optimizer or make_optimizer(model.decoder, lr, weight_decay)
    parameters = list(model.decoder.parameters())
    model.decoder.train()
    for step in range(start, steps):
        rate = lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = rate
        given = batches(step)
        given = [given] if isinstance(given, Batch) else list(given)
        totals = torch.stack([loss_totals(b.truths, b.foreground.flatten(1).amax(dim=1) > 0, count_queries(model.config, b.reference))
                              for b in given]).sum(dim=0).to(model.device)  # NCCL sums on the GPU
        if dist.is_initialized():
            dist.all_reduce(totals)
        optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for batch in given:
            parts = pair_loss(model, batch, torch.Generator().manual_seed(seed * 1_000_003 + step), totals)
            sum(parts.values()).backward()
            sums = {k: sums.get(k, 0) + v.detach() for k, v in parts.items()}
        values = torch.stack(list(sums.values()))
        if dist.is_initialized():
            dist.all_reduce(values)
            for p in parameters:
                if p.grad is not None:  # what a step leaves out, it leaves out on every rank
                    dist.all_reduce(p.grad)
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        if not torch.isfinite(torch.stack([values.sum(), norm])).all():
            raise ValueError(f"fit: the loss of step {step} is {values.sum().item()}, the norm of its gradient {norm.item()}; lower lr={lr} or "
                             "check that batch's masks")
        optimizer.step()
        if callback and callback(step, {"loss": values.sum().item()} | dict(zip(sums, values.tolist())), optimizer):
            break
    model.eval()
    return model


def make_optimizer(decoder: Decoder, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices and kernels only (R16)."""
    free = {"learned", "type_embed", "content_embed"}
    decayed = [p for n, p in decoder.named_parameters() if p.ndim > 1 and n not in free]
    rest = [p for n, p in decoder.named_parameters() if p.ndim <= 1 or n in free]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}], lr=lr)


# ---- 3.4 Inference: scores ---------------------------------------------------------------------------------------------


def claimed(values: Tensor, weights: Tensor, masks: Tensor, plain_sum: bool = False) -> Tensor:
    """sum_i values_i M_i / sum_i weights_i M_i (R17), 0 where the masks claim nothing; or the paper's plain sum of the first.

    values, weights (B, K); masks (B, K, H, W) in [0, 1]. returns (B, H, W), in the range of values / weights.
    """
    top = torch.einsum("bk,bkhw->bhw", values, masks)
    if plain_sum:
        return top
    whole = torch.einsum("bk,bkhw->bhw", weights, masks)
    return torch.where(whole > 1e-6, top / whole.clamp_min(1e-6), torch.zeros_like(top))


class Scores(NamedTuple):
    """Section 3.4 for B targets, each (B, 4 H0, 4 W0) float32; higher is more anomalous in all."""
    semantic: Tensor       # S_s in [0, 1]: the prompt's share of what the masks claim
    semantic_mfm: Tensor   # S_s^mfm in [0, 1]: mask-level feature matching with the prompt's two sides
    normal: Tensor         # S_n in [0, 1]: the same with Q_fg, for normal references
    normal_mfm: Tensor     # S_n^mfm in [0, 2]: cosine distance of each mask to the nearest mask of the references
    relation: Tensor       # logit of the relation net's dense mask
    margin: Tensor         # token-level matching: best foreground minus best background cosine, in [-2, 2]
    prototype: Tensor      # the same of the means
    fisher: Tensor         # Fisher's discriminant, in [-3, 3]
    pixel: Tensor          # the same of pixel descriptors: the first map of `appearance`, in [-3, 3]


def semantic_mfm(mask_features: Tensor, prompt: Tensor, other: Tensor, temperature: float) -> Tensor:
    """softmax(Q_p^0 . Q_m | Q_p^0, Q_ntp^0) (Sec. 3.4, R18): (B, K, D) with (B or 1, N, D) and (B or 1, N', D) -> (B, K)."""
    both = torch.cat([prompt, other], dim=1).transpose(1, 2)
    return (mask_features @ both / temperature).softmax(dim=-1)[..., :prompt.shape[1]].sum(dim=-1)


def normal_mfm(mask_features: Tensor, reference_masks: Tensor) -> Tensor:
    """min_j 1 - <Q_m^i, Q_r^j> (Sec. 3.4): unit (B, K, D) with (B or 1, J, D) -> (B, K) in [0, 2]."""
    return 1 - (mask_features @ reference_masks.transpose(1, 2)).amax(dim=-1)


def mask_scores(decoder: Decoder, decoded: Decoded, tokens: Tensor, prompt: Prompt, middle: int, reference_masks: Tensor | None = None,
                mfm: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S_s, S_s^mfm, S_n, S_n^mfm of section 3.4, (B, 4 H0, 4 W0) each. tokens (B, T, D) are the target's of the middle block.

    reference_masks (1, J, D) unit vectors Q_r; without them the pooled Q_ntp^0 stands in. `mfm=False` repeats S in S^mfm's place.
    """
    config = decoder.config
    logits = decoder.class_logits(decoded.content[-1], decoded.classes[-1])
    (p_prompt, _, p_bg), (p_fg, _, n_bg) = (x.softmax(dim=-1).unbind(dim=-1) for x in logits)
    masks = decoder.mask_logits(decoded.content[-1], decoded.pixels).sigmoid()
    s_semantic = claimed(p_prompt, 1 - p_bg, masks, config.plain_sum)
    s_normal = claimed(p_fg, 1 - n_bg, masks, config.plain_sum)
    if not mfm:
        return s_semantic, s_semantic, s_normal, s_normal
    pooled = F.normalize(mask_pool(tokens, F.avg_pool2d(masks, 4).flatten(2)), dim=-1)   # Q_m
    shares = torch.stack([prompt.foreground, prompt.background], dim=1)
    sides = F.normalize(mask_pool(prompt.tokens[middle], shares), dim=-1)
    likeness = semantic_mfm(pooled, sides[:, :1], sides[:, 1:], config.temperature)
    distance = normal_mfm(pooled, sides[:, 1:] if reference_masks is None else reference_masks)
    weight_s, weight_n = (1.0, 1.0) if config.plain_sum else (1 - p_bg, 1 - n_bg)
    s_mfm = claimed(likeness * weight_s, 1 - p_bg, masks, config.plain_sum)
    n_mfm = claimed(distance * weight_n, 1 - n_bg, masks, config.plain_sum)
    return s_semantic, s_mfm, s_normal, n_mfm


def score(decoder: Decoder, decoded: Decoded, tokens: Tensor, prompt: Prompt, looks: Tensor, middle: int,
          reference_masks: Tensor | None = None, mfm: bool = True) -> Scores:
    """All scores of section 3.4. looks: the target's maps of `appearance`; the rest as in `mask_scores`."""
    by_mask = mask_scores(decoder, decoded, tokens, prompt, middle, reference_masks, mfm)
    m, size = token_matching(tokens, prompt, middle), by_mask[0].shape[-2:]
    coarse = torch.stack([m.best_fg - m.best_bg, m.mean_fg - m.mean_bg, m.fisher], dim=1)
    fine = F.interpolate(coarse.unflatten(2, (size[0] // 4, -1)), size=size, mode="bilinear")
    return Scores(*by_mask, decoded.relation_logits, *fine.unbind(dim=1), looks[:, 0])


def evidence(scores: Scores, marked: bool) -> Tensor:
    """(B, 7, H, W) terms of the fused log-odds (R18), all of order one; with or without a marked anomaly."""
    log_odds = lambda p: torch.logit(p.clamp(0.01, 0.99))  # noqa: E731
    if marked:
        terms = [log_odds(scores.semantic), log_odds(scores.semantic_mfm), scores.relation, scores.margin * 20,
                 scores.prototype * 10, scores.fisher * 4, scores.pixel * 4]
    else:
        terms = [log_odds(scores.normal), scores.normal_mfm * 10, scores.relation, scores.margin * 20, scores.prototype * 10,
                 torch.zeros_like(scores.fisher), torch.zeros_like(scores.pixel)]
    return torch.stack(terms, dim=1)


def fast_bf16(device: str | torch.device) -> bool:
    """Whether bf16 autocast is worth it: on CUDA always, on a CPU if it has avx512_bf16 or amx (METHOD 7)."""
    if torch.device(device).type != "cpu":
        return torch.device(device).type == "cuda"
    return any(getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def fuse(model: ICAS, scores: Scores, marked: bool, clicked: bool = False) -> Tensor:
    """(B, 4 H0, 4 W0) log-odds that a pixel is anomalous (R18); with `plain_sum`, the paper's S + S^mfm, clipped to [0, 1].

    clicked  the prompt is clicks: token matching, which knows little of the rest of the image then, weighs less.
    """
    if model.config.plain_sum:
        total = scores.semantic + scores.semantic_mfm if marked else scores.normal + scores.normal_mfm
        return torch.logit(total.clamp(1e-4, 1 - 1e-4))
    weight = model.fusion_normal if not marked else model.fusion_clicks if clicked else model.fusion_marked
    return torch.einsum("bnhw,n->bhw", evidence(scores, marked), weight[:-1]) + weight[-1]


def top_share(token_map: Tensor, share: float = 0.01) -> Tensor:
    """Image score (R20): mean of the top 1 % of a (B, H0, W0) map, at least one token. returns (B,)."""
    flat = token_map.flatten(1)
    return flat.topk(max(1, round(flat.shape[1] * share)), dim=1).values.mean(dim=1)


# ---- 3.4 Inference: images in --------------------------------------------------------------------------------------------


def to_rgb(image: Any, name: str = "image", value_range: tuple[float, float] | None = None) -> Tensor:
    """Any picture as an (H, W, 3) uint8 RGB tensor on the CPU.

    image        path, PIL image, (H, W), (H, W, 3) or (H, W, 4) array, or (3, H, W) tensor; uint8, or float tensors in [0, 1].
                 Grey is repeated over the channels, alpha is laid over white, palettes and bilevel images are expanded.
    value_range  (low, high) that become 0 and 255: needed for 16-bit and other wide images, which have no fixed white.
    Raises FileNotFoundError, TypeError or ValueError, with `name` in the message.
    """
    if isinstance(image, (str, os.PathLike)):
        image, name = open_image(image, name), f"{name} {os.fspath(image)!r}"
    if hasattr(image, "getbands"):  # PIL
        image = _pil_array(_read_pixels(image, name))
    if not isinstance(image, (np.ndarray, Tensor)):
        raise TypeError(f"{name}: expected a path, PIL image, NumPy array or tensor, got {type(image).__name__}")
    x = image.detach().cpu() if isinstance(image, Tensor) else torch.from_numpy(np.ascontiguousarray(_native(image, name)))
    if isinstance(image, Tensor):
        if x.ndim != 3 or x.shape[0] != 3:
            raise ValueError(f"{name}: expected a (3, H, W) tensor, got shape {tuple(x.shape)}; a NumPy array may be (H, W, 3)")
        x = x.permute(1, 2, 0)
    if x.ndim == 2:
        x = x[..., None]
    if x.ndim != 3 or x.shape[-1] not in (1, 3, 4) or 0 in x.shape:
        raise ValueError(f"{name}: expected (H, W), (H, W, 3) or (H, W, 4) with at least one pixel, got shape {tuple(image.shape)}")
    if value_range is not None:
        if not isinstance(value_range, (tuple, list)):
            raise TypeError(f"value_range: expected (low, high), got {value_range!r}")
        if len(value_range) != 2 or not all(isinstance(v, numbers.Real) for v in value_range) or not value_range[0] < value_range[1]:
            raise ValueError(f"value_range: expected (low, high) with low < high, got {value_range}")
        low, high = value_range
        x = ((x.double() - low) / (high - low)).clamp(0, 1)
    elif x.is_floating_point() and isinstance(image, Tensor):
        if not (x.min() >= 0 and x.max() <= 1):
            raise ValueError(f"{name}: expected a float tensor in [0, 1], got [{x.min():.3g}, {x.max():.3g}] "
                             "(or NaN); pass uint8, or to_rgb(image, value_range=(low, high))")
    elif x.dtype != torch.uint8:
        raise ValueError(f"{name}: expected 8-bit values (uint8), got {image.dtype}; say what is black and white with "
                         "to_rgb(image, value_range=(low, high)), or --range LOW HIGH on the command line")
    if x.is_floating_point():
        if not torch.isfinite(x).all():
            raise ValueError(f"{name}: expected finite values, got NaN or infinity; replace them first")
        x = (x * 255).round().to(torch.uint8)
    if x.shape[-1] == 4:
        alpha = x[..., 3:].float() / 255
        x = (x[..., :3].float() * alpha + 255 * (1 - alpha)).round().to(torch.uint8)
    return x.expand(-1, -1, 3).contiguous()


def _native(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype.kind not in "buif":
        raise TypeError(f"{name}: expected numbers, got an array of dtype {array.dtype}; pass uint8")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        raise TypeError(f"{name}: expected at most 64-bit floats, got {array.dtype}; use .astype('float32')")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:  # torch knows few operations on wide unsigned integers
        return array.astype(np.int64)
    return array.astype(array.dtype.newbyteorder("="))


def open_image(path: str | os.PathLike, name: str):
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError('reading image files needs Pillow: pip install "icas[images]"; or pass arrays') from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name}: no file at {os.fspath(path)!r}")
    try:
        image = Image.open(path)
        image.load()
        return ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: {os.fspath(path)!r} is not a readable image ({error}); save it as PNG or JPEG") from error


def _read_pixels(image, name: str):
    """PIL opens files lazily: read now, where the error can name the argument."""
    try:
        image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name}: the image cannot be read ({error}); save it again as PNG or JPEG") from error
    return image


def _pil_array(image) -> np.ndarray:
    if image.mode in ("P", "PA", "LA", "La", "RGBa") or "transparency" in image.info and image.mode in ("L", "RGB"):
        image = image.convert("RGBA")
    elif image.mode in ("1", "CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    return np.array(image)


def to_mask(mask: Any, shape: tuple[int, int], name: str = "mask") -> Tensor:
    """A mask as an (H, W) bool tensor: anything not 0 is marked. Same kinds of input as `to_rgb`; must have the image's size."""
    if isinstance(mask, (str, os.PathLike)):
        mask, name = open_image(mask, name), f"{name} {os.fspath(mask)!r}"
    if hasattr(mask, "getbands"):
        mask = _read_pixels(mask, name)
        mask = np.array(mask.convert("RGB") if mask.mode not in ("1", "L", "P", "I", "I;16", "F") else mask)
    if not isinstance(mask, (np.ndarray, Tensor)):
        raise TypeError(f"{name}: expected a path, PIL image, NumPy array or tensor, got {type(mask).__name__}")
    x = mask.detach().cpu() if isinstance(mask, Tensor) else torch.from_numpy(np.ascontiguousarray(_native(mask, name)))
    if x.ndim == 3 and isinstance(mask, np.ndarray) and x.shape[-1] in (2, 4):
        x = x[..., :-1]  # alpha says what is opaque, not what is marked
    x = x != 0
    if x.ndim == 3:
        x = x.any(dim=0 if isinstance(mask, Tensor) else -1)
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected the image's size {tuple(shape)} (height, width), got {tuple(x.shape)}; "
                         "resize it with nearest-neighbour interpolation")
    if not x.any():
        raise ValueError(f"{name}: nothing is marked in it (all 0); mark at least one pixel, or pass the image in normals=")
    return x


class Tile(NamedTuple):
    """A part of an image at one token grid."""
    box: tuple[int, int, int, int]   # y0, y1, x0, x1 in pixels of the image
    features: Features               # of one image, B = 1


def token_grid(h: int, w: int, config: Config) -> tuple[int, int]:
    """Tokens of an image: its aspect ratio, and about (image_size / 14)^2 in all (R22)."""
    side, aspect = config.image_size / config.patch_size, math.sqrt(h / w)
    return max(1, round(side * aspect)), max(1, round(side / aspect))


def tile_boxes(h: int, w: int) -> list[tuple[int, int, int, int]]:
    """The whole image up to 3:1, else overlapping tiles of 3:1 along its longer side (R22)."""
    if max(h, w) <= 3 * min(h, w):
        return [(0, h, 0, w)]
    long, size = max(h, w), 3 * min(h, w)
    count = math.ceil(long / size * 1.15)
    starts = [round(i * (long - size) / (count - 1)) for i in range(count)]
    return [(0, h, s, s + size) if w > h else (s, s + size, 0, w) for s in starts]


def _cut(image: Tensor, config: Config) -> list[tuple[tuple[int, int, int, int], Tensor]]:
    """(box, (1, 3, H, W) RGB in [0, 1] at the encoder's size) of each tile of an (H, W, 3) uint8 image."""
    parts = []
    for y0, y1, x0, x1 in tile_boxes(*image.shape[:2]):
        size = tuple(n * config.patch_size for n in token_grid(y1 - y0, x1 - x0, config))
        part = rearrange(image[y0:y1, x0:x1].float() / 255, "h w c -> 1 c h w")
        parts.append(((y0, y1, x0, x1), F.interpolate(part, size=size, mode="bicubic", antialias=True).clamp(0, 1)))
    return parts


def _describe(model: ICAS, image: Tensor) -> list[Tile]:
    """Encode an (H, W, 3) uint8 image, tile by tile."""
    return [Tile(box, model.describe(part)) for box, part in _cut(image.to(model.device), model.config)]


# ---- 3.4 Inference: references -------------------------------------------------------------------------------------------


class Shot(NamedTuple):
    """One reference image, encoded; a long one gives one shot a tile."""
    maps: Tensor        # (blocks * D, H0, W0) float16
    small: Tensor       # (3, 8 H0, 8 W0) float16 RGB in [0, 1]
    foreground: Tensor  # (H0, W0) share of the marked anomaly; all 0 for a normal reference
    background: Tensor  # (H0, W0) share of what is surely not it
    moments: Tensor     # (2, PIXEL + 1, PIXEL + 1), see `pixel_moments`
    label: str          # "" for a normal reference
    source: str = "/0"  # of which image: its hash, and after "/" its turn

    @property
    def image(self) -> str:
        return self.source.split("/")[0]

    @property
    def turn(self) -> int:
        """0 as it lies, 1 to 7 a flipped or turned copy."""
        return int(self.source.split("/")[1])


@dataclass
class References:
    """Prompts encoded once, for any number of calls: `encode` makes them, `a + b` joins them, `save` and `load` keep them."""
    shots: list[Shot] = field(default_factory=list)
    encoder_sha256: str = ""
    blocks: tuple[int, ...] = ()
    _ready: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def labels(self) -> list[str]:
        """Names of the marked defects, sorted."""
        return sorted({s.label for s in self.shots if s.label})

    @property
    def normals(self) -> list[Shot]:
        return [s for s in self.shots if not s.label]

    def __len__(self) -> int:
        """Number of reference images."""
        return len({(s.image, s.label) for s in self.shots})

    def __add__(self, other: "References") -> "References":
        if not isinstance(other, References):
            return NotImplemented
        if self.shots and other.shots and (self.encoder_sha256, self.blocks) != (other.encoder_sha256, other.blocks):
            raise ValueError("references: expected both from the same encoder and blocks, got "
                             f"{self.encoder_sha256[:12]} {self.blocks} and {other.encoder_sha256[:12]} {other.blocks}; encode again")
        first = self if self.shots else other
        return References(self.shots + other.shots, first.encoder_sha256, first.blocks)

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {f"{i}.{name}": getattr(s, name).contiguous() for i, s in enumerate(self.shots)
                   for name in Shot._fields[:-2]}
        _save_file(path, tensors, {"format": "icas-references-1", "encoder_sha256": self.encoder_sha256, "blocks": json.dumps(self.blocks),
                                   "labels": json.dumps([s.label for s in self.shots]),
                                   "sources": json.dumps([s.source for s in self.shots])})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "References":
        tensors, meta = _read_file(path, "references", "icas-references-1")
        try:
            shots = [Shot(*(tensors[f"{i}.{n}"] for n in Shot._fields[:-2]), *words)
                     for i, words in enumerate(zip(json.loads(meta["labels"]), json.loads(meta["sources"]), strict=True))]
            return cls(shots, meta["encoder_sha256"], tuple(json.loads(meta["blocks"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"references: {os.fspath(path)!r} is incomplete ({error!r}); encode and save again") from error


def encode(anomalies: Sequence = (), normals: Sequence = (), *, turns: bool | None = None, model: ICAS | None = None) -> References:
    """Encode prompts once, to reuse with `segment` and `detect` (mask pooling, Sec. 3.1).

    anomalies  (image, mask) or (image, mask, label) each; the label "defect" if none is given.
    normals    images of good parts.
    turns      by default marked anomalies are encoded in their eight flips and quarter turns, in eight times the time, since a defect lies
               any way round, and good parts in the four that keep their shape, if 40 or fewer are given: more show enough. True: all in
               eight. False: as they lie, for parts of which a mirrored one is bad.
    Raises ValueError, TypeError or FileNotFoundError, with the argument's place in the message.

        scratch = encode(anomalies=[("scratched.png", "mask.png", "scratch")], normals=["good.png"])
        scratch.save("scratch.safetensors")
    """
    model = _checked(model)
    if turns is not None and not isinstance(turns, bool):
        raise TypeError(f"turns: expected True, False or None, got {turns!r}")
    shots = []
    for i, entry in enumerate(_sequence(anomalies, "anomalies")):
        if not isinstance(entry, (tuple, list)) or len(entry) not in (2, 3):
            raise TypeError(f"anomalies[{i}]: expected (image, mask) or (image, mask, label), got {_brief(entry)}")
        label = entry[2] if len(entry) == 3 else "defect"
        if not isinstance(label, str) or not label:
            raise TypeError(f"anomalies[{i}]: expected a non-empty string as label, got {label!r}")
        image = to_rgb(entry[0], f"anomalies[{i}] image")
        mask = to_mask(entry[1], tuple(image.shape[:2]), f"anomalies[{i}] mask")
        shots += _turned_shots(model, image, mask, label, _hash(image), turns)
    if len(_sequence(normals, "normals")) > 40 and turns is None:
        turns = False  # 1,000 parts are 2.1 GB so
    for i, entry in enumerate(normals):
        image = to_rgb(entry, f"normals[{i}]")
        shots += _turned_shots(model, image, torch.zeros(image.shape[:2]), "", _hash(image), turns)
    return References(shots, model.encoder_sha256, model.config.blocks)


def _turned_shots(model: ICAS, image: Tensor, mask: Tensor, label: str, source: str,
                  turns: bool | None = None) -> list[Shot]:
    """Shots of an (H, W, 3) uint8 image and its (H, W) mask in the flips and quarter turns that `encode` says."""
    shots = []
    for turn in (0,) if turns is False else range(8) if turns or label else (0, 2, 4, 6):
        turned, foreground = (torch.rot90(x.flip(1) if turn >= 4 else x, turn % 4) for x in (image, mask.float()))
        shots += _shots(_describe(model, turned), foreground, 1 - foreground, label, f"{source}/{turn}")
    return shots


def _hash(image: Tensor) -> str:
    return hashlib.sha256(image.contiguous().cpu().numpy().tobytes()).hexdigest()[:16]


def _shots(tiles: Sequence[Tile], foreground: Tensor, background: Tensor, label: str, source: str = "/0") -> list[Shot]:
    """Shots of one image's tiles; tiles that show neither side are left out."""
    shots = []
    for (y0, y1, x0, x1), features in tiles:
        h0, w0 = features.maps.shape[-2:]
        parts = [m[None, y0:y1, x0:x1].to(features.maps.device) for m in (foreground, background)]
        if any(p.any() for p in parts):
            moments = pixel_moments(features.small, *(token_share(p, 4 * h0, 4 * w0) for p in parts))
            shots.append(Shot(features.maps[0].half().contiguous(), features.small[0].half().contiguous(),
                              *(token_share(p, h0, w0)[0] for p in parts), moments[0], label, source))
    return shots


def _brief(value: Any) -> str:
    return f"{type(value).__name__}" + (f" of length {len(value)}" if hasattr(value, "__len__") else "")


def _sequence(value: Any, name: str) -> Sequence:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list, got {_brief(value)}; put a single one in brackets")
    return value


BANK = 1 << 16  # tokens that a prompt keeps at most: 0.3 GB with ViT-S, all tokens of 83 references


def kept_tokens(foreground: Tensor, turn: int) -> Tensor:
    """(T,) bool: of an image as it lies (`turn` 0) all tokens; of a turned copy those that are marked, and every fourth other.

    foreground (H0, W0) or (T,). Copies say more of a small defect, and not eight times the same of its surroundings; and `detect` gains most
    of what whole copies give (deeppcb and coffee, image AUROC at 2, 4, 8 good parts: 75.2 of 76.0, and 69.6 without copies).
    """
    place = torch.arange(foreground.numel(), device=foreground.device)
    return (foreground.flatten() > 0) | (place % 4 == turn % 4) if turn else place >= 0


def _join(model: ICAS, shots: Sequence[Shot]) -> Prompt:
    """Pool shots into one prompt, B = 1 (R8: all pixels together, whatever their order).

    Turned copies are thinned (`kept_tokens`). Of more tokens than BANK, each view of a good part keeps its share, chosen by greedy query
    selection.
    """
    pooled, share = [], _share(shots)
    for shot in shots:
        maps = shot.maps[None].to(model.device).float()
        parts = [*model.tokens(maps), rearrange(model.neck(maps), "b c h w -> b (h w) c")]
        parts += [side.to(model.device).flatten()[None] for side in (shot.foreground, shot.background)]
        parts = [p[:, kept_tokens(shot.foreground, shot.turn)] for p in parts]
        if not shot.label and share < parts[0].shape[1]:
            picked = greedy_queries(parts[model.middle], share)[0]
            parts = [p[:, picked] for p in parts]
        pooled.append(parts)
    *tokens, neck, foreground, background = (torch.cat(parts, dim=1) for parts in zip(*pooled, strict=True))
    moments = torch.stack([s.moments.cpu().double() for s in shots]).sum(dim=0, keepdim=True).float().to(model.device)
    prompt = Prompt(tokens, neck, foreground, background, moments)
    lying = [s for s in shots if not s.turn]
    return prompt._replace(fisher=fisher_directions(prompt), lying=_join(model, lying) if 0 < len(lying) < len(shots) else None)


def _share(shots: Sequence[Shot]) -> int:
    """How many tokens each view of a good part may keep, so that all shots together hold BANK at most; 16 at least."""
    marked, good = ([int(kept_tokens(s.foreground, s.turn).sum()) for s in shots if bool(s.label) == kind] for kind in (True, False))
    return BANK if sum(marked + good) <= BANK else max(16, (BANK - sum(marked)) // max(1, len(good)))


def _prompts(model: ICAS, references: References) -> dict[str, tuple[Prompt, Tensor | None]]:
    """Label -> its prompt with the normal references, and Q_r; "" where only normal references are given. Kept on `references`."""
    key = model.state("prompts")
    if key not in references._ready:
        reference_masks = _reference_masks(model, references.normals)
        prompts = _marked_prompts(model, references) or {"": _join(model, references.shots)}
        references._ready[key] = {label: (prompt, reference_masks) for label, prompt in prompts.items()}
    return references._ready[key]


def _marked_prompts(model: ICAS, references: References, without: set[str] = frozenset()) -> dict[str, Prompt]:
    """Label -> prompt of its marked anomalies and of the good parts, but those whose image is in `without`."""
    return {label: _join(model, [s for s in references.shots if s.label == label or not s.label and s.image not in without])
            for label in references.labels}


def _reference_masks(model: ICAS, normals: Sequence[Shot]) -> Tensor | None:
    """Q_r (1, J, D): debiased features pooled under the masks predicted in each normal reference (Sec. 3.4), as it lies, of 100 at most."""
    if not normals:
        return None
    prompt, pooled, lying = _join(model, normals), [], [s for s in normals if not s.turn]
    for shot in lying[::math.ceil(len(lying) / 100)]:
        maps = shot.maps[None].to(model.device).float()
        tokens = model.tokens(maps)
        decoded, _ = model.decode(tokens, model.neck(maps), shot.small[None].to(model.device).float(), prompt)
        masks = model.decoder.mask_logits(decoded.content[-1], decoded.pixels).sigmoid()
        pooled.append(F.normalize(mask_pool(tokens[model.middle], F.avg_pool2d(masks, 4).flatten(2)), dim=-1))
    return torch.cat(pooled, dim=1)


def disks(points: Sequence[tuple[float, float]], h: int, w: int, scale: float = 1.0) -> Tensor:
    """(H, W) float mask: the union of disks around (x, y) of `scale` / 74 of the image's side (R21), at least one pixel each."""
    radius = scale * math.sqrt(h * w) / 74
    y, x = torch.arange(h)[:, None], torch.arange(w)
    mask = torch.zeros(h, w)
    for px, py in points:
        mask[(x - px).square() + (y - py).square() <= radius * radius] = 1
        mask[int(py), int(px)] = 1
    return mask


def _interactive(tiles: Sequence[Tile], shape: tuple[int, int], points, point_labels, boxes, mask) -> list[Shot]:
    """Clicks, boxes or a mask on the target itself, as shots of it (R21)."""
    h, w = shape
    positive, negative = _clicks(points, point_labels, h, w)
    foreground, background = disks(positive, h, w), disks(negative, h, w)
    outside = torch.ones(h, w)
    for x0, y0, x1, y1 in _boxes(boxes, h, w):
        foreground[int(y0):math.ceil(y1), int(x0):math.ceil(x1)] = 1
        dx, dy = 0.05 * (x1 - x0), 0.05 * (y1 - y0)
        outside[max(0, int(y0 - dy)):math.ceil(y1 + dy), max(0, int(x0 - dx)):math.ceil(x1 + dx)] = 0
    if mask is not None:
        marked = to_mask(mask, shape, "mask")
        foreground[marked], outside[marked] = 1, 0
    if not foreground.any():
        raise ValueError("points: expected at least one positive point, a box or a mask; got only negative points")
    if not negative:
        background = outside * (1 - disks(positive, h, w, scale=3))
    background = background * (1 - foreground)
    if not background.any():
        background = 1 - foreground
    return _shots(tiles, foreground, background, "defect")


SURE = 1.0  # log-odds beyond which a first look at clicks is believed; chosen on the training sets


def _second_look(tiles: Sequence[Tile], odds: Tensor, points, point_labels) -> list[Shot]:
    """What a first look at clicks is sure of, and the clicks, as shots of the image: a mask where there were a few disks.

    odds (H, W) of the first look. On the training sets mean IoU at 1, 3 and 5 clicks went from 40.8, 49.0, 48.5 to 44.5, 52.2, 48.0.
    """
    h, w = odds.shape
    positive, negative = (disks(p, h, w).to(odds.device) for p in _clicks(points, point_labels, h, w))
    foreground = torch.maximum((odds > SURE).float(), positive) * (1 - negative)
    if not foreground.any():
        foreground = positive
    background = torch.maximum((odds < -SURE).float(), negative) * (1 - foreground)
    return _shots(tiles, foreground, background if background.any() else 1 - foreground, "defect")


def _numbers(value: Any, name: str, columns: int, what: str) -> np.ndarray:
    if value is None:
        return np.zeros((0, columns))
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected numbers, {what}, got {_brief(value)}") from error
    if array.ndim != 2 or array.shape[1] != columns or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"{name}: expected at least one finite row, {what}, got shape {array.shape}")
    return array


def _clicks(points, point_labels, h: int, w: int) -> tuple[list, list]:
    array = _numbers(points, "points", 2, "(x, y) in pixels")
    if point_labels is None:
        point_labels = [1] * len(array)
    labels = list(point_labels) if isinstance(point_labels, (list, tuple, np.ndarray, Tensor)) else None
    if labels is None or len(labels) != len(array) or any(not isinstance(v, (numbers.Integral, np.bool_, Tensor)) or int(v) not in (0, 1) for v in labels):
        raise ValueError(f"point_labels: expected one 1 (defect) or 0 (not) for each of {len(array)} points, got {point_labels!r}")
    for x, y in array:
        if not (0 <= x < w and 0 <= y < h):
            raise ValueError(f"points: expected x in [0, {w}) and y in [0, {h}) pixels, got ({x:g}, {y:g})")
    return [tuple(p) for p, v in zip(array, labels) if int(v)], [tuple(p) for p, v in zip(array, labels) if not int(v)]


def _boxes(boxes, h: int, w: int) -> np.ndarray:
    array = _numbers(boxes, "boxes", 4, "(x0, y0, x1, y1) in pixels")
    for x0, y0, x1, y1 in array:
        if not (0 <= x0 < x1 <= w and 0 <= y0 < y1 <= h):
            raise ValueError(f"boxes: expected 0 <= x0 < x1 <= {w} and 0 <= y0 < y1 <= {h} pixels, got ({x0:g}, {y0:g}, {x1:g}, {y1:g})")
    return array


# ---- 3.4 Inference: segment and detect -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segmentation:
    """What `segment` finds in one image, at the image's own height and width."""
    mask: np.ndarray            # (h, w) bool: score > threshold
    score: np.ndarray           # (h, w) float32 in [0, 1], higher is more anomalous; the largest of label_scores
    labels: list[str]           # one name a map of label_scores
    label_scores: np.ndarray    # (n, h, w) float32 in [0, 1]
    threshold: float            # in units of score

    def boxes(self) -> list[dict]:
        """Connected regions (8 neighbours), largest first: {"bbox": [x, y, w, h] pixels, "area", "score", "label"}."""
        import scipy.ndimage
        regions, count = scipy.ndimage.label(self.mask, np.ones((3, 3)))
        found = []
        for i, (rows, columns) in enumerate(scipy.ndimage.find_objects(regions), start=1):
            inside = regions[rows, columns] == i
            means = self.label_scores[:, rows, columns][:, inside].mean(axis=1)
            found.append({"bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
                          "area": int(inside.sum()), "score": float(self.score[rows, columns][inside].max()),
                          "label": self.labels[int(means.argmax())]})
        return sorted(found, key=lambda r: -r["area"])

    def rle(self) -> dict:
        """COCO run-length encoding of the mask, ready for JSON; needs pycocotools."""
        return _rle(self.mask)


@dataclass(frozen=True)
class Detection:
    """What `detect` says of one image.

    The unit is the distance of an unseen good part's token from the good parts: 1 is as far as they are from each other, on average over
    nearest-neighbour distance and subspace residual. Half of what the whole image is off is taken away (`local`), so a map may be a
    little below 0. Not clipped; comparable between images of one set of references.
    """
    score: float            # mean of the top 1 % of the map's tokens (R20), at least 0, higher is more anomalous
    map: np.ndarray         # (h, w) float32, the same unit
    threshold: float        # from the references alone
    is_anomalous: bool      # score > threshold


def _rle(mask: np.ndarray) -> dict:
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise ImportError('COCO output needs pycocotools: pip install "icas[coco]"') from error
    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(n) for n in code["size"]], "counts": code["counts"].decode("ascii")}


def _checked(model: ICAS | None) -> ICAS:
    if model is not None and not isinstance(model, ICAS):
        raise TypeError(f"model: expected what icas.load returns, got {type(model).__name__}")
    return model or _shipped()


def _check_call(references: References | None, anomalies, normals, batch_size: int, model: ICAS | None) -> tuple[ICAS, References]:
    model = _checked(model)
    if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
        raise ValueError(f"batch_size: expected a whole number of at least 1, got {batch_size!r}")
    if references is not None and not isinstance(references, References):
        raise TypeError(f"references: expected what icas.encode returns, got {type(references).__name__}; "
                        "pass (image, mask) pairs in anomalies= and good images in normals=")
    if references is not None and references.shots and (references.encoder_sha256, references.blocks) != (
            model.encoder_sha256, model.config.blocks):
        raise ValueError(f"references: made with encoder {references.encoder_sha256[:12]} and blocks {references.blocks}, the model has "
                         f"{model.encoder_sha256[:12]} and {model.config.blocks}; encode them again with model=")
    given = [references] if references is not None else []
    if len(_sequence(anomalies, "anomalies")) or len(_sequence(normals, "normals")):
        given.append(encode(anomalies, normals, model=model))
    return model, given[0] if len(given) == 1 else sum(given, References())


def _listed(images: Any) -> tuple[list, bool]:
    """The images as a list, and whether one was given alone."""
    return (list(images), False) if isinstance(images, (list, tuple)) else ([images], True)


def _name(i: int, one: bool) -> str:
    return "images" if one else f"images[{i}]"


def _log_odds(model: ICAS, features: Features, prompt: Prompt, reference_masks: Tensor | None, mfm: bool = True,
              gqs: bool = True, clicked: bool = False) -> tuple[Tensor, Scores]:
    """Fused log-odds (B, 4 H0, 4 W0), and the scores they come from."""
    tokens = model.tokens(features.maps)
    decoded, looks = model.decode(tokens, model.neck(features.maps), features.small, prompt, gqs)
    scores = score(model.decoder, decoded, tokens[model.middle], prompt, looks, model.middle, reference_masks, mfm)
    return fuse(model, scores, bool(prompt.marked.any()), clicked), scores


def _paste(canvas: Tensor, weight: Tensor, part: Tensor, box: tuple[int, int, int, int]) -> None:
    """Blend a tile's map (h', w') into the image's, with weights that fall towards the tile's ends."""
    y0, y1, x0, x1 = box
    part = F.interpolate(part[None, None], size=(y1 - y0, x1 - x0), mode="bilinear")[0, 0]
    ramp = [torch.minimum(torch.arange(1, n + 1), torch.arange(n, 0, -1)).to(part) for n in part.shape]
    blend = torch.ones_like(part) if weight.shape == part.shape else ramp[0][:, None] * ramp[1]
    canvas[y0:y1, x0:x1] += part * blend
    weight[y0:y1, x0:x1] += blend


def _batches(tiles: Sequence[Tile], size: int) -> Iterator[tuple[list[int], Features]]:
    """Tiles of one grid together, at most `size`. On a CPU one at a time: it is as fast, and then no result depends on its company."""
    size = 1 if tiles[0].features.maps.device.type == "cpu" else size
    groups: dict[tuple, list[int]] = {}
    for i, tile in enumerate(tiles):
        groups.setdefault(tuple(tile.features.maps.shape), []).append(i)
    for members in groups.values():
        for start in range(0, len(members), size):
            part = members[start:start + size]
            yield part, Features(*(torch.cat([getattr(tiles[i].features, f) for i in part]) for f in Features._fields))


@torch.inference_mode()
def segment(images: Any, references: References | None = None, *, anomalies: Sequence = (), normals: Sequence = (), points=None,
            point_labels=None, boxes=None, mask=None, threshold: float | None = None, batch_size: int = 4,
            model: ICAS | None = None) -> Segmentation | list[Segmentation]:
    """Mark, in each image, what the references show (Sec. 3.4).

    images       one image or a list; see `to_rgb` for what an image may be. One in gives one out.
    references   from `encode`; `anomalies` and `normals` as there, encoded for this call.
    points       (x, y) pixels on the image itself, with point_labels 1 (defect, the default) or 0 (not); one image only.
    boxes        (x0, y0, x1, y1) pixels around defects; one image only. mask: (h, w), a defect already marked on the image itself.
    threshold    in [0, 1]; 0.5 by default, for which the shipped weights are calibrated (R19).
    Raises ValueError, TypeError or FileNotFoundError that names the argument.

        segment("part.png", anomalies=[("scratched.png", "mask.png")]).mask
        segment("part.png", points=[(120, 80)]).boxes()
    """
    if threshold is not None and not (isinstance(threshold, numbers.Real) and 0 <= threshold <= 1):
        raise ValueError(f"threshold: expected a number in [0, 1], got {threshold!r}")
    model, references = _check_call(references, anomalies, normals, batch_size, model)
    images, one = _listed(images)
    interactive = not (points is None and boxes is None and mask is None)
    if point_labels is not None and points is None:
        raise ValueError("point_labels: given without points; pass points=[(x, y), ...] too")
    if interactive and not one:
        raise ValueError("points, boxes, mask: expected one image with them, got a list; call segment once an image")
    if not interactive and not references.shots:
        raise ValueError("references: none given; pass anomalies=[(image, mask)], normals=[image], points=, boxes= or mask=")
    results = []
    for start in range(0, len(images), batch_size):
        chunk = [to_rgb(x, _name(start + i, one)) for i, x in enumerate(images[start:start + batch_size])]
        shapes = [tuple(x.shape[:2]) for x in chunk]
        tiles = [(i, tile) for i, x in enumerate(chunk) for tile in _describe(model, x)]
        for look in range(1 if points is None else 2):
            used = references
            if interactive:
                own = [t for _, t in tiles]
                shown = _second_look(own, odds[0][list(prompts).index("defect")], points, point_labels) if look else _interactive(
                    own, shapes[0], points, point_labels, boxes, mask)
                used = references + References(shown, model.encoder_sha256, model.config.blocks)
            prompts = _prompts(model, used)
            odds = _odds_maps(model, tiles, shapes, prompts, batch_size, clicked=points is not None and not references.shots)
        for maps in odds:
            maps = maps.sigmoid().cpu().numpy()
            cut = 0.5 if threshold is None else float(threshold)
            best = maps.max(axis=0)
            results.append(Segmentation(best > cut, best, [label or "anomaly" for label in prompts], maps, cut))
    return results[0] if one else results


def _odds_maps(model: ICAS, tiles: Sequence[tuple[int, Tile]], shapes: Sequence[tuple[int, int]],
               prompts: dict[str, tuple[Prompt, Tensor | None]], batch_size: int, clicked: bool = False) -> list[Tensor]:
    """Fused log-odds (n, h, w) of each image for n prompts, from its (number, tile)s."""
    canvas, weight = ([torch.zeros(len(prompts), *s, device=model.device) for s in shapes] for _ in range(2))
    for members, features in _batches([t for _, t in tiles], batch_size):
        for n, (prompt, reference_masks) in enumerate(prompts.values()):
            for m, part in zip(members, _log_odds(model, features, prompt, reference_masks, clicked=clicked)[0]):
                i, tile = tiles[m]
                _paste(canvas[i][n], weight[i][n], part, tile.box)
    return [total / count for total, count in zip(canvas, weight)]


class GoodParts(NamedTuple):
    """What good parts look like (`detect`)."""
    bank: list[Tensor]   # (1, R, D) a tapped block: their tokens, debiased unit vectors
    known: Tensor        # (1, R) bool: which of them count
    mean: Tensor         # (D,) and
    basis: Tensor        # (D, r): the subspace that they fill
    typical: Tensor      # (2,) distance and residual of an unseen good part's token, on average
    scores: list[float]  # of the good parts themselves, each against the others; of the quarters of a single one, against the rest of it
    parts: int           # how many images
    defects: dict[str, Prompt]  # label -> prompt of its marked anomalies and these parts: raises scores (`abnormal`), those above too


class GoodShot(NamedTuple):
    """A view of a good part, its tokens made once for all that it is compared with."""
    shot: Shot
    tokens: list[Tensor]   # (1, T, D) a tapped block, debiased unit vectors
    whole: Tensor          # (1, T, D), see `middle_mean`
    order: Tensor          # (T or fewer,) which to keep, the first ones where not all may be kept


def _known(shots: Sequence[GoodShot]) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The first four fields of GoodParts."""
    share = _share([s.shot for s in shots])
    kept = [s.order[:share] for s in shots]
    bank = [torch.cat([t[:, k] for t, k in zip(tokens, kept)], dim=1) for tokens in zip(*(s.tokens for s in shots))]
    background = torch.cat([s.shot.background.to(bank[0].device).flatten()[k] for s, k in zip(shots, kept)])
    known = _surely(background[None], 0.999)
    whole = torch.cat([s.whole[:, k] for s, k in zip(shots, kept)], dim=1)
    return bank, known, *subspace(whole[known])


def subspace(tokens: Tensor, kept: float = 0.99) -> tuple[Tensor, Tensor]:
    """Mean (D,) and basis (D, r) of the directions that hold `kept` of the variance of tokens (R, D)."""
    mean = tokens.mean(dim=0)
    values, vectors = torch.linalg.eigh((tokens - mean).T @ (tokens - mean))
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    rank = int((values.cumsum(0) < kept * values.sum()).sum()) + 1
    return mean, vectors[:, :rank]


def residual(tokens: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    """(..., D) tokens -> (...) their distance from a `subspace`, mean (D,) and basis (D, r)."""
    centred = tokens - mean
    return (centred - (centred @ basis) @ basis.T).norm(dim=-1)


def middle_mean(maps: Tensor, blocks: int) -> Tensor:
    """(B, blocks * D, H0, W0) -> (B, T, D): mean of the tapped blocks but the last, with place and length, which `unit_tokens` takes away.

    The residual of these finds more than that of debiased unit vectors (eight training sets, image AUROC: 82.5 and 81.1).
    """
    return rearrange(maps.float(), "b (n d) h w -> n b (h w) d", n=blocks)[:max(1, blocks - 1)].mean(dim=0)


def novelty(tokens: Sequence[Tensor], whole: Tensor, bank: Sequence[Tensor], known: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    """How far target tokens are from good parts', two ways (B, 2, T): 1 - best cosine, mean of the blocks, and the residual outside their
    subspace.

    tokens, bank  one (B, T, D) and (1, R, D) of debiased unit vectors a tapped block, of which the last is not used; whole (B, T, D) of
                  `middle_mean`; known (1, R) bool says which of the bank count.
    """
    near = torch.stack([1 - best_cosines(t, r, known)[0] for t, r in zip(tokens[:-1] or tokens, bank)]).mean(dim=0)
    return torch.stack([near, residual(whole, mean, basis)], dim=1)


def local(distance: Tensor) -> Tensor:
    """What to take away from (B, H0, W0) distances so that an image of a kind that the good parts do not show is not bad all over.

    Half of each image's median, of 1.5 at most: a part that is strange throughout stays so. returns (B, 1, 1). Mean image AUROC of mpdd,
    deeppcb and windows of seven more training sets at 2, 4 and 8 good parts: 80.8 without, 82.2 with it.
    """
    return 0.5 * distance.flatten(1).median(dim=1).values.clamp(max=1.5)[:, None, None]


def _good_parts(model: ICAS, references: References) -> GoodParts:
    """Leave-one-out: a single good part is compared, quarter by quarter, with its other three quarters; of more than 40, 40 are."""
    normals = references.normals
    sources = Counter(s.image for s in normals)
    most = max(16, BANK // max(1, len(normals) - max(sources.values())))  # that any choice of others lets a view keep
    good, share = [], _share(normals)
    for shot in normals:
        maps = shot.maps[None].to(model.device).float()
        tokens = model.tokens(maps)
        order = kept_tokens(shot.foreground, shot.turn).to(model.device).nonzero()[:, 0]
        if share < len(order):
            order = order[greedy_queries(tokens[model.middle][:, order], most)[0]]
        good.append(GoodShot(shot, tokens, middle_mean(maps, len(tokens)), order))
    cases = []  # (good part, what it is compared with, rows and columns that count)
    if len(sources) > 1:
        for source in list(sources)[::math.ceil(len(sources) / 40)]:
            others = [g for g in good if g.shot.image != source]
            cases += [(g, others, (slice(None), slice(None))) for g in good if g.shot.image == source and not g.shot.turn]
    else:
        for part in (g for g in good if not g.shot.turn):
            halves = [(slice(0, (n + 1) // 2), slice((n + 1) // 2, n)) for n in part.shot.background.shape]
            for window in itertools.product(*halves):
                rest = part.shot.background.clone()
                rest[window] = 0
                if rest.any() and (part.shot.background - rest).any():
                    cases.append((part, [part._replace(shot=part.shot._replace(background=rest))], window))
    found = []
    for part, others, window in cases:
        far = novelty(part.tokens, part.whole, *_known(others))
        found.append(far.unflatten(2, tuple(part.shot.background.shape)))
    typical = torch.full((2,), 0.3, device=model.device)  # for a part of one token, which cannot be halved
    if found:
        typical = torch.cat([f[..., y, x].flatten(2) for f, (_, _, (y, x)) in zip(found, cases)], dim=2).mean(dim=(0, 2)).clamp_min(1e-3)
    fold = {name: 8 * i // max(8, len(sources)) for i, name in enumerate(sources)}  # a part is not in the prompt that raises its own score
    scores, left_out, prompts = {}, None, {}
    for n, (far, (part, _, (y, x))) in enumerate(zip(found, cases)):
        name = part.shot.image if len(sources) > 1 else n   # of an image's tiles the highest counts, as in `detect`
        features = Features(*(m[None].to(model.device).float() for m in (part.shot.maps, part.shot.small)))
        if fold[part.shot.image] != left_out:
            left_out = fold[part.shot.image]
            prompts = _marked_prompts(model, references, {image for image in fold if fold[image] == left_out})
        far, seen = far / typical[:, None, None], seen_before(model, features, prompts)
        scores[name] = max(scores.get(name, -math.inf), float(top_share(abnormal(far[..., y, x], seen[..., y, x]))))
    return GoodParts(*_known(good), typical, list(scores.values()) or [1.0], len(sources), _marked_prompts(model, references))


def normal_threshold(good: GoodParts, false_positive_rate: float) -> float:
    """Threshold that unseen good parts exceed at the given rate, in (0, 1), from the leave-one-out scores of k good parts; in their unit.

    The upper prediction limit of Student's t, with the spread shrunk towards 15 % of the mean (worth 8 parts): with two parts it is that
    assumption, with 40 it is the data. The finest rate that k parts can show by themselves is 1 / (k + 1). One part shows how its quarters
    differ from each other, not how parts do: an unseen one is taken to score exp(0.3) times as much, give or take a factor of exp(0.5).

    On six training sets 1, 5, 10 and 20 % became 0.2, 7.2, 10.6 and 21.7 % with one part (from 0 to 54 % on single sets: one part cannot
    promise a rate), 0.5, 1.9, 2.5 and 6.5 % with two, 2.3, 3.7, 4.9 and 10.9 % with eight; on eight with eight parts and a marked anomaly, which
    raises the scores of good parts too, 5.3, 10.8, 14.6 and 19.7 % (14.7, 22.5, 29.3, 39.5 % if that is not counted).
    """
    import scipy.stats
    x, worth, k = np.asarray(good.scores, dtype=np.float64), 8, len(good.scores)
    if good.parts == 1:
        return float(x.mean() * math.exp(0.3 + 0.5 * scipy.stats.norm.ppf(1 - false_positive_rate)))
    spread = math.sqrt((worth * (0.15 * x.mean()) ** 2 + ((x - x.mean()) ** 2).sum()) / (worth + k - 1))
    return float(x.mean() + scipy.stats.t.ppf(1 - false_positive_rate, worth + k - 1) * spread * math.sqrt(1 + 1 / k))


@torch.inference_mode()
def detect(images: Any, references: References | None = None, *, normals: Sequence = (), anomalies: Sequence = (),
           false_positive_rate: float = 0.01, batch_size: int = 4, model: ICAS | None = None) -> Detection | list[Detection]:
    """Say which images are anomalous, from a few good parts (few-shot detection, Sec. 3.4, R20).

    Tokens of the middle blocks are compared with the good parts', by nearest neighbour and by the residual outside their subspace; of
    the paper's scores S_s^mfm raises what a marked anomaly shows, S_n is left to `segment` (it added nothing here, see the CHANGELOG).

    images               as in `segment`. references, normals, anomalies: as in `encode`; at least one good part is needed.
    false_positive_rate  in (0, 1): share of good parts that may be called anomalous; sets `.threshold` from the references alone.
    Raises ValueError, TypeError or FileNotFoundError that names the argument.

        [r.is_anomalous for r in detect(["a.png", "b.png"], normals=["good_1.png", "good_2.png"])]
    """
    if not (isinstance(false_positive_rate, numbers.Real) and 0 < false_positive_rate < 1):
        raise ValueError(f"false_positive_rate: expected a number between 0 and 1, got {false_positive_rate!r}")
    model, references = _check_call(references, anomalies, normals, batch_size, model)
    if not references.normals:
        raise ValueError("normals: detect needs at least one good part; pass normals=[image], or use segment for marked defects")
    images, one = _listed(images)
    good = _known_good(model, references)
    threshold = normal_threshold(good, false_positive_rate)
    results = []
    for start in range(0, len(images), batch_size):
        chunk = [to_rgb(x, _name(start + i, one)) for i, x in enumerate(images[start:start + batch_size])]
        tiles = [(i, tile) for i, x in enumerate(chunk) for tile in _describe(model, x)]
        canvas, weight = ([torch.zeros(x.shape[:2], device=model.device) for x in chunk] for _ in range(2))
        peaks = [-math.inf] * len(chunk)
        for members, features in _batches([t for _, t in tiles], batch_size):
            token_maps = abnormal(distances(model, features, good), seen_before(model, features, good.defects))
            for m, part, peak in zip(members, token_maps, top_share(token_maps)):
                i, tile = tiles[m]
                peaks[i] = max(peaks[i], float(peak))
                _paste(canvas[i], weight[i], part, tile.box)
        results += [Detection(p, (c / w).cpu().numpy(), threshold, p > threshold) for p, c, w in zip(peaks, canvas, weight)]
    return results[0] if one else results


def _known_good(model: ICAS, references: References) -> GoodParts:
    """What the good parts of `references` look like; kept on them."""
    key = model.state("good parts")
    if key not in references._ready:
        references._ready[key] = _good_parts(model, references)
    return references._ready[key]


def distances(model: ICAS, features: Features, good: GoodParts) -> Tensor:
    """(B, 2, H0, W0) nearest-neighbour distance and subspace residual of each token, at least 0, 1 on average for an unseen good part's
    (few-shot detection, Sec. 3.4)."""
    tokens, whole = model.tokens(features.maps), middle_mean(features.maps, len(model.config.blocks))
    far = novelty(tokens, whole, good.bank, good.known, good.mean, good.basis) / good.typical[:, None]
    return far.unflatten(2, tuple(features.maps.shape[-2:]))


def seen_before(model: ICAS, features: Features, defects: dict[str, Prompt]) -> Tensor:
    """How much each token is like a known defect: the largest S_s^mfm of any (Sec. 3.4).

    defects  label -> prompt, of `_marked_prompts`. returns (B, H0, W0) in [0, 1], 0 without defects.
    """
    seen = features.maps.new_zeros((len(features.maps), *features.maps.shape[-2:]))
    tokens, neck = (model.tokens(features.maps), model.neck(features.maps)) if defects else (None, None)
    for prompt in defects.values():
        decoded, _ = model.decode(tokens, neck, features.small, prompt)
        semantic_mfm = mask_scores(model.decoder, decoded, tokens[model.middle], prompt, model.middle)[1]
        seen = torch.maximum(seen, F.avg_pool2d(semantic_mfm[:, None], 4)[:, 0])
    return seen.clamp(max=1)  # `plain_sum` may be more


def abnormal(far: Tensor, seen: Tensor) -> Tensor:
    """(B, H0, W0) map of `detect` (Sec. 3.4): the mean of some `distances` (B, n, H0, W0), less half of each image's median; -0.75 or more.

    seen  (B, H0, W0) of `seen_before`: what is like a known defect counts up to double, what is unknown keeps its distance. Eight training
          sets with 8 good parts and one marked anomaly, image AUROC on all, known, unknown defects: 87.2, 87.7, 79.9 so, 82.0, 82.3, 78.2
          without it; with S_s 84.5, 84.7, 79.5, with the fused score 85.9, 86.9, 76.9. On the two that the decoder was not trained on, all
          defects: 91.8 so, 90.4 without it.
    """
    far = far.mean(dim=1)
    return far * (1 + seen) - local(far)


# ---- Files -------------------------------------------------------------------------------------------------------------

CHECKPOINT = "icas-vits14.safetensors"  # the shipped one; its encoder lies beside it
_default: list[ICAS] = []


def _save_file(path: str | os.PathLike, tensors: dict[str, Tensor], meta: dict[str, str]) -> None:
    """Write whole or not at all."""
    part = Path(f"{os.fspath(path)}.part")
    save_file(tensors, part, metadata=meta)
    part.replace(path)


def _read_file(path: str | os.PathLike, name: str, form: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name}: expected a path, got {type(path).__name__}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name}: no file at {os.fspath(path)!r}")
    try:
        with safe_open(path, "pt") as file:
            meta, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name}: {os.fspath(path)!r} is not a whole safetensors file ({error}); get or save it again") from error
    found = meta.get("format", "none")
    if found != form:
        newer = found.rsplit("-", 1)[0] == form.rsplit("-", 1)[0]
        raise ValueError(f"{name}: expected a file of format {form!r}, {os.fspath(path)!r} has {found!r}; "
                         + ("it was made by another version of icas: update icas" if newer else "is it another kind of file?"))
    return tensors, meta


def save(model: ICAS, path: str | os.PathLike, training: dict | None = None) -> None:
    """Write the trained part (fp16), config, training record and the encoder's SHA-256 to one safetensors file."""
    tensors = {f"decoder.{k.replace('_orig_mod.', '')}": v.half().contiguous().cpu() for k, v in model.decoder.state_dict().items()}
    tensors |= {name: getattr(model, name).float().cpu() for name in FUSIONS}
    _save_file(path, tensors, {"format": "icas-1", "config": json.dumps(asdict(model.config)), "version": __version__,
                               "encoder_sha256": model.encoder_sha256, "training": json.dumps(training or {})})


@torch.inference_mode(False)  # its parameters must be ordinary tensors wherever it is called first
def load(path: str | os.PathLike | None = None, *, encoder: str | os.PathLike | None = None, device: str | torch.device | None = None,
         compile: bool = False) -> ICAS:
    """A model in eval mode from a checkpoint; the shipped one by default. Never touches the network.

    encoder  safetensors file of the frozen encoder; by default the file beside the checkpoint that has the SHA-256 it was trained
             with. Any other file is refused.
    device   "cpu", "cuda", "cuda:1", "mps"; by default CUDA if there is one, else the CPU.
    compile  torch.compile encoder and decoder in place: worth it on a GPU with images of one size.
    Raises FileNotFoundError or ValueError for a missing, truncated, foreign or newer file.
    """
    path = _shipped_path() if path is None else path
    tensors, meta = _read_file(path, "path", "icas-1")
    try:
        known = json.loads(meta["config"])
        config = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"path: {os.fspath(path)!r} holds no config that this version reads ({error}); update icas") from error
    device = _device(device)
    model = ICAS(config)
    wanted = meta.get("encoder_sha256", "")
    model.encoder_sha256 = wanted
    _load_state(model.encoder, load_encoder(_encoder_path(Path(path), encoder, wanted)), f"encoder of {os.fspath(path)!r}")
    for name in FUSIONS:
        if name not in tensors or tensors[name].shape != getattr(model, name).shape:
            raise ValueError(f"path: {os.fspath(path)!r} lacks {name!r} of shape {tuple(getattr(model, name).shape)}; get it again")
        setattr(model, name, tensors.pop(name))
    _load_state(model.decoder, {k.removeprefix("decoder."): v for k, v in tensors.items()}, os.fspath(path))
    model = model.to(device).eval().requires_grad_(False)
    if compile:
        model.encoder.compile()
        model.decoder.compile()
    return model


def load_encoder(path: str | os.PathLike) -> dict[str, Tensor]:
    """Encoder weights in Meta's key names from a safetensors file in any layout that `convert` knows."""
    try:
        with safe_open(path, "pt") as file:
            return convert({key: file.get_tensor(key) for key in file.keys()})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"encoder: {os.fspath(path)!r} is not a whole safetensors file ({error}); get it again") from error


def _load_state(module: nn.Module, state: dict[str, Tensor], name: str) -> None:
    own = module.state_dict()
    missing, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or foreign or shapes:
        raise ValueError(f"{name}: weights do not fit; missing {missing[:5]}, unexpected {foreign[:5]}, of another shape {sorted(shapes)[:5]}")
    module.load_state_dict({k: v.float() for k, v in state.items()})


def _shipped_path() -> Path:
    """checkpoints/ beside this file, or where pip puts data files."""
    import sysconfig
    here = Path(__file__).resolve().parent
    places = [here / "checkpoints", here / "share" / "icas", Path(sysconfig.get_path("data")) / "share" / "icas", here]
    for place in places:
        if (place / CHECKPOINT).is_file():
            return place / CHECKPOINT
    raise FileNotFoundError(f"path: the shipped checkpoint {CHECKPOINT} is in none of {[str(p) for p in places]}; pass load(path)")


def _shipped() -> ICAS:
    if not _default:
        _default.append(load())
    return _default[0]


def _encoder_path(checkpoint: Path, encoder: str | os.PathLike | None, wanted: str) -> Path:
    if encoder is not None:
        if not Path(encoder).is_file():
            raise FileNotFoundError(f"encoder: no file at {os.fspath(encoder)!r}")
        if (found := _sha256(encoder)) != wanted:
            raise ValueError(f"encoder: {os.fspath(encoder)!r} has SHA-256 {found}, the checkpoint was trained with {wanted}; "
                             "pass that file, or train a checkpoint for this encoder")
        return Path(encoder)
    beside = [p for p in sorted(checkpoint.resolve().parent.glob("*.safetensors")) if p.name != checkpoint.name]
    with contextlib.suppress(FileNotFoundError):   # a copied icas.py may have no shipped one
        beside += [p for p in sorted(_shipped_path().parent.glob("*.safetensors")) if p.name != CHECKPOINT]
    for candidate in beside:
        if _sha256(candidate) == wanted:
            return candidate
    raise FileNotFoundError(f"encoder: no file with SHA-256 {wanted} beside {os.fspath(checkpoint)!r}; pass encoder=")


def _sha256(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).hexdigest()


def _device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or an error: never another in silence."""
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: {device!r} is not available here ({str(error).splitlines()[0]}); use 'cpu' or 'auto'") from error
    return chosen


def convert(state: dict[str, Tensor] | str | os.PathLike) -> dict[str, Tensor]:
    """DINOv2 weights in Meta's, transformers' or timm's layout -> Meta's key names, for `Encoder`.

    state  a state dict, or a .pth file (read with weights_only=True) or .safetensors file. `mask_token` is dropped.
    Raises ValueError if the layout is none of the three.
    """
    if isinstance(state, (str, os.PathLike)):
        if not Path(state).is_file():
            raise FileNotFoundError(f"state: no file at {os.fspath(state)!r}")
        if Path(state).suffix == ".safetensors":
            return load_encoder(state)
        try:
            state = torch.load(state, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"state: the file is not a .pth of tensors alone ({str(error).splitlines()[0]}); get it again") from error
    if not isinstance(state, dict):
        raise TypeError(f"state: expected a state dict or a path, got {type(state).__name__}")
    state = {k.removeprefix("dinov2.").removeprefix("dinov2_with_registers."): v for k, v in state.items()}
    if "embeddings.cls_token" in state:
        state = _from_transformers(state)
    elif "pos_embed" in state:
        state = {k.replace("reg_token", "register_tokens"): v for k, v in state.items()}
        if state["pos_embed"].shape[1] == 37 * 37:  # timm's register models keep no position for the class token
            state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))
        if any(".mlp.fc1." in k for k in state) and state["pos_embed"].shape[-1] == 1536:
            state = {k.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3."): v for k, v in state.items()}
    else:
        raise ValueError(f"state: expected DINOv2 weights in Meta's, transformers' or timm's layout, got keys {sorted(state)[:5]}")
    return {k: v for k, v in state.items() if k != "mask_token"}


def _from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"embeddings.cls_token": "cls_token", "embeddings.mask_token": "mask_token", "embeddings.position_embeddings": "pos_embed",
             "embeddings.register_tokens": "register_tokens", "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
             "encoder.layer.": "blocks.", "layernorm.": "norm.", "attention.output.dense": "attn.proj", "attention.o_proj": "attn.proj",
             "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma", "mlp.weights_in": "mlp.w12",
             "mlp.weights_out": "mlp.w3"}
    # transformers up to 4 named the parts "attention.attention.query", from 5 on "attention.q_proj"
    parts = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
    if not any(parts[0] in key for key in state):
        parts = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        if parts[0] in key:
            value = torch.cat([state[key.replace(parts[0], part)] for part in parts])
            key = key.replace(parts[0], "attn.qkv")
        elif any(part in key for part in parts):
            continue
        for theirs, mine in names.items():
            if theirs in key and not (theirs == "layernorm." and not key.startswith(theirs)):
                key = key.replace(theirs, mine)
        ours[key] = value
    return ours


# ---- Pictures and the command line -----------------------------------------------------------------------------------------

HEAT = np.array([[38, 52, 120], [40, 140, 160], [250, 220, 90], [240, 120, 40], [200, 20, 40]], dtype=np.float32)  # low to high


def overlay(image: Any, heat: np.ndarray, mask: np.ndarray, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """(h, w, 3) uint8: the image, the heat map where it is above `low`, a white contour around the mask and a scale bar.

    heat (h, w), coloured from `low` to `high`: give one range to all images of a run, or good parts look red. mask (h, w) bool.
    """
    import scipy.ndimage
    base = to_rgb(image).numpy().astype(np.float32)
    level = np.clip((heat - low) / max(high - low, 1e-9), 0, 1)
    paint = np.stack([np.interp(level, np.linspace(0, 1, len(HEAT)), HEAT[:, c]) for c in range(3)], axis=-1)
    alpha = (0.65 * np.clip(level * 2, 0, 1))[..., None]
    result = base * (1 - alpha) + paint * alpha
    width = max(1, round(min(mask.shape) / 200))
    result[scipy.ndimage.binary_dilation(mask, iterations=width) & ~mask] = 255
    h, w = mask.shape
    bar = np.linspace(0, len(HEAT) - 1, max(1, w // 3))
    strip = np.stack([np.interp(bar, range(len(HEAT)), HEAT[:, c]) for c in range(3)], axis=-1)
    result[h - max(1, h // 40):, :len(strip)] = strip  # blue is `low`, red is `high`
    return result.round().clip(0, 255).astype(np.uint8)


SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


def _expand(paths: Sequence[str]) -> list[Path]:
    """Files as given; of folders all images below, sorted, without macOS's ._ files."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())
            if not inside:
                raise ValueError(f"{path}: no image in this folder; expected {', '.join(sorted(SUFFIXES))}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"no file or folder at {path}")
    return found


def _parser():
    import argparse
    parser = argparse.ArgumentParser(prog="icas", description="Mark defects in images from one marked defect, a few good parts, or a click.")
    parser.add_argument("--version", action="version", version=f"icas {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, images: bool):
        sub = commands.add_parser(name, help=text, description=text)
        if images:
            sub.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
        sub.add_argument("--out", required=True, help="folder (for prompts: file) to write")
        group = sub.add_argument_group("references")
        group.add_argument("--anomaly", nargs=2, action="append", default=[], metavar=("IMAGE", "MASK"), help="a marked defect; repeatable")
        group.add_argument("--normal", nargs="+", action="extend", default=[], metavar="IMAGE_OR_FOLDER", help="good parts")
        group.add_argument("--turns", action=argparse.BooleanOptionalAction, help="encode all references in eight flips and quarter "
                           "turns, or as they lie (default: marked ones in eight, good parts in the four that keep their shape)")
        group.add_argument("--prompts", metavar="FILE", help="references written by `icas prompts`")
        group = sub.add_argument_group("machine")
        group.add_argument("--model", metavar="FILE", help="checkpoint (default: the shipped one)")
        group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default auto); never another in silence")
        group.add_argument("--range", nargs=2, type=float, metavar=("LOW", "HIGH"), help="values shown as black and white, for 16-bit images")
        return sub

    sub = command("segment", "masks of what the references show", True)
    sub.add_argument("--point", nargs=2, type=float, action="append", default=[], metavar=("X", "Y"), help="a click on a defect, pixels")
    sub.add_argument("--negative", nargs=2, type=float, action="append", default=[], metavar=("X", "Y"), help="a click beside it, pixels")
    sub.add_argument("--box", nargs=4, type=float, action="append", default=[], metavar=("X0", "Y0", "X1", "Y1"), help="around a defect, pixels")
    sub.add_argument("--threshold", type=float, help="score above which a pixel is marked, 0 to 1 (default 0.5)")
    sub.add_argument("--coco", metavar="FILE", help="also write COCO annotations (RLE)")
    sub = command("detect", "which images are anomalous, from good parts", True)
    sub.add_argument("--false-positive-rate", type=float, default=0.01, help="share of good parts that may be called bad (default 0.01)")
    sub.add_argument("--coco", metavar="FILE", help="also write COCO annotations (RLE)")
    command("prompts", "encode references once and write them to a file", False)
    sub = commands.add_parser("demo", help="detect and segment on real solar cells", description="Detect and segment on real solar cells (ELPV).")
    sub.add_argument("--out", required=True, help="folder to write")
    sub.add_argument("--device", default="auto")
    return parser


def _references(args, model: ICAS) -> References:
    read = lambda p: to_rgb(p, value_range=args.range)  # noqa: E731
    given = References.load(args.prompts) if args.prompts else References()
    return given + encode([(read(i).numpy(), m) for i, m in args.anomaly], [read(p).numpy() for p in _expand(args.normal)],
                          turns=args.turns, model=model)


def _write_image(path: Path, array: np.ndarray) -> None:
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    Image.fromarray(array).save(part, format="PNG")
    part.replace(path)


def _fingerprint(args) -> str:
    """Of the arguments and files that decide a result: an image is done if it was done with these."""
    given = {k: v for k, v in vars(args).items() if k not in ("images", "out", "coco", "device")}
    files = [f for pair in args.anomaly for f in pair] + _expand(args.normal) + [f for f in (args.prompts, args.model) if f]
    return hashlib.sha256(json.dumps([given, [_sha256(f) for f in files], __version__], default=str).encode()).hexdigest()[:16]


def _run_folder(args, work: Callable[[np.ndarray], tuple[dict, np.ndarray, np.ndarray]], low: float, high: float) -> int:
    """Apply `work` to each image not yet in the results; write mask, overlay and one JSON line each. returns the exit status.

    `work(image)` gives (JSON fields, heat map, mask). Under torchrun each rank takes its share and rank 0 joins the lines.
    """
    from tqdm import tqdm
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    images, out, run = _expand(args.images), Path(args.out), _fingerprint(args)
    asked = {str(p) for p in images}
    out.mkdir(parents=True, exist_ok=True)
    lines = {r["image"]: r for f in sorted(out.glob("results*.jsonl")) for r in _json_lines(f)}
    done = {name for name, r in lines.items() if r.get("run") == run}
    mine = out / ("results.jsonl" if world == 1 else f"results.{rank}.jsonl")
    taken = {r["mask"] for name, r in lines.items() if name in done or name not in asked}
    names = [p.stem for p in images]
    if mine.exists() and mine.stat().st_size and not mine.read_bytes().endswith(b"\n"):
        with open(mine, "a", encoding="utf-8") as file:
            file.write("\n")  # a run that was killed left half a line
    todo = [(i, p) for i, p in enumerate(images) if str(p) not in done and i % world == rank]
    failed = 0
    with open(mine, "a", encoding="utf-8") as file:
        for i, path in tqdm(todo, disable=not sys.stderr.isatty() or rank > 0, unit="image"):
            start = time.perf_counter()
            try:
                image = to_rgb(path, value_range=args.range).numpy()
                fields, heat, mask = work(image)
            except (ValueError, OSError) as error:
                failed += 1
                print(f"icas: {path}: {error}", file=sys.stderr)
                continue
            stem = path.stem
            if names.count(stem) > 1 or f"masks/{stem}.png" in taken:  # two images of one name: their folders tell them apart
                stem += "_" + hashlib.sha256(str(path).encode()).hexdigest()[:8]
            _write_image(out / "masks" / f"{stem}.png", mask.astype(np.uint8) * 255)
            _write_image(out / "overlays" / f"{stem}.png", overlay(image, heat, mask, low, high))
            fields = {"image": str(path), "height": mask.shape[0], "width": mask.shape[1], **fields, "mask": f"masks/{stem}.png",
                      "overlay": f"overlays/{stem}.png", "seconds": round(time.perf_counter() - start, 3), "run": run, "version": __version__}
            file.write(json.dumps(fields) + "\n")
            file.flush()
    if world > 1:
        import torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.tensor([failed])
        dist.all_reduce(total)  # also waits for every rank's lines
        failed = int(total)
        dist.destroy_process_group()
    if rank == 0:
        lines = {r["image"]: r for f in sorted(out.glob("results*.jsonl")) for r in _json_lines(f)}
        ordered = [lines[str(p)] for p in images if lines.get(str(p), {}).get("run") == run]
        rest = [r for name, r in lines.items() if name not in asked]
        part = out / "results.jsonl.part"
        part.write_text("".join(json.dumps(r) + "\n" for r in rest + ordered), encoding="utf-8")
        part.replace(out / "results.jsonl")
        for extra in out.glob("results.[0-9]*.jsonl"):
            extra.unlink()
        if args.coco:
            _write_coco(Path(args.coco), ordered, out)
        print(f"{len(ordered)} of {len(images)} images in {out / 'results.jsonl'}" + (f", {failed} failed" if failed else ""))
    return 1 if failed else 0


def _json_lines(path: Path) -> list[dict]:
    """Whole lines only: a run that was killed may have left half of one."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _write_coco(path: Path, lines: Sequence[dict], out: Path) -> None:
    """COCO annotations, one a connected region, that CVAT and pycocotools read."""
    import scipy.ndimage
    from PIL import Image
    names = sorted({b["label"] for r in lines for b in r["regions"]} | {"defect"})
    images, annotations = [], []
    for i, r in enumerate(lines, start=1):
        images.append({"id": i, "file_name": Path(r["image"]).name, "height": r["height"], "width": r["width"]})
        regions, _ = scipy.ndimage.label(np.array(Image.open(out / r["mask"])) > 0, np.ones((3, 3)))
        for region in r["regions"]:
            x, y, w, h = region["bbox"]
            inside = np.unique(regions[y:y + h, x:x + w])
            own = next(n for n in inside if n and _box(regions == n) == region["bbox"])
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": names.index(region["label"]) + 1,
                                "segmentation": _rle(regions == own), "bbox": region["bbox"], "area": region["area"], "iscrowd": 1,
                                "score": region["score"]})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"info": {"description": f"icas {__version__}"}, "licenses": [], "images": images, "annotations": annotations,
                                "categories": [{"id": n, "name": name, "supercategory": "defect"} for n, name in enumerate(names, 1)]}))


def _box(mask: np.ndarray) -> list[int]:
    y, x = np.nonzero(mask)
    return [int(x.min()), int(y.min()), int(np.ptp(x)) + 1, int(np.ptp(y)) + 1]


def _segment_work(model: ICAS, references: References | None, threshold: float | None = None, **clicks):
    def work(image: np.ndarray) -> tuple[dict, np.ndarray, np.ndarray]:
        found = segment(image, references, threshold=threshold, model=model, **clicks)
        return {"score": float(top_share(torch.from_numpy(found.score)[None])[0]), "threshold": found.threshold,
                "label": "defect" if found.mask.any() else "good", "area": int(found.mask.sum()), "regions": found.boxes()}, found.score, found.mask
    return work


def _detect_work(model: ICAS, references: References, false_positive_rate: float):
    def work(image: np.ndarray) -> tuple[dict, np.ndarray, np.ndarray]:
        found = detect(image, references, false_positive_rate=false_positive_rate, model=model)
        mask = found.map > found.threshold
        region = Segmentation(mask, found.map, ["anomaly"], found.map[None], found.threshold).boxes()
        return {"score": found.score, "threshold": found.threshold, "label": "anomalous" if found.is_anomalous else "good",
                "area": int(mask.sum()), "regions": region}, found.map, mask
    return work


def _command(args) -> int:
    if args.command == "demo":
        return _demo(args)
    model = load(args.model, device=args.device)
    model, references = _check_call(_references(args, model), (), (), 1, model)
    if args.command == "prompts":
        if not references.shots:
            raise ValueError("references: none given; pass --anomaly IMAGE MASK or --normal IMAGE")
        references.save(args.out)
        print(f"{len(references)} references ({', '.join(references.labels) or 'normal only'}) in {args.out}")
        return 0
    if args.command == "detect":
        if not references.normals:
            raise ValueError("references: detect needs good parts; pass --normal IMAGE_OR_FOLDER")
        if not 0 < args.false_positive_rate < 1:
            raise ValueError(f"--false-positive-rate: expected a number between 0 and 1, got {args.false_positive_rate}")
        top = 2 * normal_threshold(_known_good(model, references), args.false_positive_rate)
        return _run_folder(args, _detect_work(model, references, args.false_positive_rate), top / 4, top)
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold: expected a number in [0, 1], got {args.threshold}")
    clicks: dict[str, Any] = {}
    if args.point or args.negative:
        clicks = {"points": args.point + args.negative, "point_labels": [1] * len(args.point) + [0] * len(args.negative)}
    if args.box:
        clicks["boxes"] = args.box
    if clicks and len(_expand(args.images)) > 1:
        raise ValueError("--point, --box: expected one image with them, got several; run icas once an image")
    if clicks:
        shape = tuple(to_rgb(_expand(args.images)[0], value_range=args.range).shape[:2])
        _clicks(clicks.get("points"), clicks.get("point_labels"), *shape)
        _boxes(clicks.get("boxes"), *shape)
    if not clicks and not references.shots:
        raise ValueError("references: none given; pass --anomaly IMAGE MASK, --normal IMAGE, --prompts FILE, --point X Y or --box X0 Y0 X1 Y1")
    return _run_folder(args, _segment_work(model, references, args.threshold, **clicks), 0.0, 1.0)


# The demo's prompt: cell 4 of the ELPV data set, its dark area outlined by hand, (x, y) in pixels of 300 x 300
DEMO_PROMPT = 4, [(15, 243), (40, 226), (90, 211), (140, 202), (200, 203), (240, 212), (262, 230), (256, 242), (225, 254), (150, 259), (60, 257)]
DEMO_GOOD, DEMO_CELLS = (3, 8, 10, 59), (6, 7, 13, 20, 21, 17, 368, 396, 409, 412)


def _demo(args) -> int:
    """Detect with four good solar cells, segment from one outlined defect; overlays, JSON lines and COCO (ELPV, 2,624 real cells)."""
    try:
        from elpv_dataset.utils import load_dataset
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise ImportError('the demo needs its extra: pip install "icas[demo]"') from error
    import argparse
    cells, probability, _ = load_dataset()
    out, (index, polygon) = Path(args.out), DEMO_PROMPT
    canvas = Image.new("L", (300, 300))
    ImageDraw.Draw(canvas).polygon(polygon, fill=255)
    mask = np.array(canvas) > 0
    _write_image(out / "prompt.png", overlay(cells[index], np.zeros_like(mask, dtype=np.float32), mask))
    for i in DEMO_CELLS:
        _write_image(out / "cells" / f"cell_{i:04d}{'_bad' if probability[i] == 1 else '_good'}.png", cells[i])
    model = load(device=args.device)
    shared: dict[str, Any] = {"images": [str(out / "cells")], "range": None, "anomaly": [], "normal": [], "prompts": None, "model": None}
    good = encode(normals=[cells[i] for i in DEMO_GOOD], model=model)
    top = 2 * normal_threshold(_known_good(model, good), 0.05)
    status = _run_folder(argparse.Namespace(**shared, out=str(out / "detect"), coco=None), _detect_work(model, good, 0.05), top / 4, top)
    dark = encode(anomalies=[(cells[index], mask, "dark area")], model=model)
    status |= _run_folder(argparse.Namespace(**shared, out=str(out / "segment"), coco=str(out / "segment" / "coco.json")),
                          _segment_work(model, dark), 0.0, 1.0)
    for task in ("detect", "segment"):
        pictures = [np.array(Image.open(p)) for p in sorted((out / task / "overlays").glob("*.png"))]
        rows = [np.hstack(pictures[:5]), np.hstack(pictures[5:10])]
        _write_image(out / f"{task}.png", np.vstack(rows))
    print(f"look at {out / 'prompt.png'}, {out / 'detect.png'} and {out / 'segment.png'}")
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """The console script `icas`. Exit status: 0 done, 1 some images failed (the rest is kept), 2 wrong use."""
    args = _parser().parse_args(argv)
    try:
        return _command(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"icas: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
