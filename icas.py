"""iCAS: an in-context anomaly segmentation framework for industrial visual inspection.

Show it one marked defect, a few good parts, or a click, and it marks defects in pictures it was
never trained on: the paper of this title, in its order. "Ours" heads what it does not have.

    from icas import encode, segment
    scratch = encode(anomalies=[("scratched.png", "scratched_mask.png")])    # once
    for result in segment(["part_1.png", "part_2.png"], scratch):            # many times
        print(result.mask.shape, result.score.max(), result.boxes())

    paper              code                     shape
    I_r, I_t           images                   (B, 3, H, W)      RGB in [0, 1]
    F_r, F_t           reference, target: maps  (B, n D, H0, W0)  of n tapped encoder blocks
    Q_c^0, Q_c         content                  (B, K, C)
    Q_p, Q_ntp         prompt, other            (B, 1, C)         prompted label; what is not it
    Q_fg, Q_bg         learned                  (2, C)
    P_t                pixels                   (B, P, 4 H0, 4 W0)
    script M_t         mask_logits              (B, K, 4 H0, 4 W0)
    S_s, S_n, S^mfm    keys of mask_scores

Departures from the paper's text, where it is open or where its printed form does worse:
 1. Features of any encoder blocks, of the shipped one block 9, not of the last (`Config.blocks`).
 2. Directions in which tokens differ by place alone are taken out before a cosine (`debias=0`).
 3. Algorithm 1's distance is to the picked set, as A.7 proves; printed, it picks central tokens.
 4. Queries get a sine encoding of their place and a learned embedding of their kind.
 5. Layers are pre-norm; content and prompt queries have feed-forward nets of their own.
 6. The neck is two convolutions, the mask decoder two transposed ones: a ViT has one stride.
 7. Masks are pooled by each token's share, so that a mask of one pixel never vanishes, and over
    twelve copies of the prompt: turned, mirrored and larger.
 8. The decoder also sees what matching without training says, pixel by pixel (`correspondence`);
    the shipped one sees nothing else, so that it works with any encoder (`features=False`).
 9. Classifiers are cosines with a learned scale; inner products saturate.
10. Eq. 1 sums over truths and unmatched queries; the latter belong to Q_bg, at a weight of 0.1.
11. Losses are taken at sampled points and normalised over all ranks, as in Mask2Former.
12. Scores are the prompt's share of what all masks claim, not an unbounded sum (`plain_sum=True`).
13. Mask-level matching has a temperature, and a mask counts by how little it is background.
14. `segment` fuses S_s, S_s^mfm, matching of tokens and, of small or thin marks, of a small CNN's
    cells at up to four times the input's side, and how far cells are from all background
    (`detail=False`: neither); a guided filter then moves the borders of what it marks to the
    picture's own edges, as far as these tell the mark in the prompt's picture.
15. The input keeps the picture's aspect ratio, at about (image_size / 14)^2 tokens.
16. `detect` compares tokens with good parts by nearest neighbour, or where none is known with
    other images (`mutual`); the three most novel ones score an image. S_n is what `segment`
    says of good parts alone with `plain_sum`.
"""
from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import math
import numbers
import os
import pickle
import sys
import threading
import time
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple, Sequence

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__version__ = "0.16.2"
__all__ = ["Batch", "Config", "Detection", "EncodedImage", "Features", "ICAS", "Prepared",
           "References", "Segmentation", "Truths", "convert", "detect", "encode", "encode_image",
           "fit", "load", "mutual", "overlay", "prepare", "save", "segment", "to_mask", "to_rgb"]

# name: (width D, depth, heads), as Meta released them; "-reg" adds four register tokens
ENCODERS = {"vits14": (384, 12, 6), "vitb14": (768, 12, 12), "vitl14": (1024, 24, 16),
            "vitg14": (1536, 40, 24)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as DINOv2 was trained
RELATIONS = 16    # maps that `relations` makes
PIXELS = 1 << 22  # of a larger picture whole blocks of pixels are seen as one
CAP = 1 << 16     # tokens that a level of a prompt keeps at most, besides the marked: ViT-S 0.1 GB
BANK = 1 << 14    # tokens that all good parts together keep of a level, so that 40 take the time of
#                   8; half of them of turned copies, where there are any
MANY = 200        # good parts that are encoded at most; of more, evenly spread ones
FEW = 4           # with so many good parts beside a marked one `segment` relies on them
DAMAGES = 16      # damaged copies of good parts that weigh the levels of `detect`
RATE = 0.08       # false positive rate of `detect` by default
MASK_FROM = 0.8   # pixels count from this share of the limit on image scores, which bounds the
#                   mean of a good part's three highest
SURE = 1.0        # log-odds beyond which a first look at clicks is believed
SIDES = "sides", "fine_sides"   # of a shot, as a file of references names them


@dataclass(frozen=True)
class Config:
    """What decides shapes and results; saved with the weights. Defaults are the paper's, but for
    the departures."""
    encoder: str = "vits14"         # a key of ENCODERS, or that with "-reg"
    image_size: int = 518           # pixels: a square is (image_size / 14)^2 tokens (Sec. 4.2)
    patch_size: int = 14            # pixels, fixed by DINOv2
    blocks: tuple[int, ...] = ()    # tapped, from 1; () is the last and one at 2/3 or 3/4 of them
    debias: int = 20                # positional directions taken out; 0: none (departure 2)
    detail: bool = True             # match on the maps of a small CNN too (departure 14)
    queries: int = 200              # K, content queries (A.1)
    learned_queries: bool = False   # K learned vectors in place of greedy selection (Table 7)
    dim: int = 256                  # C, width of the decoder
    layers: int = 6                 # decoder layers (A.1)
    heads: int = 8
    ffn_dim: int = 1728             # open in the paper: ViT-L stays below half of SAM (Table 14)
    pixel_dim: int = 256            # channels of P_t
    correspondence: bool = True     # the decoder sees relation maps (departure 8)
    features: bool = True           # and F_r, F_t; the shipped one not: looks do not carry over
    relation_dim: int = 64          # width of what reads them
    plain_sum: bool = False         # S = sum_i p_i M_i and S + S^mfm, as printed (departure 12)
    temperature: float = 0.07       # of mask-level feature matching (departure 13)

    def __post_init__(self) -> None:
        def expect(good: bool, name: str, what: str, hint: str = "") -> None:
            if not good:
                raise ValueError(f"{name}: expected {what}, got {getattr(self, name)!r}{hint}")
        name, size, patch = str(self.encoder).removesuffix("-reg"), self.image_size, self.patch_size
        expect(name in ENCODERS, "encoder", f"one of {sorted(ENCODERS)}, with or without '-reg'")
        width, depth, _ = ENCODERS[name]
        expect(isinstance(self.blocks, (tuple, list)), "blocks", "a tuple of block numbers")
        blocks = tuple(self.blocks) or (depth * 3 // 4 if depth == 12 else depth * 2 // 3, depth)
        vars(self).update(blocks=blocks)   # it is frozen
        near = max(1, round(size / patch)) * patch
        expect(size == near, "image_size", f"a positive multiple of {patch}", f"; use {near}")
        rising = sorted({*blocks} & {*range(1, depth + 1)})
        expect([*blocks] == rising, "blocks", f"rising numbers from 1 to {depth}")
        least = dict.fromkeys(("queries", "layers", "dim", "heads", "ffn_dim", "pixel_dim",
                               "relation_dim"), 1)
        for name, low in (least | {"debias": 0, "temperature": 1e-6}).items():
            expect(getattr(self, name) >= low, name, f"at least {low}")
        expect(self.debias < width, "debias", f"less than the encoder's width {width}")
        expect(self.features or self.correspondence, "features", "True without correspondence")
        expect(self.dim % self.heads == self.dim % 4 == 0, "dim",
               f"a multiple of 4 and of heads={self.heads}")

    @property
    def last(self) -> int:
        """Index among the levels of the last tapped block, for queries and mask-level matching."""
        return len(self.blocks) - 1


# ---- 3.1 Unified framework: the frozen encoders -------------------------------------------------

def mlp(dim: int, hidden: int) -> nn.Sequential:
    layers = OrderedDict(fc1=nn.Linear(dim, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, dim))
    return nn.Sequential(layers)


class SwiGLU(nn.Module):   # for ViT-g: 2/3 of 4 x 1536 wide, rounded up to a multiple of 8
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class EncoderBlock(nn.Module):
    def __init__(self, dim: int, heads: int, swiglu: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.ones(dim)}) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.attn.heads = heads
        self.mlp = SwiGLU(dim, (int(dim * 8 / 3) + 7) // 8 * 8) if swiglu else mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.attn["qkv"](self.norm1(x)), "b n (three h d) -> three b h n d",
                            three=3, h=self.attn.heads)
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        x = x + self.attn["proj"](y) * self.ls1["gamma"]
        return x + self.mlp(self.norm2(x)) * self.ls2["gamma"]


class Encoder(nn.Module):
    """DINOv2 with Meta's key names, frozen (Sec. 3.1): patch tokens of any blocks in one pass."""

    def __init__(self, name: str = "vits14", patch_size: int = 14):
        super().__init__()
        (dim, depth, heads), swiglu = ENCODERS[name.removesuffix("-reg")], name.startswith("vitg")
        self.patch_size, self.registers = patch_size, 4 * name.endswith("-reg")
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + 37 * 37, dim) * 0.02)
        if self.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, self.registers, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, patch_size)})
        self.blocks = nn.ModuleList(EncoderBlock(dim, heads, swiglu) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.register_buffer("light", torch.tensor([MEAN, STD])[..., None, None], persistent=False)
        self.requires_grad_(False)

    def positions(self, h0: int, w0: int) -> Tensor:
        """(1, H0 W0, D): the 37 x 37 position embedding, resized as each release does it."""
        grid = rearrange(self.pos_embed[:, 1:], "1 (h w) d -> 1 d h w", h=37)
        if (h0, w0) != (37, 37) and self.registers:
            grid = F.interpolate(grid, (h0, w0), mode="bicubic", antialias=True)
        elif (h0, w0) != (37, 37):  # Meta's resize scales by (h0 + 0.1) / 37
            grid = F.interpolate(grid, None, [(n + 0.1) / 37 for n in (h0, w0)], mode="bicubic")
        return rearrange(grid, "1 d h w -> 1 (h w) d")

    def forward(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """(B, 3, H, W) RGB in [0, 1], sides multiples of 14 -> one (B, D, H0, W0) float32 map after
        each of `blocks` (from 1, rising), through the final LayerNorm."""
        h0, w0 = (n // self.patch_size for n in images.shape[-2:])
        x = self.patch_embed["proj"]((images - self.light[0]) / self.light[1])
        x = rearrange(x, "b d h w -> b (h w) d") + self.positions(h0, w0)
        first = [self.cls_token + self.pos_embed[:, :1]]
        first += [self.register_tokens] if self.registers else []
        x = torch.cat([*(t.expand(len(x), -1, -1) for t in first), x], dim=1)
        taken = []
        for number, block in enumerate(self.blocks[:max(blocks)], start=1):
            x = block(x)
            taken += [self.norm(x)[:, 1 + self.registers:].float()] if number in blocks else []
        return [rearrange(tokens, "b (h w) d -> b d h w", h=h0) for tokens in taken]


def positional_basis(encoder: Encoder, grid: tuple[int, int], config: Config) -> list[Tensor]:
    """Directions in which tokens differ by place alone (departure 2, INSID3's idea): (D, debias)
    orthonormal float32 a block, leading in the centred tokens of a blank and three noise images."""
    size, random = (n * encoder.patch_size for n in grid), torch.Generator().manual_seed(0)
    noise = torch.rand(3, 3, *size, generator=random)
    images = torch.cat([torch.full_like(noise[:1], 0.5), noise]).to(encoder.cls_token.device)
    tokens = [rearrange(x, "b d h w -> (b h w) d") for x in encoder(images, config.blocks)]
    centred = [(x - x.mean(dim=0)).cpu().double() for x in tokens]   # MPS has no float64
    # eigenvectors of the (D, D) scatter are the right singular vectors, whatever the grid
    return [torch.linalg.eigh(x.T @ x)[1].flip(1)[:, :config.debias].float().to(images.device)
            for x in centred]


def unit_tokens(features: Tensor, basis: Tensor | None = None) -> Tensor:
    """(B, D, H0, W0) -> (B, H0 W0, D) float32 unit vectors, without the span of basis (D, n)."""
    tokens = rearrange(features, "b d h w -> b (h w) d").float()
    tokens = tokens if basis is None else tokens - (tokens @ basis) @ basis.T
    return F.normalize(tokens, dim=-1)


class Detail(nn.Module):
    """Ours: 15 blocks of EfficientNet-Lite2, frozen, for what tokens of 14 pixels cannot see."""
    # expand, kernel, stride, channels, count
    ROWS = (1, 3, 1, 16, 1), (6, 3, 2, 24, 3), (6, 5, 2, 48, 3), (6, 3, 2, 88, 4), (6, 5, 1, 120, 4)
    TAPS = (3, 6, 10, 14)   # blocks from 0, at strides 4, 8, 16, 16

    def __init__(self):
        super().__init__()
        norm, self.blocks, inside = functools.partial(nn.BatchNorm2d, eps=1e-3), nn.ModuleList(), 32
        relu = functools.partial(nn.ReLU6, inplace=True)
        self.stem, self.stem_norm = nn.Conv2d(3, 32, 3, 2, bias=False), norm(32)
        for expand, kernel, stride, out, count in self.ROWS:
            for step in (stride,) + (1,) * (count - 1):
                wide = inside * expand
                first = {"expand": nn.Conv2d(inside, wide, 1, bias=False), "norm0": norm(wide),
                         "relu0": relu()} if expand > 1 else {}
                edge = kernel // 2
                if len(self.blocks) == 1:   # of stride 2 it alone is padded as by TensorFlow
                    edge, first["pad"] = 0, nn.ZeroPad2d((0, 1, 0, 1))
                self.blocks.append(nn.Sequential(OrderedDict(
                    first,
                    depthwise=nn.Conv2d(wide, wide, kernel, step, edge, groups=wide, bias=False),
                    norm1=norm(wide), relu1=relu(),
                    project=nn.Conv2d(wide, out, 1, bias=False), norm2=norm(out))))
                inside = out
        self.requires_grad_(False)

    def fuse(self) -> None:
        """Fold each norm into the convolution before it: the same maps in 0.7 of the time."""
        for layers in (self, *self.blocks):
            named = list(layers.named_children())
            for (conv, weights), (norm, after) in zip(named, named[1:]):
                if isinstance(after, nn.BatchNorm2d):
                    fused = nn.utils.fuse_conv_bn_eval(weights, after).requires_grad_(False)
                    setattr(layers, conv, fused)
                    setattr(layers, norm, nn.Identity())

    def taps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) RGB in [0, 1] -> the maps of TAPS, as the published package makes them."""
        images = images.contiguous(memory_format=torch.channels_last)   # half the time on a CPU
        x = F.pad((255 * images - 127) / 128, (0, 1, 0, 1))
        x, found = F.relu6(self.stem_norm(self.stem(x))), []
        for number, block in enumerate(self.blocks):
            y = block(x)
            x = x + y if x.shape == y.shape else y   # residual where size and width stay
            found += [x] if number in self.TAPS else []
        return found

    def forward(self, images: Tensor) -> Tensor:
        """(B, 280, H / 8, W / 8) float32: the four maps, each a 3 x 3 mean of unit length."""
        mean = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        resize = functools.partial(F.interpolate, size=[max(1, n // 8) for n in images.shape[-2:]],
                                   mode="bilinear", antialias=True)
        return torch.cat([resize(F.normalize(mean(x.float()))) for x in self.taps(images)], dim=1)


# ---- 3.1 Unified framework: prompts, query selection, decoder ------------------------------------

def token_share(masks: Tensor, h0: int, w0: int) -> Tensor:
    """(B, H, W) masks in [0, 1] -> (B, H0, W0) share of each token's area (departure 7)."""
    return F.adaptive_avg_pool2d(masks.float(), (h0, w0))


def mask_pool(features: Tensor, masks: Tensor) -> Tensor:
    """(B, N, C) mean of features (B, T, C) under each of masks (B, N, T) (MaskPooling, Sec. 3.1);
    an empty mask gives zeros, never NaN, and so do its gradients."""
    pooled = torch.einsum("btc,bnt->bnc", features, masks)
    return pooled / masks.sum(dim=-1, keepdim=True).clamp_min(1e-8)   # far below a pixel's share


def greedy_queries(tokens: Tensor, count: int) -> Tensor:
    """Greedy query selection: farthest-point sampling, a 2-approximation of k-center (Alg. 1, A.7).
    tokens (B, T, D) -> (B, min(count, T)) int64 as picked: the token farthest from the mean, then
    each time the one farthest from the picked set (departure 3); the lowest index wins ties."""
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    square = wide.square().sum(dim=-1)
    distance = square[:, :, None] + square[:, None] - 2 * wide @ wide.mT                 # b t t
    gaps = (wide - wide.mean(dim=1, keepdim=True)).square().sum(dim=-1)                  # b t
    nearest, picked = torch.full_like(gaps, torch.inf), []
    for _ in range(min(count, wide.shape[1])):
        picked.append(gaps.argmax(dim=1, keepdim=True))   # the first of equals
        found = distance.take_along_dim(picked[-1][..., None], dim=1)[:, 0].clamp_min(0)
        gaps = nearest = torch.minimum(nearest, found).scatter(1, picked[-1], -1)   # never again
    return torch.cat(picked, dim=1)


class Prompt(NamedTuple):
    """One label's references, all shots pooled. R tokens a level: tapped blocks, then detail."""
    tokens: list[Tensor]      # (B, R, D) a level: unit vectors
    foreground: list[Tensor]  # (B, R) a level: share of the prompted label; 0 of good parts alone
    background: list[Tensor]  # (B, R) a level: share of what is surely not it
    fisher: list[Tensor]      # (B, D, 1) a level, see `fisher_direction`
    usual: list[Tensor]       # (B,) a level, see `usual_distance`; infinite where it is not known
    neck: tuple[Tensor, ...] = ()   # the neck's map (B, R, C) and its two shares, where one is
    weight: float = 0.0       # the detail's beside the blocks, see `detail_weight`
    edges: float = 0.0        # what `follow_edges` counts for, see `edge_share`
    scales: tuple[int, ...] = (1,)   # times the side of the picture whose detail is matched, and,
    #                           the last, of that whose detail tells what is novel
    good: int = 0             # good parts among the images
    decoder: float = 0.2      # weight of the decoder's log-odds beside those of matching

    @property
    def marked(self) -> Tensor:
        """(B,) 1.0 where the prompt marks an anomaly, 0.0 where it only shows what is normal."""
        return (self.foreground[0].amax(dim=1) > 0).float()


class ChannelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:   # over the channels of a (B, C, H, W) map
        return rearrange(super().forward(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")


class CrossAttention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.proj = (nn.Linear(config.dim, config.dim) for _ in range(4))

    def forward(self, *inputs: Tensor) -> Tensor:   # queries, keys, values
        q, k, v = (rearrange(f(x), "b n (h d) -> b h n d", h=self.heads)
                   for f, x in zip((self.q, self.k, self.v), inputs, strict=True))
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class DecoderLayer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(config.dim) for _ in range(3))
        self.self_attention, self.cross_attention = (CrossAttention(config) for _ in range(2))
        self.content_ffn, self.prompt_ffn = (mlp(config.dim, config.ffn_dim) for _ in range(2))

    def forward(self, x: Tensor, place: Tensor, memory: Tensor, memory_place: Tensor) -> Tensor:
        """x, place (B, K + 4, C), content first; memory, memory_place (B, T, C) (departure 5)."""
        y = self.norm1(x)
        x = x + self.self_attention(y + place, y + place, y)
        x = x + self.cross_attention(self.norm2(x) + place, memory + memory_place, memory)
        y = self.norm3(x)
        return x + torch.cat([self.content_ffn(y[:, :-4]), self.prompt_ffn(y[:, -4:])], dim=1)


class Decoded(NamedTuple):
    """What the decoder says of B targets; K content queries. Everything float32."""
    content: Sequence[Tensor]  # (B, K, C) after each layer
    classes: Sequence[Tensor]  # (B, 4, C) after each layer: prompt, other, foreground, background
    pixels: Tensor             # (B, P, 4 H0, 4 W0): P_t


class Decoder(nn.Module):
    """What is trained: neck, in-context and mask decoder, classifiers (Sec. 3.1)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, dim, pixel = config, config.dim, config.pixel_dim
        if config.features:
            width = ENCODERS[config.encoder.removesuffix("-reg")][0] * len(config.blocks)
            self.neck = nn.Sequential(nn.Conv2d(width, dim, 1), ChannelNorm(dim),
                                      nn.Conv2d(dim, dim, 3, padding=1), ChannelNorm(dim))
            self.up = nn.Sequential(nn.ConvTranspose2d(dim, pixel, 2, 2), ChannelNorm(pixel),
                                    nn.GELU(), nn.ConvTranspose2d(pixel, pixel, 2, 2))
        self.type_embed = nn.Parameter(torch.randn(5, dim) * 0.02)  # content, then as in Decoded
        self.learned = nn.Parameter(torch.randn(2, dim) * 0.02)     # Q_fg, Q_bg
        if config.learned_queries:
            self.content_embed = nn.Parameter(torch.randn(config.queries, dim) * 0.02)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(dim)
        self.mask_embed = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, pixel))
        self.class_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # departure 9
        if config.correspondence:
            wide = config.relation_dim   # read by pixel: the maps' shapes do not carry over
            self.relation = nn.Sequential(nn.Conv2d(RELATIONS, wide, 1), nn.GELU(),
                                          nn.Conv2d(wide, wide, 1), nn.GELU())
            self.relation_to_memory = nn.Conv2d(wide, dim, 1)
            self.relation_to_pixels = nn.Conv2d(wide, pixel, 1)

    def forward(self, neck: Tensor | None, prompt: Prompt, maps: Tensor | None,
                picked: Tensor | None) -> Decoded:
        """neck (B, C, H0, W0) (None without features), maps of `relations` (None without
        correspondence), picked (B, K) token indices of Q_c^0 (None of learned queries)."""
        memory, pixels = (0, 0) if neck is None else (neck, self.up(neck))
        if maps is not None:
            seen = self.relation(maps)
            memory = memory + self.relation_to_memory(F.avg_pool2d(seen, 4))
            pixels = pixels + self.relation_to_pixels(seen)
        b, c, h0, w0 = memory.shape
        memory = rearrange(memory, "b c h w -> b (h w) c")
        # each token's place: two-dimensional sine encoding, ten turns an axis
        rate = 10000 ** (torch.arange(c // 4, device=memory.device) / (c // 4))
        y, x = ((torch.arange(n, device=memory.device) + 0.5)[:, None] / n * 2 * math.pi * 10 / rate
                for n in (h0, w0))
        y, x = repeat(y, "h c -> (h w) c", w=w0), repeat(x, "w c -> (h w) c", h=h0)
        memory_place = torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], dim=1).to(memory.dtype)
        if self.config.learned_queries:   # Q_c^0 without a place
            content = repeat(self.content_embed, "k c -> b k c", b=b).to(memory.dtype)
        else:   # tokens of F_t (Alg. 1)
            content = memory.take_along_dim(picked[..., None], dim=1)
        place = torch.zeros_like(content) if picked is None else memory_place[picked]
        pooled = memory.new_zeros(1, 2, c)   # Q_p^0, Q_ntp^0; without features their kind alone
        if prompt.neck:
            tokens, *sides = prompt.neck
            pooled = mask_pool(tokens, torch.stack(sides, dim=1).to(tokens.dtype))
        # Q_fg stands for Q_p where nothing is marked
        wanted = torch.where(prompt.marked[:, None, None] > 0, pooled[:, :1], self.learned[0])
        queries = (wanted, pooled[:, 1:], *self.learned[:, None, None])
        x = torch.cat([content, *(q.expand(b, -1, -1) for q in queries)], dim=1)
        types = repeat(self.type_embed[1:], "n c -> b n c", b=b).to(place.dtype)
        place, after = torch.cat([place + self.type_embed[0], types], dim=1), []
        for layer in self.layers:
            x = layer(x, place, memory, memory_place)
            after.append(self.norm(x).float().tensor_split([-4], dim=1))
        return Decoded(*zip(*after), pixels.float())

    def mask_logits(self, content: Tensor, pixels: Tensor) -> Tensor:
        """(B, K, ...) logits of script M_t = sigmoid(Q_c . P_t); pixels (B, P, ...)."""
        return torch.einsum("bkp,bp...->bk...", self.mask_embed(content).to(pixels.dtype), pixels)

    def class_logits(self, content: Tensor, classes: Tensor) -> Tensor:
        """(2, B, K, 3): over {Q_p, Q_ntp, Q_bg} and over {Q_fg, Q_ntp, Q_bg} (Sec. 3.2)."""
        scale = self.class_scale.exp().clamp(max=100)
        cosine = scale * F.normalize(content, dim=-1) @ F.normalize(classes, dim=-1).mT
        return torch.stack([cosine[..., [0, 1, 3]], cosine[..., [2, 1, 3]]])


# ---- Ours: what matching without training says ---------------------------------------------------

def surely(share: Tensor, floor: float) -> Tensor:
    """(B, R) bool: tokens that stand for a side: at least `floor`, or that part of the largest."""
    top = share.amax(dim=1, keepdim=True)
    return (share >= (top * floor).clamp_max(floor)) & (top > 0)


def best_cosine(target: Tensor, reference: Tensor, chosen: Tensor) -> Tensor:
    """(B, T) best cosine of unit vectors, target (B, T, D) to reference (B or 1, R, D), among those
    that chosen (B or 1, R) bool marks; -1 to none."""
    best = target.new_full(target.shape[:2], -1.0)
    if shared := len(reference) == len(chosen) == 1:   # one prompt for all: cut out once
        reference = reference[:, chosen[0]]
    for part in range(0, reference.shape[1], 4096):    # bounds memory at T x 4096 an image
        cosine = target @ reference[:, part:part + 4096].mT
        if not shared:
            cosine = cosine.masked_fill(~chosen[:, None, part:part + 4096], -1.0)
        best = torch.maximum(best, cosine.amax(dim=2).float())
    return best


class Matching(NamedTuple):
    """What matching says of target tokens, (B, T) each; foreground is 0 where nothing is marked."""
    best_fg: Tensor     # best cosine to the prompt's foreground
    best_bg: Tensor     # and to its background
    mean_fg: Tensor     # cosine to the foreground's mean
    mean_bg: Tensor
    fisher: Tensor      # Fisher's discriminant: +0.5 at one mean, -0.5 at the other, in [-3, 3]


def match_tokens(target: Tensor, prompt: Prompt, level: int) -> Matching:
    """Compare target tokens (B, T, D), unit vectors of a level, with the prompt's of that level."""
    reference, share = prompt.tokens[level], prompt.foreground[level]
    background, marked = surely(prompt.background[level], 0.999), prompt.marked[:, None]
    means = mask_pool(reference, torch.stack([share, background.to(share.dtype)], dim=1))
    mean_fg, mean_bg = (target @ F.normalize(means, dim=-1).mT).float().unbind(dim=-1)
    centred = target - means.mean(dim=1, keepdim=True)
    fisher = (centred @ prompt.fisher[level])[..., 0].float().clamp(-3, 3)
    best_fg, best_bg = (best_cosine(target, reference, x) for x in (surely(share, 0.5), background))
    return Matching(best_fg * marked, best_bg, mean_fg * marked, mean_bg, fisher * marked)


def usual_distance(tokens: Tensor, sides: Tensor) -> Tensor:
    """(B,) cosine distance to the nearest other one that 1 % of an image's own background tokens
    exceed, neighbours apart; infinite where nothing is marked or less than a quarter is background.
    tokens (B, H0 W0, D) unit vectors; sides (B, 2, H0, W0) shares of the defect, of what is not."""
    usual, apart = [], round(max(sides.shape[-2:]) / 13)
    for x, (inside, outside) in zip(tokens, sides):
        place, own = (outside > 0.999).nonzero().short(), x[outside.flatten() > 0.999]   # n 2, n d
        if 4 * len(own) < len(x) or not inside.any():
            usual.append(math.inf)
            continue
        some = torch.linspace(0, len(own) - 1, min(600, len(own)), device=own.device).round().long()
        near = (place[some, None] - place).abs().amax(dim=-1) <= apart
        best = (own[some] @ own.mT).masked_fill(near, -1).amax(dim=1)
        usual.append(1 - float(best.float().quantile(0.01)))
    return torch.tensor(usual, device=tokens.device)


def beyond_usual(best_bg: Tensor, usual: Tensor) -> Tensor:
    """(B, T) log of how much farther than `usual` (B,) tokens are from the background, in [-2, 2];
    0 where that is infinite."""
    far = (1.01 - best_bg).clamp_min(0.01).log() - (0.01 + usual[:, None]).log()
    return torch.where(usual[:, None].isinf(), 0.0, far.clamp(-2, 2))


def fisher_direction(reference: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
    """(B, D, 1) Fisher's linear discriminant of tokens (B, R, D) by two sides, (B, R) shares, whose
    means it puts 1 apart; the scatter is shrunk by 0.03 of its trace."""
    inside, outside = surely(foreground, 0.5), surely(background, 0.999)
    weight = (inside | outside).to(foreground.dtype)
    means = mask_pool(reference, torch.stack([foreground, outside.to(weight.dtype)], dim=1))
    centred = reference - torch.where(inside[..., None], means[:, :1], means[:, 1:])
    centred = centred * weight[..., None]
    scatter = centred.mT @ centred / weight.sum(dim=1)[:, None, None].clamp_min(1)
    diagonal = scatter.diagonal(dim1=1, dim2=2)
    diagonal += 0.03 * diagonal.sum(dim=1, keepdim=True) + 1e-6    # in place: a view of the scatter
    gap = (means[:, 0] - means[:, 1])[..., None]
    direction = torch.cholesky_solve(gap, torch.linalg.cholesky(scatter))
    return direction / (gap * direction).sum(dim=1, keepdim=True).clamp_min(1e-6)


def relations(matches: Sequence[Matching], grids: Sequence[tuple[int, int]], prompt: Prompt,
              size: Sequence[int], blocks: int) -> Tensor:
    """(B, RELATIONS, *size) float32, of order one: what matching says (departure 8) on the average
    of the first `blocks` levels, then on the next, the detail (0 without), also standardised within
    the picture. Of good parts alone the foreground's are 0; margins say what is far from them."""
    maps, marked = [], prompt.marked[:, None]
    for m, usual, grid in zip(matches[:blocks + 1], prompt.usual, grids):
        margin = m.best_fg - m.best_bg
        free = torch.stack([margin, m.fisher, 1 - m.best_bg], dim=1)                    # b 3 t
        free = free - free.mean(dim=2, keepdim=True)
        free = free / (free.std(dim=2, keepdim=True, correction=0) + 1e-3)
        own = torch.stack([4 * margin, 4 * (m.mean_fg - m.mean_bg), m.fisher,
                           beyond_usual(m.best_bg, usual)], dim=1)
        maps.append(F.interpolate(torch.cat([own, free], dim=1).unflatten(2, grid), size=size,
                                  mode="bilinear", antialias=True))
    # of the prompt's kept tokens: of twelve copies some three times the share of the picture, which
    # training saw; the true share is no better
    area = (prompt.foreground[0].mean(dim=1, keepdim=True) + 1e-4).log10() * marked
    both = torch.stack([marked, area], dim=1)[..., None].float().expand(-1, -1, *size)
    detail = maps[-1] if len(maps) > blocks else torch.zeros_like(maps[0])
    return torch.cat([sum(maps[:blocks]) / blocks, detail, both], dim=1)


# ---- 3.2 Objective -------------------------------------------------------------------------------

def match(class_probs: Tensor, mask_logits: Tensor, truth_class: Tensor,
          truth_masks: Tensor) -> tuple[Tensor, Tensor]:
    """Bipartite matching of Eq. 1 for one image: indices of queries and truths, (min(K, N),) each.
    class_probs (2, K, 3), mask_logits (K, P) at sampled points; truths as in `Truths`, (N, P)."""
    probs, both = mask_logits.sigmoid(), mask_logits @ truth_masks.T
    bce = F.softplus(mask_logits).mean(dim=1)[:, None] - both / probs.shape[1]
    dice = 1 - (2 * probs @ truth_masks.T + 1) / (probs.sum(1)[:, None] + truth_masks.sum(1) + 1)
    # SciPy needs float64 on the CPU: bf16 costs tie and the match changes
    likely, bce, dice = torch.stack([class_probs.sum(0)[:, truth_class], bce, dice]).cpu().double()
    cost = -2 * likely + 5 * bce + 5 * dice
    if not torch.isfinite(cost).all():
        raise ValueError("fit: a mask or class is not finite; lower lr, check images and weights")
    pairs = scipy.optimize.linear_sum_assignment(cost.numpy())
    return tuple(torch.as_tensor(x, device=mask_logits.device) for x in pairs)


def mask_loss(logits: Tensor, truths: Tensor) -> Tensor:
    """(N,) BCE x 5 + dice x 5 of mask logits (N, P) against truths (N, P) in [0, 1]."""
    probs = logits.sigmoid()
    overlap, sizes = (probs * truths).sum(dim=1), probs.sum(dim=1) + truths.sum(dim=1)
    bce = F.binary_cross_entropy_with_logits(logits, truths, reduction="none").mean(dim=1)
    return 5 * bce + 5 * (1 - (2 * overlap + 1) / (sizes + 1))


class Truths(NamedTuple):
    """Segments of one target: masks (N, 4 H0, 4 W0) in [0, 1]; classes (N,) 0 prompted, 1 other."""
    masks: Tensor
    classes: Tensor


def objective(decoder: Decoder, decoded: Decoded, marked: Tensor, truths: Sequence[Truths],
              points: Tensor, totals: Tensor) -> dict[str, Tensor]:
    """Eq. 1 over every layer, as parts to be summed. marked (B,) 1.0 where the first classifier is
    trained; points (P,) of the flattened (4 H0, 4 W0) grid, where masks are compared; totals of
    `loss_totals` divide the parts."""
    pixels = decoded.pixels.flatten(2)[..., points]
    sampled = [t.masks.flatten(1)[:, points] for t in truths]
    total = totals.to(pixels.device).clamp_min(1)
    no_object = torch.tensor([1.0, 1.0, 0.1], device=pixels.device)   # departure 10
    parts = {name: pixels.new_zeros(()) for name in ("target", "other", "mask")}
    for content, classes in zip(decoded.content, decoded.classes):
        masks, logits = decoder.mask_logits(content, pixels), decoder.class_logits(content, classes)
        probs = logits.softmax(dim=-1).detach()
        wanted = torch.full(masks.shape[:2], 2, device=masks.device)  # unmatched belong to Q_bg
        for i, truth in enumerate(truths):
            rows, columns = match(probs[:, i], masks[i].detach(), truth.classes, sampled[i])
            wanted[i, rows] = truth.classes[columns]
            parts["mask"] += mask_loss(masks[i, rows], sampled[i][columns]).sum() / total[0]
        each = F.cross_entropy(logits.flatten(0, 2), wanted.repeat(2, 1).flatten(), no_object,
                               reduction="none").view(logits.shape[:3])
        parts["target"] += 2 * (each[0] * marked[:, None]).sum() / total[1]
        parts["other"] += 2 * each[1].sum() / total[2]
    return parts


# ---- The model -----------------------------------------------------------------------------------

@dataclass(eq=False)
class Features:
    """What the frozen encoders give of B images of one size."""
    maps: Tensor                   # (B, blocks * D, H0, W0): F of every tapped block, normed
    detail: Tensor | None = None   # (B, 280, H1, W1) of `Detail`, at stride 8
    picture: Tensor | None = None  # (B, 3, 16 H1, 16 W1) uint8 RGB, twice the side
    closer: dict[int, Tensor] = field(default_factory=dict)   # see `ICAS.look_closer`

    def tensors(self) -> dict[str, Tensor]:
        """What files keep of them, by name."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Features":
        """A copy there; the picture stays uint8."""
        def move(known: dict) -> dict:
            return {key: x.to(device, dtype if x.is_floating_point() else x.dtype)
                    for key, x in known.items()}
        return Features(**move(self.tensors()), closer=move(self.closer))


class ICAS(nn.Module):
    """Frozen encoders and the decoder. `load` makes one."""

    def __init__(self, config: Config = Config()):
        super().__init__()
        self.config, self.encoder = config, Encoder(config.encoder, config.patch_size)
        self.detail = Detail() if config.detail else None
        self.decoder = Decoder(config)
        self.encoder_sha256 = ""  # of the file that the encoder came from; set by `load`
        self.kept: dict[tuple, list[Tensor]] = {}   # positional bases of token grids

    @property
    def device(self) -> torch.device:
        return self.encoder.cls_token.device

    @property
    def kind(self) -> str:
        """What features depend on: those of another kind cannot be compared."""
        c = self.config
        return (f"encoder {self.encoder_sha256[:12]}, {c.image_size} px, blocks {c.blocks}, "
                f"{'with' if c.detail else 'no'} detail")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=fast_bf16(self.device))

    def describe(self, images: Tensor, picture: Tensor | None = None) -> Features:
        """Encode (B, 3, H, W) RGB in [0, 1], sides multiples of the patch."""
        with self.autocast():
            maps = torch.cat(self.encoder(images, self.config.blocks), dim=1)
            detail = self.detail(images) if self.config.detail else None
        return Features(maps, detail, picture)

    def look_closer(self, features: Features, scale: int = 2) -> Tensor:
        """(B, 280, scale H1, scale W1) detail of the picture at scale (1, 2 or 4) times the
        side, kept in the features."""
        if scale == 1:
            return features.detail
        if scale not in features.closer:
            seen = features.picture / 255
            if scale > 2:   # the picture is of twice the side
                seen = F.interpolate(seen, scale_factor=scale // 2, mode="bicubic").clamp(0, 1)
            with self.autocast():
                features.closer[scale] = self.detail(seen).half()
        return features.closer[scale]

    def tokens(self, maps: Tensor) -> list[Tensor]:
        """(B, blocks * D, H0, W0) -> one (B, T, D) of unit vectors a tapped block (departure 2)."""
        c, grid = self.config, tuple(maps.shape[-2:])
        key = (*grid, c.blocks, c.debias, self.device)
        if c.debias and key not in self.kept:
            with torch.autocast(self.device.type, enabled=False):
                self.kept[key] = positional_basis(self.encoder, grid, c)
        split = rearrange(maps.float(), "b (n d) h w -> n b d h w", n=len(c.blocks))
        return list(map(unit_tokens, split, self.kept[key] if c.debias else [None] * len(split)))

    def details(self, features: Features, scales: Sequence[int]) -> list[Tensor]:
        """The detail's maps at each of `Prompt.scales`; none without detail."""
        return [self.look_closer(features, scale) for scale in scales if self.config.detail]

    def levels(self, features: Features, scales: Sequence[int] = (1,)) -> list[Tensor]:
        """What is matched: (B, T, D) unit vectors of each tapped block, then of the `details`."""
        return self.tokens(features.maps) + [*map(unit_tokens, self.details(features, scales))]

    def grids(self, features: Features, scales: Sequence[int] = (1,)) -> list[tuple[int, int]]:
        """(h, w) of each of `levels`."""
        maps = [features.maps] * len(self.config.blocks) + self.details(features, scales)
        return [tuple(x.shape[-2:]) for x in maps]

    def match(self, tokens: Sequence[Tensor], prompt: Prompt) -> list[Matching]:
        """`match_tokens` of each level; in bf16, for the eighth bit of a cosine does not matter."""
        with self.autocast():
            return [match_tokens(x, prompt, level) for level, x in enumerate(tokens)]

    def neck(self, maps: Tensor) -> list[Tensor]:
        """The neck's map as (B, H0 W0, C) float32 tokens; without features no map."""
        if not self.config.features:
            return []
        with self.autocast():
            return [rearrange(self.decoder.neck(maps.float()).float(), "b c h w -> b (h w) c")]

    def decode(self, features: Features, levels: Sequence[Tensor], prompt: Prompt,
               matches: Sequence[Matching] | None = None, jitter: Tensor | None = None) -> Decoded:
        """The decoder's view of B targets against one prompt; their `levels`, `matches` of each.
        jitter (B, 2, RELATIONS): a gain and a shift of each relation map, in training."""
        c, neck, maps, picked, grid = self.config, None, None, None, features.maps.shape[-2:]
        with self.autocast():
            if c.features:
                neck = self.decoder.neck(features.maps.float())
            if c.correspondence:
                matches = self.match(levels, prompt) if matches is None else matches
                maps = relations(matches, self.grids(features, prompt.scales), prompt,
                                 [4 * n for n in grid], len(c.blocks))
                if jitter is not None:
                    gain, shift = jitter[..., None, None].unbind(dim=1)
                    maps = maps * gain + shift
            if not c.learned_queries:
                with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                    picked = greedy_queries(levels[c.last], c.queries)
            return self.decoder(neck, prompt, maps, picked)


def fast_bf16(device: str | torch.device) -> bool:
    """Whether bf16 autocast pays: on CUDA always, on a CPU if it has avx512_bf16 or amx."""
    kind, names = torch.device(device).type, ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return kind == "cuda" or kind == "cpu" and any(
        getattr(torch.cpu, name, lambda: False)() for name in names)


# ---- 3.3 Training --------------------------------------------------------------------------------

class Batch(NamedTuple):
    """B pairs of one grid, encoded. A pair with an all-zero foreground shows what is normal."""
    target: Features
    reference: Features      # of B * S images, the S shots of a pair side by side
    sides: list[Tensor]      # (B, S, 2, h, w) at each of its grids: share of the prompted label,
    #                          share of what is surely not it
    truths: list[Truths]     # segments of each target
    jitter: Tensor | None = None   # see `ICAS.decode`


def loss_totals(batch: Batch, config: Config) -> Tensor:
    """(3,): matched masks, class weights of either classifier; known before the forward."""
    foreground = batch.sides[0][:, :, 0]                                       # b s h w
    places = config.queries if config.learned_queries else foreground[0, 0].numel()
    queries, marked = min(config.queries, places), foreground.flatten(1).amax(dim=1) > 0
    matched = torch.tensor([float(min(queries, len(t.classes))) for t in batch.truths])
    weights = matched + 0.1 * (queries - matched)   # the unmatched weigh 0.1
    return torch.stack([matched, weights * marked.cpu(), weights]).sum(1)


def pair_loss(model: ICAS, batch: Batch, generator: torch.Generator,
              totals: Tensor | None = None) -> dict[str, Tensor]:
    """Loss parts of one batch of pairs, to be summed; totals: `loss_totals` over all ranks."""
    totals = loss_totals(batch, model.config) if totals is None else totals
    b, (h0, w0), blocks = len(batch.truths), batch.target.maps.shape[-2:], len(model.config.blocks)
    pool = functools.partial(rearrange, pattern="(b s) t d -> b (s t) d", b=b)
    tokens, neck = (list(map(pool, t)) for t in (model.levels(batch.reference),
                                                 model.neck(batch.reference.maps)))
    grids = [batch.sides[0]] * blocks + batch.sides[1:][:model.config.detail]
    sides = [rearrange(side, "b s n h w -> n b (s h w)").unbind() for side in grids]
    directions = [fisher_direction(t, *side) for t, side in zip(tokens, sides)]
    usual = [usual_distance(t[:, :side[0, 0, 0].numel()], side[:, 0])   # of the first shot
             for t, side in zip(tokens, grids)]
    prompt = Prompt(tokens, *map(list, zip(*sides)), directions, usual,
                    (*neck, *sides[0]) if neck else ())
    decoded = model.decode(batch.target, model.levels(batch.target), prompt, jitter=batch.jitter)
    # one pixel of every 2 x 2: sampled points that miss no defect of two pixels (departure 11)
    y, x = (2 * torch.arange(2 * n)[:, None] + torch.randint(2, (2 * n, 2 * m), generator=generator)
            for n, m in ((h0, w0), (w0, h0)))
    points = (y * 4 * w0 + x.T).flatten().to(tokens[0].device)
    return objective(model.decoder, decoded, prompt.marked, batch.truths, points, totals)


def fit(model: ICAS, batches: Callable[[int], Batch | Sequence[Batch]], *, steps: int,
        lr: float = 1e-4, weight_decay: float = 0.05, warmup: int = 100, clip: float = 1.0,
        seed: int = 0, start: int = 0, optimizer: torch.optim.Optimizer | None = None,
        callback: Callable[[int, dict, torch.optim.Optimizer], Any] | None = None) -> ICAS:
    """Train the decoder in place; both stages are this loop on other pairs (Sec. 3.3).

    batches(i) gives the pairs of step i, a function of i alone, so that a run resumed at `start`
    sees what it would have; of several batches, or of several ranks' under torch.distributed, the
    losses are divided by what all hold. lr is AdamW's: up linearly, then down to 0 at `steps`.
    callback(i, {"loss": its sum, part: each}, optimizer) ends the training by a true result.
    Returns the model in eval mode. ValueError: a loss or gradient is not finite.
    """
    optimizer = optimizer or make_optimizer(model.decoder, lr, weight_decay)
    parameters, dist = list(model.decoder.parameters()), torch.distributed
    add_ranks = dist.all_reduce if dist.is_initialized() else lambda tensor: None   # in place
    model.decoder.train()
    for step in range(start, steps):
        up, down = (step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(up, down)
        given, sums = batches(step), {}
        given = [given] if isinstance(given, Batch) else list(given)
        totals = sum(loss_totals(batch, model.config) for batch in given).to(model.device)
        add_ranks(totals)
        optimizer.zero_grad(set_to_none=True)
        for batch in given:
            random = torch.Generator().manual_seed(seed * 1_000_003 + step)
            parts = pair_loss(model, batch, random, totals)
            sum(parts.values()).backward()
            sums = {k: sums.get(k, 0) + v.detach() for k, v in parts.items()}
        values = torch.stack(list(sums.values()))
        # what a step leaves out, it leaves out on every rank
        for tensor in (values, *(p.grad for p in parameters if p.grad is not None)):
            add_ranks(tensor)
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        if not torch.isfinite(values.sum() + norm):
            raise ValueError(f"fit: the loss of step {step} is {values.sum().item()}, the norm of "
                             f"its gradient {norm.item()}; lower lr={lr} or check the masks")
        optimizer.step()
        losses = {"loss": values.sum().item()} | dict(zip(sums, values.tolist()))
        if callback and callback(step, losses, optimizer):
            break
    return model.eval()


def make_optimizer(decoder: Decoder, lr: float, decay: float) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices and kernels only."""
    free, sides = {"learned", "type_embed", "content_embed"}, ([], [])
    for name, p in decoder.named_parameters():
        sides[p.ndim > 1 and name not in free].append(p)
    return torch.optim.AdamW([{"params": sides[i], "weight_decay": i * decay} for i in (1, 0)], lr)


# ---- 3.4 Inference: scores -----------------------------------------------------------------------

def claimed(values: Tensor, weights: Tensor, masks: Tensor, plain_sum: bool = False) -> Tensor:
    """sum_i values_i M_i / sum_i weights_i M_i, 0 where the masks claim nothing (departure 12):
    values, weights (B, K), masks (B, K, H, W) in [0, 1]. plain_sum: the first sum, as printed."""
    top, whole = (torch.einsum("bk,bkhw->bhw", x, masks) for x in (values, weights))
    return top if plain_sum else torch.where(whole > 1e-6, top / whole.clamp_min(1e-6), 0.0)


def mask_scores(decoder: Decoder, decoded: Decoded, tokens: Tensor, prompt: Prompt,
                reference_masks: Tensor | None = None) -> dict[str, Tensor]:
    """The paper's scores of B targets by name, (B, 4 H0, 4 W0) float32, higher is more anomalous.
    tokens (B, T, D) are the target's of the last tapped block; reference_masks (1, J, D) unit
    vectors Q_r: without them the pooled Q_ntp^0 stands in."""
    last, plain = decoder.config.last, decoder.config.plain_sum
    probs = decoder.class_logits(decoded.content[-1], decoded.classes[-1]).softmax(dim=-1)
    # s, n: a mask counts by how little it is background (departure 13)
    (p_prompt, p_fg), (s, n) = probs[..., 0], 1 - probs[..., 2]
    masks, pooled = mask_features(decoder, decoded, tokens)
    shares = torch.stack([prompt.foreground[last], prompt.background[last]], dim=1)
    sides = F.normalize(mask_pool(prompt.tokens[last], shares), dim=-1)   # Q_p^0, Q_ntp^0
    # softmax(Q_p^0 . Q_m | Q_p^0, Q_ntp^0), and min_j 1 - <Q_m^i, Q_r^j>
    likeness = (pooled @ sides.mT / decoder.config.temperature).softmax(dim=-1)[..., 0]
    normal = sides[:, 1:] if reference_masks is None else reference_masks
    distance = 1 - (pooled @ normal.mT).amax(dim=-1)
    likeness, distance = (likeness, distance) if plain else (likeness * s, distance * n)
    pairs = {"S_s": (p_prompt, s),      # in [0, 1]: the prompt's share of what the masks claim
             "S_s mfm": (likeness, s),  # in [0, 1]: mask-level matching with the prompt's two sides
             "S_n": (p_fg, n),          # in [0, 1]: as S_s with Q_fg, for good parts
             "S_n mfm": (distance, n)}  # in [0, 2]: cosine distance of a mask to the nearest of Q_r
    return {name: claimed(*pair, masks, plain) for name, pair in pairs.items()}


def mask_features(decoder: Decoder, decoded: Decoded, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """script M_t (B, K, 4 H0, 4 W0) in [0, 1] and, of tokens (B, T, D) under them, unit Q_m."""
    masks = decoder.mask_logits(decoded.content[-1], decoded.pixels).sigmoid()
    return masks, F.normalize(mask_pool(tokens, F.avg_pool2d(masks, 4).flatten(2)), dim=-1)


def top_mean(token_map: Tensor) -> Tensor:
    """Image score: mean of the three highest of a map of any shape, so that one small defect
    counts and one odd token less."""
    return token_map.flatten().topk(min(3, token_map.numel())).values.mean()


# ---- 3.4 Inference: pictures and references in ---------------------------------------------------

def check(good: Any, message: str, error: type[Exception] = ValueError) -> None:
    if not good:
        raise error(message)


def brief(value: Any) -> str:
    if isinstance(value, (np.ndarray, Tensor)):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    return type(value).__name__ + (f" of length {len(value)}" if hasattr(value, "__len__") else "")


def to_rgb(image: Any, name: str = "image", value_range: Sequence[float] | None = None) -> Tensor:
    """Any picture as an (H, W, 3) uint8 RGB tensor on the CPU, upright.

    image        path, PIL image, (H, W), (H, W, 3) or (H, W, 4) array, or (3, H, W) tensor; uint8,
                 or float tensors in [0, 1]. Grey is repeated, alpha laid over white.
    value_range  (low, high) that become 0 and 255, alpha apart: for 16-bit and other wide images.
    Raises FileNotFoundError, TypeError or ValueError, with `name` in the message.
    """
    return read_rgb(image, name, value_range)[0]


def read_rgb(image: Any, name: str = "image", value_range: Sequence[float] | None = None,
             most: int | None = None) -> tuple[Tensor, tuple[int, int]]:
    """`to_rgb`, reduced where it has more than `most` pixels; and the picture's own (h, w)."""
    x, name, shape = to_array(image, name, rgb=True, most=most)
    check(x.ndim == 3 and x.shape[-1] in (1, 3, 4) and x.numel(), f"{name}: expected (H, W), (H, W,"
          f" 3) or (H, W, 4) with at least one pixel, or a (3, H, W) tensor; got {brief(image)}")
    if value_range is not None:
        check(not x.isnan().any(), f"{name}: expected finite values, got NaN; replace them first")
        check_range(value_range)
    x, alpha = x.tensor_split([3], dim=-1)
    if value_range is not None and x.dtype != torch.uint8:
        low, high = value_range
        x = ((x.double() - low) / (high - low)).clamp(0, 1)
    elif x.dtype != torch.uint8:
        unit, low, high = isinstance(image, Tensor) and x.is_floating_point(), x.min(), x.max()
        what = "a float tensor in [0, 1], got" if unit else f"8-bit values (uint8), got {x.dtype},"
        likely = next((n for n in (1, 255, 1023, 4095, 16383, 65535) if high <= n), f"{high:.5g}")
        check(unit and low >= 0 and high <= 1, f"{name}: expected {what} [{low:.5g}, {high:.5g}] "
              f"(or NaN); its range is likely 0 to {likely}: say so with value_range=(0, {likely}) "
              f"of encode_image, or --range 0 {likely} on the command line; or pass uint8")
    x = (x * 255).round().to(torch.uint8) if x.is_floating_point() else x
    if alpha.numel():   # of arrays of floats it is in [0, 1], of whole numbers up to their largest
        kind = np.dtype(getattr(image, "dtype", np.uint8))
        share = (alpha / (np.iinfo(kind).max if kind.kind in "ui" else 1)).clamp(0, 1)
        x = (x.float() * share + 255 * (1 - share)).round().to(torch.uint8)
    shape, count = shape or tuple(x.shape[:2]), x.shape[0] * x.shape[1]
    if most and count > most:
        x = shrink(x, math.ceil(math.sqrt(count / most))).round().to(torch.uint8)
    return x.expand(-1, -1, 3).contiguous(), shape


def check_range(value_range: Any) -> None:
    check(isinstance(value_range, (tuple, list)) and len(value_range) == 2 and all(
        isinstance(v, numbers.Real) and math.isfinite(v) for v in value_range)
        and value_range[0] < value_range[1],
        f"value_range: expected (low, high) with low < high, got {value_range!r}")


def shrink(x: Tensor, block: int) -> Tensor:
    """(H, W, C) -> (H / block, W / block, C) float32 means of square blocks, those at the edge of
    what is there; in strips, for as floats 48 million pixels take 0.6 GB."""
    strips = [F.avg_pool2d(rearrange(strip, "h w c -> c h w").float(), block, ceil_mode=True)
              for strip in x.split(64 * block)]
    return rearrange(torch.cat(strips, dim=1), "c h w -> h w c")


def to_array(image: Any, name: str, rgb: bool,
             most: int | None = None) -> tuple[Tensor, str, tuple[int, int] | None]:
    """Path, PIL image, array or (C, H, W) tensor as (H, W, C) on the CPU; its name in errors; of
    a file or PIL image its own (h, w), for it may be read at a reduced size."""
    shape = None
    if (path := isinstance(image, (str, os.PathLike))) or hasattr(image, "getbands"):   # PIL's
        picture, shape = open_image(image, name, most)
        name = f"{name} {os.fspath(image)!r}" if path else name
        plain = ("L", "RGB", "RGBA", "I", "F", "I;16") + (() if rgb else ("1", "P"))
        clear = rgb and ("transparency" in picture.info or picture.mode[-1] in "PAa")
        if clear or picture.mode[:4] not in plain:
            picture = picture.convert("RGBA" if clear else "RGB")
        image = np.array(picture)
    if isinstance(image, Tensor):
        check(image.ndim in (2, 3) and (not rgb or image.shape[:-2] == (3,)), f"{name}: expected a "
              f"(3, H, W) tensor, got shape {tuple(image.shape)}; a NumPy array may be (H, W, 3)")
        x = image.detach().cpu()
        return (x.permute(1, 2, 0) if x.ndim == 3 else x[..., None]), name, shape
    check(isinstance(image, np.ndarray), f"{name}: expected a path, PIL image, NumPy array or "
          f"tensor, got {brief(image)}", TypeError)
    kind, size = image.dtype.kind, image.dtype.itemsize
    check(kind in "buif" and size <= 8, f"{name}: expected numbers of at most 64 bits, got an "
          f"array of dtype {image.dtype}; pass uint8", TypeError)
    # torch knows few operations on wide unsigned numbers
    image = image.astype(np.int64 if kind == "u" and size > 1 else image.dtype.newbyteorder("="))
    x = torch.from_numpy(np.ascontiguousarray(image))
    return (x[..., None] if x.ndim == 2 else x), name, shape


def open_image(image: Any, name: str, most: int | None = None):
    """The PIL image given or in a file, turned upright (EXIF), and its (h, w). It is read whole, or
    where it has more than `most` pixels at a reduced size, if the format can (JPEG)."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("reading image files needs Pillow: pip install pillow") from error
    path = isinstance(image, (str, os.PathLike))
    what = repr(os.fspath(image)) if path else "the image"
    check(not path or Path(image).is_file(), f"{name}: no file at {what}", FileNotFoundError)
    try:
        with Image.open(image) if path else contextlib.nullcontext(image) as picture:
            w, h = picture.size
            if path and most and w * h > most:
                picture.draft(None, [int(n * math.sqrt(most / (w * h))) for n in (w, h)])
            check(not cut_to_8(picture), "colours of 16 bits a channel; save it with 8")
            picture.load()
            turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)   # by a quarter
            return ImageOps.exif_transpose(picture), ((w, h) if turned else (h, w))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: {what} is not a readable image ({error}); resave it") from error


def cut_to_8(picture) -> bool:
    """Whether Pillow reads an opened file by the high byte of its 16-bit colours alone."""
    stored = str(getattr(picture, "tile", ""))   # how each piece of the file is decoded
    return picture.mode[0] != "I" and any(f";16{order}" in stored for order in "BLN")


def to_mask(mask: Any, shape: tuple[int, int], name: str = "mask") -> Tensor:
    """A mask as an (H, W) bool tensor: anything not 0 is marked; alpha says nothing. Takes what
    `to_rgb` takes. ValueError if it has not the image's (height, width), marks no pixel or is a
    picture itself; a warning if it marks more than half."""
    x, name, _ = to_array(mask, name, rgb=False)
    x = x[..., :-1] if x.shape[-1] in (2, 4) and not isinstance(mask, Tensor) else x
    marked = x.ne(0).any(dim=-1)
    check(marked.shape == tuple(shape), f"{name}: expected the image's size {tuple(shape)} (height,"
          f" width), got {tuple(marked.shape)}; resize it with nearest-neighbour interpolation")
    check(marked.any(), f"{name}: nothing is marked in it (all 0); mark a pixel, or pass it in "
          "normals=")
    # a mask is of few values or even areas, in a picture each pixel differs from the next
    changes = x[:, 1:].ne(x[:, :-1]).any(dim=-1).float().mean()
    check(changes < 0.15 or len(x[..., 0].unique()) < 32, f"{name}: is a picture, not a mask; save "
          "what is marked alone, white on black, or give a box (x0, y0, x1, y1) in its place")
    share = float(marked.float().mean())
    if share > 0.5:
        warnings.warn(f"{name}: {share:.0%} marked; if the defect is the rest, invert it")
    return marked


def read_marks(path: Any, image: Any, shape: tuple[int, int], name: str) -> dict[str, np.ndarray]:
    """Label -> (h, w) bool mask of what a JSON file outlines in an image: polygons and rectangles
    of LabelMe, or COCO's annotations of the image's file name. ValueError if there are none."""
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise ImportError("outlines in JSON need pycocotools: pip install pycocotools") from error
    name, (h, w), found = f"{name} {os.fspath(path)!r}", shape, {}
    check(Path(path).is_file(), f"{name}: no such file", FileNotFoundError)
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if "shapes" in data:
            size, rows = (data["imageHeight"], data["imageWidth"]), []
            for drawn in data["shapes"]:
                points, kind = np.array(drawn["points"], dtype=float), drawn["shape_type"]
                check(kind in ("polygon", "rectangle"), f"shape_type {kind!r} has no area")
                low, size_xy = points.min(axis=0), np.ptp(points, axis=0)
                box = np.concatenate([low, size_xy])[None]   # for pycocotools a box is an array
                outlines = box if kind == "rectangle" else [points.ravel().tolist()]
                rows.append((drawn["label"], outlines))
        else:
            own = Path(os.path.abspath(image)).parts
            names = {c["id"]: c["name"] for c in data["categories"]}
            entry, = [x for x in data["images"] if own[-len(p := Path(x["file_name"]).parts):] == p]
            size = entry["height"], entry["width"]
            rows = [(names[x["category_id"]], x["segmentation"] if any(x.get("segmentation") or [])
                     else np.array([x["bbox"]], dtype=float))   # some have none, or an empty one
                    for x in data["annotations"] if x["image_id"] == entry["id"]]
        check(size == shape, f"made for a picture of {size} (height, width), this has {shape}")
        for label, outlines in rows:   # run lengths are a dict, compressed ones of text
            done = isinstance(outlines, dict) and not isinstance(outlines["counts"], list)
            codes = outlines if done else coco.frPyObjects(outlines, h, w)
            mask = coco.decode(coco.merge(codes) if isinstance(codes, list) else codes) > 0
            check(mask.shape == shape, f"{label!r} is outlined at another size, {mask.shape}")
            found[label or "defect"] = found.get(label or "defect", False) | mask
    except Exception as error:   # pycocotools raises a plain one
        raise ValueError(f"{name}: holds no outlines of this image as LabelMe or COCO save them "
                         f"({type(error).__name__}: {error})") from error
    check(found, f"{name}: nothing is outlined in it")
    for label, mask in found.items():
        check(mask.any(), f"{name}: nothing is marked in it as {label!r}")
    return found


def token_grid(h: int, w: int, config: Config) -> tuple[int, int]:
    """Tokens of an image: its aspect ratio, and about (image_size / 14)^2 in all (departure 15)."""
    side, aspect = config.image_size / config.patch_size, math.sqrt(h / w)
    return max(1, round(side * aspect)), max(1, round(side / aspect))


class EncodedImage(NamedTuple):
    """One picture, encoded by `encode_image`; `segment` and `detect` take it as an image."""
    features: Features
    shape: tuple[int, int]   # (h, w) of the picture
    kind: str                # `ICAS.kind` of the model that made it


@torch.inference_mode()
def encode_image(image: Any, name: str = "image", *, value_range: Sequence[float] | None = None,
                 model: ICAS | None = None) -> EncodedImage:
    """Encode a picture once, for any number of calls with it; one encoded before is given back.
    Arguments, errors: as in `to_rgb`; ValueError if another model encoded it.

        part = encode_image("part.png")
        segment(part, points=[(120, 80)]), segment(part, points=[(120, 80), (40, 30)])
    """
    model = check_model(model)
    if isinstance(image, EncodedImage):
        check_kind(name, image.kind, model.kind)
        return image
    return encode_pixels(*read_rgb(image, name, value_range, PIXELS), model)


def encode_pixels(pixels: Tensor, shape: tuple[int, int], model: ICAS) -> EncodedImage:
    """Encode (H, W, 3) uint8 pixels of a picture of (h, w), reduced or not."""
    x = rearrange(pixels.to(model.device), "h w c -> 1 c h w").float() / 255
    size = [n * model.config.patch_size for n in token_grid(*shape, model.config)]
    seen, large = (F.interpolate(x, size=side, mode="bicubic", antialias=True).clamp(0, 1)
                   for side in (size, [n // 8 * 16 for n in size]))
    features = model.describe(seen, (255 * large).round().byte())
    return EncodedImage(features, shape, model.kind)


def check_model(model: ICAS | None) -> ICAS:
    check(isinstance(model, ICAS | None), "model: expected what icas.load returns, got "
          f"{brief(model)}", TypeError)
    return model or shipped()


def check_kind(name: str, found: str, wanted: str) -> None:
    check(found == wanted, f"{name}: made with {found}, expected {wanted}; encode again with it")


class Shot(NamedTuple):
    """One view of a reference image, encoded."""
    features: Features       # of one image, in float16
    sides: list[Tensor]      # (2, h, w) at the maps' grid and at four times the detail's: shares of
    #                          the marked anomaly, of what is surely not it
    label: str               # "" of a good part
    image: str               # which image: a hash of its pixels
    turn: int                # 0 as it lies, 1 to 11 a copy: see `turned`, and `encode`


@dataclass
class References:
    """Prompts, encoded once: `encode` makes them, `a + b` joins, `save` and `load` keep them.
    `labels` are the marked defects' names, sorted; the length is the number of images, of which
    one with two labels counts twice."""
    shots: list[Shot] = field(default_factory=list)
    kind: str = ""           # `ICAS.kind` of the model that made them

    @property
    def labels(self) -> list[str]:
        return sorted({s.label for s in self.shots} - {""})

    @property
    def normals(self) -> list[Shot]:
        return [s for s in self.shots if not s.label]

    def __len__(self) -> int:
        return len({(s.image, s.label) for s in self.shots})

    def __add__(self, other: "References") -> "References":
        if not isinstance(other, References):
            return NotImplemented
        if self.shots and other.shots:
            check_kind("references", self.kind, other.kind)
        return References(self.shots + other.shots, self.kind if self.shots else other.kind)

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {f"{i}.{name}": x.contiguous() for i, shot in enumerate(self.shots)
                   for name, x in (*shot.features.tensors().items(), *zip(SIDES, shot.sides))}
        write_file(path, tensors, {"format": "icas-references-4", "kind": self.kind,
                                   "shots": json.dumps([shot[2:] for shot in self.shots])})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "References":
        tensors, meta = read_file(path, "references", "icas-references-4")
        try:
            return cls([Shot(Features(tensors[f"{i}.maps"], tensors.get(f"{i}.detail"),
                                      tensors[f"{i}.picture"]),
                             [tensors[f"{i}.{name}"] for name in SIDES], *words)
                        for i, words in enumerate(json.loads(meta["shots"]))], meta["kind"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"references: {os.fspath(path)!r} is incomplete ({error!r}); encode "
                             "and save again") from error


@torch.inference_mode()
def encode(anomalies: Sequence = (), normals: Sequence = (), *, turns: bool | None = None,
           value_range: Sequence[float] | None = None, model: ICAS | None = None) -> References:
    """Encode prompts once, to reuse with `segment` and `detect` (mask pooling, Sec. 3.1).

    anomalies  (image, mask) or (image, mask, label) each. The mask as in `to_mask`; or a box (x0,
               y0, x1, y1) in pixels; or a path to a .json of LabelMe or COCO, whose labels count
               if none is given. Else the label is "defect".
    normals    images of good parts; of more than 200 every second, third, ... is taken, for each
               keeps 4 MB.
    turns      None: marked anomalies are encoded in eight turns of 45 degrees and, mirrored and a
               fourth larger, in four of 90; good parts in the four flips and turns that keep their
               shape, if at most 40. True: these in eight. False: all as they lie.
    value_range   as in `to_rgb`, of every image.
    Raises ValueError, TypeError or FileNotFoundError, with the argument's place in the message.

        encode(anomalies=[("scratched.png", "mask.png", "scratch")]).save("scratch.safetensors")
    """
    model, entries, shots = check_model(model), [], []
    check(isinstance(turns, bool | None), f"turns: expected True, False or None, got {turns!r}",
          TypeError)
    for name, given in (("anomalies", anomalies), ("normals", normals)):
        check(isinstance(given, (list, tuple)), f"{name}: expected a list, got {brief(given)}; put "
              "a single one in brackets", TypeError)
    for i, entry in enumerate(anomalies):
        check(isinstance(entry, (tuple, list)) and len(entry) in (2, 3), f"anomalies[{i}]: expected"
              f" (image, mask) or (image, mask, label), got {brief(entry)}", TypeError)
        entries.append((f"anomalies[{i}]", *entry, None)[:4])
        check(len(entry) == 2 or isinstance(entry[2], str) and entry[2], f"anomalies[{i}]: expected"
              f" a non-empty string as label, got {entry[-1]!r}", TypeError)
    numbered = [(f"normals[{i}]", image, None, "") for i, image in enumerate(normals)]
    entries += evenly(numbered, MANY)
    bad = (0,) if turns is False else range(12)
    good = range(8) if turns else (0,) if turns is False or len(normals) > 40 else (0, 2, 4, 6)
    for name, given, mask, label in entries:
        what = name if label == "" else f"{name} image"
        image, shape = read_rgb(given, what, value_range, PIXELS)
        digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16]
        marks = {"": None} if label == "" else read_mask(mask, given, shape, f"{name} mask", label)
        for label, mask in marks.items():
            marked = torch.zeros(image.shape[:2]) if mask is None else mask.float()
            if marked.shape != image.shape[:2]:   # the image was reduced
                marked = F.adaptive_avg_pool2d(marked[None], image.shape[:2])[0]
            near = around(marked) if label else ...   # so that a defect is also seen larger
            for turn in bad if label else good:
                pixels, side = (turned(x[near] if 3 < turn < 8 else x, turn)
                                for x in (image, marked))
                seen = encode_pixels(pixels, pixels.shape[:2], model)
                sides = torch.stack([side, 1 - side])
                shots.append(make_shot(seen.features, sides, label, digest, turn))
    return References(shots, model.kind)


def evenly(items: Any, most: int) -> Any:
    """Every item of a list or tensor, or every second, third, ..., so that there are `most`."""
    return items[::max(1, math.ceil(len(items) / most))]


def turned(x: Tensor, turn: int) -> Tensor:
    """(H, W, ...) turned by `turn` quarters; of 4 to 7 mirrored, of 8 to 11 by 45 degrees more."""
    if turn > 7:
        return rotate(x, 90 * turn + 45)
    # resized slowly if not contiguous
    return torch.rot90(x.flip(1) if turn > 3 else x, turn % 4).contiguous()


def around(marked: Tensor) -> tuple[slice, ...]:
    """The piece of four fifths of each side that shows the marks of (H, W) nearest its middle."""
    slices = []
    for centre, n in zip(marked.nonzero().float().mean(dim=0).tolist(), marked.shape):
        size = math.ceil(0.8 * n)
        begin = min(max(0, round(centre + 0.5 - size / 2)), n - size)
        slices.append(slice(begin, begin + size))
    return tuple(slices)


def rotate(x: Tensor, angle: float) -> Tensor:
    """(H, W, ...) turned by degrees within its frame, beyond which it is mirrored."""
    return torch.from_numpy(scipy.ndimage.rotate(x.numpy(), angle, reshape=False, order=1,
                                                 mode="reflect"))


def read_mask(mask: Any, image: Any, shape: tuple[int, int], name: str,
              label: str | None) -> dict[str, Tensor]:
    """Label -> (h, w) bool mask: of an image's mask, box or JSON file, as `encode` takes them."""
    if isinstance(mask, (str, os.PathLike)) and Path(mask).suffix.lower() == ".json":
        found = {k: torch.from_numpy(m) for k, m in read_marks(mask, image, shape, name).items()}
        return found if label is None else {label: torch.stack([*found.values()]).any(dim=0)}
    if isinstance(mask, (tuple, list)):
        check(np.shape(mask) == (4,), f"{name}: expected a mask, a path or a box (x0, y0, x1, y1), "
              f"got {brief(mask)}", TypeError)
        (x0, y0, x1, y1), = check_places([mask], name, 4, *shape)
        mask = np.zeros(shape, bool)
        mask[int(y0):math.ceil(y1), int(x0):math.ceil(x1)] = True
    return {label or "defect": to_mask(mask, shape, name)}


def make_shot(features: Features, sides: Tensor, label: str, name: str = "", turn: int = 0) -> Shot:
    """A shot of one encoded image and the (2, H, W) masks of its two sides."""
    h, w = (features.maps if features.detail is None else features.detail).shape[-2:]
    grids = features.maps.shape[-2:], (4 * h, 4 * w)
    half, sides = features.to(features.maps.device, torch.half), sides.to(features.maps.device)
    return Shot(half, [token_share(sides, *grid) for grid in grids], label, name, turn)


def kept_tokens(foreground: Tensor, turn: int) -> Tensor:
    """(T,) bool of tokens (H0, W0) or (T,): all of an image as it lies; of a turned copy the marked
    and some 200 others; of a good part's copy, which widens what is good, every fourth."""
    place = torch.arange(foreground.numel(), device=foreground.device)
    step = max(4, math.ceil(len(place) / 200)) if foreground.any() else 4
    return (foreground.flatten() > 0) | (place % step == turn % step) if turn else place >= 0


def thin(tokens: Tensor, sides: Tensor, turn: int, most: int) -> tuple[Tensor, Tensor]:
    """Of a view's tokens (1, T, D) and sides (2, T) `kept_tokens`, of which `most` unmarked ones:
    by greedy query selection, for what is rare shall be covered, not counted."""
    keep, marked = kept_tokens(sides[0], turn), sides[0] > 0
    rest = (keep & ~marked).nonzero()[:, 0]
    if len(rest) > most:
        rest = evenly(rest, 4096)   # bounds the selection's memory
    if len(rest) > most:
        rest = rest[greedy_queries(tokens[:, rest], most)[0]]
    keep = marked.index_fill(0, rest, True)
    return tokens[:, keep], sides[:, keep]


def pool_shots(model: ICAS, shots: Sequence[Shot]) -> Prompt:
    """All shots as one prompt, B = 1: tokens together, whatever their order (departure 7)."""
    views, usual, edges, blocks = [], [], [], len(model.config.blocks)
    weight = detail_weight([shot.sides[0][0] for shot in shots if shot.label and not shot.turn])
    # the background of clicks, which have no image's hash and say nothing of size, is a guess
    clicks = any(shot.label and not shot.image for shot in shots)
    # twice the side below seven tokens or 53 % of each, four times below three or 35 %
    scales = (1,) if weight < 0.1 else (2,) if weight < 0.75 or clicks else (4, 2)
    scales = scales if model.config.detail else ()
    most = max(16, CAP // len(shots))
    limits = [most] * blocks + [min(most, 1 << 14) // n ** 2 for n in scales] + [most]
    for shot in shots:
        features = shot.features.to(model.device, torch.float32)
        coarse, fine = (side.to(model.device) for side in shot.sides)
        sides = [coarse] * blocks + [F.avg_pool2d(fine, 4 // n) for n in scales]
        tokens = model.levels(features, scales)
        if shot.label and not shot.turn:
            mark = token_share(fine, *(4 * n for n in coarse.shape[1:]))[0]
            edges.append(edge_share(mark, features.picture))
            if shot.image:
                usual.append([usual_distance(t, s[None]) for t, s in zip(tokens, sides)])
        tokens += model.neck(features.maps)   # a level more, for Q_p^0 and Q_ntp^0
        views.append([thin(t, s.flatten(1), shot.turn, n)
                      for t, s, n in zip(tokens, [*sides, coarse], limits)])
    joined = [[torch.cat(x, dim=1) for x in zip(*level)] for level in zip(*views)]
    levels = [(tokens, *sides[:, None]) for tokens, sides in joined]
    levels, neck = levels[:len(limits) - 1], levels[len(limits) - 1:]
    directions = [fisher_direction(*level) for level in levels]
    unknown = [torch.full((1,), math.inf, device=model.device)] * len(levels)
    usual = [torch.stack(u).nan_to_num(posinf=math.nan).nanmean(dim=0).nan_to_num(math.inf)
             for u in zip(*(usual or [unknown]))]   # of the images where it is known
    good = len({shot.image for shot in shots if not shot.label})
    decoder = 1.0 if clicks else 0.2   # matching trusts a guess blindly
    return Prompt(*map(list, zip(*levels)), directions, usual, neck[0] if neck else (), weight,
                  float(np.mean(edges or [0])), scales, good, decoder)


def detail_weight(marks: Sequence[Tensor]) -> float:
    """The detail's weight beside the blocks, of each image's mark as shares (H0, W0) of tokens: 1/2
    where it covers four on average, or fills 40 % of those it touches; next to nothing where it
    exceeds both. A token blurs small and thin defects, the small CNN takes texture for large."""
    if not marks:
        return 0.0
    area = np.mean([float(x.sum()) for x in marks])
    fill = np.mean([float(x.square().sum() / x.sum().clamp_min(1e-9)) for x in marks])
    return 1 / (1 + min(area / 4, (fill / 0.4) ** 2) ** 4)


@dataclass(eq=False, repr=False)
class Prepared:
    """References ready for many calls: `prepare` makes it. What is not asked for is not made."""
    model: ICAS
    references: References
    mutual: bool = False   # the good parts are any pictures, see `mutual`
    made: dict[str, Prompt] = field(default_factory=dict)

    def join(self, more: References) -> "Prepared":   # for one call: what it makes is not kept
        return replace(self, references=self.references + more, made={}) if more.shots else self

    def prompt(self, label: str) -> Prompt:
        """Of a label's marked shots with all good parts; "" is of good parts alone."""
        if label not in self.made:
            marked = [shot for shot in self.references.shots if shot.label == label != ""]
            self.made[label] = pool_shots(self.model, marked + self.normals)
        return self.made[label]

    @functools.cached_property
    def normals(self) -> list[Shot]:
        """Of good parts; a picture that is marked too is none, whoever says so."""
        marked = {shot.image for shot in self.references.shots if shot.label}
        return [shot for shot in self.references.normals if shot.image not in marked]

    @functools.cached_property
    def reference_masks(self) -> Tensor | None:
        """Q_r (1, J, D): features under the masks predicted in 100 good parts at most (Sec. 3.4);
        None without any."""
        model, pooled = self.model, []
        lying = [shot for shot in self.normals if not shot.turn]
        for shot in evenly(lying, 100):
            features = shot.features.to(model.device, torch.float32)
            levels = model.levels(features)
            decoded = model.decode(features, levels, self.prompt(""))
            pooled.append(mask_features(model.decoder, decoded, levels[model.config.last])[1])
        return torch.cat(pooled, dim=1) if pooled else None

    @functools.cached_property
    def images(self) -> list[str]:
        """The good parts' hashes, sorted: the order that they are given in decides nothing."""
        return sorted({shot.image for shot in self.normals})

    @functools.cached_property
    def good(self) -> GoodParts:
        check(self.normals, "normals: detect needs at least one good part, not marked too; "
              "pass normals=[image] (--normal IMAGE), or use segment for marked defects")
        return learn_good(self)


@torch.inference_mode()
def prepare(references: References | Prepared, *, model: ICAS | None = None) -> Prepared:
    """References made ready once, for many calls of `segment` or `detect`: segment(path, ready)."""
    if isinstance(references, Prepared):
        check(model in (None, references.model),
              "model: expected the one that the references were prepared for")
        return references
    model = check_model(model)
    check(isinstance(references, References), "references: expected what icas.encode returns, got "
          f"{brief(references)}; pass pictures in anomalies= and normals=", TypeError)
    check_kind("references", references.kind if references.shots else model.kind, model.kind)
    return Prepared(model, references)


@torch.inference_mode()
def mutual(images: Sequence, *, value_range: Sequence[float] | None = None,
           model: ICAS | None = None) -> Prepared:
    """For `detect` where no good part is known: 31 of the images at random, of which it compares
    each image with the others (mutual scoring, MuSc). Most of the images should be good.
    ValueError: fewer than six of them can be read."""
    model, shots, sides = check_model(model), [], torch.tensor([0.0, 1.0])[:, None, None]
    for i in np.random.default_rng(0).permutation(len(images)).tolist():
        with contextlib.suppress(ValueError, TypeError, FileNotFoundError):   # `detect` names it
            seen = encode_image(images[i], value_range=value_range, model=model)
            shots.append(make_shot(seen.features, sides, "", str(i)))
        if len(shots) == 31:
            break
    check(len(shots) >= 6, "normals: none given, and to compare images with each other takes at "
          f"least six that can be read, got {len(shots)}; pass normals=[image] (--normal IMAGE)")
    return Prepared(model, References(shots, model.kind), mutual=True)


def each_image(images: Any, model: ICAS, find: Callable[[EncodedImage], Any]) -> Any:
    """find(image), encoded, of one image; of a list of them a list."""
    if type(images) not in (list, tuple):
        return find(encode_image(images, "images", model=model))
    return [find(encode_image(x, f"images[{i}]", model=model)) for i, x in enumerate(images)]


# ---- 3.4 Inference: clicks and segment -----------------------------------------------------------

def disks(points: Sequence[tuple[float, float]], h: int, w: int, scale: float = 1.0) -> Tensor:
    """(H, W) float mask: disks around (x, y) of `scale` / 74 of the side, at least a pixel each."""
    radius = scale * math.sqrt(h * w) / 74
    y, x, mask = torch.arange(h)[:, None], torch.arange(w), torch.zeros(h, w)
    for px, py in points:
        mask[(x - px).square() + (y - py).square() <= radius * radius] = 1
        mask[int(py), int(px)] = 1
    return mask


def mark_sides(shape: tuple[int, int], points, point_labels, boxes, mask) -> Tensor:
    """(3, H, W), of a large picture reduced: what clicks, boxes or a mask on the target itself
    mark; what is far from it, outside three radii of the clicks and the boxes enlarged by 10 %; the
    negative clicks."""
    h, w = shape
    points, boxes = check_places(points, "points", 2, h, w), check_places(boxes, "boxes", 4, h, w)
    labels = np.array([1] * len(points) if point_labels is None else point_labels, dtype=object)
    check(labels.shape == (len(points),) and all(x in (0, 1) for x in labels),
          f"point_labels: expected one 1 (defect) or 0 (not) for each of "
          f"{len(points)} points, got {point_labels!r}")
    block = math.ceil(math.sqrt(h * w / PIXELS))
    points, boxes, h, w = points / block, boxes / block, math.ceil(h / block), math.ceil(w / block)
    positive, negative = points[labels == 1].tolist(), points[labels == 0].tolist()
    foreground, other, outside = disks(positive, h, w), disks(negative, h, w), torch.ones(h, w)
    for x0, y0, x1, y1 in boxes:
        foreground[int(y0):math.ceil(y1), int(x0):math.ceil(x1)] = 1
        x, y = 0.05 * (x1 - x0), 0.05 * (y1 - y0)
        outside[max(0, int(y0 - y)):math.ceil(y1 + y), max(0, int(x0 - x)):math.ceil(x1 + x)] = 0
    if mask is not None:
        marked = shrink(to_mask(mask, shape)[..., None], block)[..., 0] > 0
        foreground[marked], outside[marked] = 1, 0
    check(foreground.any(), "points: expected at least one positive point, a box or a mask; got "
          "only negative points")
    rest = 1 - foreground
    far = outside * (1 - disks(positive, h, w, scale=3)) * rest
    return torch.stack([foreground, far if far.any() else rest, other * rest])


def check_places(value: Any, name: str, columns: int, h: int, w: int) -> np.ndarray:
    """(N, 2) points or (N, 4) boxes, by their columns, inside an (h, w) image; None is none."""
    what, limits = {
        2: ("(x, y)", f"x in [0, {w}) and y in [0, {h})"),
        4: ("(x0, y0, x1, y1)", f"0 <= x0 < x1 <= {w} and 0 <= y0 < y1 <= {h}")}[columns]
    try:
        rows = np.zeros((0, columns)) if value is None else np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected numbers, {what}, got {brief(value)}") from error
    check(rows.ndim == 2 and rows.shape[1] == columns and (value is None or len(rows)), f"{name}: "
          f"expected at least one row, {what} in pixels, got shape {rows.shape}")
    for row in rows.tolist():
        check(np.isfinite(row).all(), f"{name}: expected finite numbers, {what} in pixels, got NaN "
              f"or infinity in {row}")
        x0, y0, x1, y1 = (*row, w, h)[:4]
        check(0 <= x0 < x1 <= w and 0 <= y0 < y1 <= h,
              f"{name}: expected {limits} pixels, got ({', '.join(f'{x:g}' for x in row)})")
    return rows


def join_sure(sides: Tensor, odds: np.ndarray) -> Tensor:
    """(2, H, W) defect and background: `mark_sides`, with what a first look (H, W) is sure of."""
    odds = torch.from_numpy(odds)
    foreground = (sides[0] > 0) | (odds > SURE) & (sides[2] == 0)
    background = ~foreground & ((odds < -SURE) | (sides[2] > 0))
    if not background.any():   # it is sure of nothing
        background = ~foreground & (sides[1] > 0)
    return torch.stack([foreground, background]).float()


class Marked:
    """What both results can do with their `mask`, `labels` and `label_scores`."""

    def boxes(self) -> list[dict]:
        """Connected regions (8 neighbours), largest first: {"bbox": [x, y, w, h] pixels, "area":
        pixels, "score": its highest, "label"} each."""
        found = []
        for (rows, columns), inside in regions(self.mask):
            scores = self.label_scores[:, rows, columns]   # without a copy: regions can be large
            means = [x.mean(where=inside) for x in scores]
            found.append({"bbox": [columns.start, rows.start, *inside.shape[::-1]],
                          "area": int(inside.sum()), "label": self.labels[np.argmax(means)],
                          "score": float(max(x.max(where=inside, initial=0) for x in scores))})
        return found

    def rle(self) -> dict:
        """COCO run-length encoding of the mask, ready for JSON; needs pycocotools."""
        return run_lengths(self.mask)


@dataclass(frozen=True)
class Segmentation(Marked):
    """What `segment` finds in one image; `dataclasses.replace(it, threshold=t)` marks it anew."""
    maps: np.ndarray            # (n, H, W) float32 log-odds as they were computed, a map a label
    labels: list[str]           # the labels' names
    shape: tuple[int, int]      # (h, w) of the image
    threshold: float            # in units of score
    parts: dict[str, np.ndarray] = field(default_factory=dict)   # of the first label, if asked for

    @functools.cached_property
    def label_scores(self) -> np.ndarray:
        """(n, h, w) float32 in [0, 1], higher is more anomalous."""
        return torch.from_numpy(to_shape(self.maps, self.shape)).sigmoid_().numpy()

    @functools.cached_property
    def score(self) -> np.ndarray:
        """(h, w) float32 in [0, 1]: the largest of the labels' scores."""
        scores = self.label_scores
        return scores[0] if len(scores) == 1 else scores.max(axis=0)

    @functools.cached_property
    def mask(self) -> np.ndarray:
        """(h, w) bool: score > threshold."""
        return self.score > self.threshold

    @property
    def is_anomalous(self) -> bool:
        return bool(self.mask.any())


def to_shape(maps: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(n, h, w) float32 of (n, H, W), bilinear."""
    x = torch.from_numpy(maps)[None].float()
    return F.interpolate(x, size=shape, mode="bilinear")[0].numpy()


def regions(mask: np.ndarray) -> list[tuple[tuple[slice, slice], np.ndarray]]:
    """Connected regions of (h, w) bool: box as slices and the mask inside it, largest first."""
    numbered, _ = scipy.ndimage.label(mask, np.ones((3, 3)))
    boxes = enumerate(scipy.ndimage.find_objects(numbered), start=1)
    return sorted(((box, numbered[box] == i) for i, box in boxes), key=lambda r: -r[1].sum())


def run_lengths(mask: np.ndarray) -> dict:
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise ImportError("COCO output needs pycocotools: pip install pycocotools") from error
    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(n) for n in code["size"]], "counts": code["counts"].decode("ascii")}


def score_parts(model: ICAS, features: Features, prompt: Prompt,
                reference_masks: Tensor | None = None) -> dict[str, Tensor]:
    """(4 H0, 4 W0) float32 log-odds of one image by each part and, as "icas", by all together
    (departure 14), for which S_n and S_n mfm do not count."""
    config, parts, mixed = model.config, {}, []
    levels, grids = model.levels(features, prompt.scales), model.grids(features, prompt.scales)
    size, matches = [4 * n for n in features.maps.shape[-2:]], model.match(levels, prompt)
    names = [f"block {block}" for block in config.blocks] + ["detail"] * config.detail
    for name, m, grid in zip(names, matches, grids):
        pair = torch.stack([20 * (m.best_fg - m.best_bg), 4 * m.fisher], dim=1)          # 1 2 t
        nearest, fisher = F.interpolate(pair.unflatten(2, grid), size=size, mode="bilinear",
                                        antialias=True)[0]
        parts |= {f"{name} nearest": nearest, f"{name} Fisher": fisher}
        mixed.append((2 * nearest + fisher) / 3)
    odds = torch.stack(mixed[:len(config.blocks)]).mean(dim=0)
    decoded = model.decode(features, levels, prompt, matches)
    scores = mask_scores(model.decoder, decoded, levels[config.last], prompt, reference_masks)
    if config.plain_sum:   # sums without a bound
        side = "S_s" if prompt.marked.any() else "S_n"
        scores["icas"] = scores[side] + scores[f"{side} mfm"]
        return parts | {name: (2 * x[0].clamp_min(1e-4)).log() for name, x in scores.items()}
    parts |= {name: torch.logit(x[0], 0.007 if name.startswith("S_s") else 1e-4)
              for name, x in scores.items()}
    if config.detail:
        odds = odds + prompt.weight * (mixed[-1] - odds)
    odds = odds + prompt.decoder * (parts["S_s"] + parts["S_s mfm"])
    if config.detail and prompt.usual[-1].isfinite():
        # how much farther from the background than the marked image's own background is: more for
        # than against, and less where more than a tenth of the image is: another light
        far = beyond_usual(matches[-1].best_bg, prompt.usual[-1]).unflatten(1, grids[-1])
        parts["novelty"] = F.interpolate(far[None], size=size, mode="bilinear")[0, 0]
        rare = 0.1 / max(0.1, float((far > 0).float().mean()))
        trust = 4 * math.sqrt(prompt.weight) if prompt.good >= FEW else prompt.weight
        odds = odds + rare * (trust + torch.where(parts["novelty"] > 0, 3, 1.5)) * parts["novelty"]
    return parts | {"icas": odds}


@torch.inference_mode()
def segment(images: Any, references: References | Prepared | None = None, *,
            anomalies: Sequence = (), normals: Sequence = (), points=None, point_labels=None,
            boxes=None, mask=None, threshold: float | None = None, parts: bool = False,
            model: ICAS | None = None) -> Segmentation | list[Segmentation]:
    """Mark, in each image, what the references show (Sec. 3.4).

    images       one image or a list, as in `to_rgb` or from `encode_image`. One in gives one out.
    references   from `encode` or `prepare`; `anomalies`, `normals` as in `encode`, for this call.
                 Of good parts alone it marks what `detect` does, where that passes its threshold.
                 Four or more beside a marked anomaly keep regions unmarked that look like them.
    points, ...  marks on the image itself, of which there is one: points (x, y), with point_labels
                 1 (defect, the default) or 0; boxes (x0, y0, x1, y1), all in pixels; mask (h, w).
    threshold    in [0, 1]; 0.5 by default.
    parts        fill `Segmentation.parts` too: log-odds maps by each part, of the first label.
    Raises ValueError, TypeError or FileNotFoundError that names the argument.

        segment("part.png", anomalies=[("scratched.png", "mask.png")]).mask
        segment("part.png", points=[(120, 80)]).boxes()
    """
    cut = check_threshold(threshold)
    ready = prepare(References() if references is None else references, model=model)
    ready = ready.join(encode(anomalies, normals, model=ready.model))
    interactive = not (points is None and boxes is None and mask is None)
    check(point_labels is None or points is not None,
          "point_labels: given without points; pass points=[(x, y), ...] too")
    check(not interactive or type(images) not in (list, tuple), "points, boxes, mask: expected one "
          "image with them, got a list; call segment once an image")
    check(interactive or ready.references.shots, "references: none given; pass anomalies=[(image, "
          "mask)] (--anomaly IMAGE MASK), normals=[image] (--normal IMAGE), points= (--point X Y), "
          "boxes= (--box) or mask=")

    def join_marks(image: EncodedImage, sides: Tensor) -> Prepared:   # as of the label "defect"
        shot = make_shot(image.features, sides, "defect")
        return ready.join(References([shot], ready.model.kind))

    def first_look(image: EncodedImage, marks: Tensor) -> np.ndarray:
        """(H, W) log-odds of clicks. What is far from them may be the defect too, and what is no
        negative click may be good too: with both, the mean of what either background says."""
        (inside, far, other), odds = marks, []
        for background in [other, far.maximum(other)] if other.any() else [far]:
            prompt = join_marks(image, torch.stack([inside, background])).prompt("defect")
            prompt = prompt._replace(weight=0.5)   # clicks say nothing of size: half of the detail
            odds.append(score_parts(ready.model, image.features, prompt)["icas"])
        return to_shape(torch.stack(odds).mean(dim=0)[None].cpu().numpy(), inside.shape)[0]

    def find(image: EncodedImage) -> Segmentation:
        used = ready
        if interactive:
            if ready.model.config.detail:
                ready.model.look_closer(image.features)   # once, for all clicks
            marks = mark_sides(image.shape, points, point_labels, boxes, mask)
            sides = marks[:2] if points is None else join_sure(marks, first_look(image, marks))
            used = join_marks(image, sides)
        labels = used.references.labels or [""]
        found = [label_parts(used, image, label, parts) for label in labels]
        odds = [p["icas"] for p in found]
        plain = ready.model.config.plain_sum   # as printed, nothing of ours
        if labels[0] and not plain and len(ready.images) >= FEW:
            novelty = beyond_good(ready, image.features, 0.3) / MASK_FROM
            odds = [leave_good(x, novelty) for x in odds]
        if labels[0] and not plain:
            odds = [follow_edges(x, image.features.picture, used.prompt(label).edges)
                    for label, x in zip(labels, odds)]
        shown = {name: to_shape(x[None].cpu().numpy(), image.shape)[0]
                 for name, x in (found[0] | {"icas": odds[0]}).items() if parts}
        names = [label or "anomaly" for label in labels]
        return Segmentation(torch.stack(odds).cpu().numpy(), names, image.shape, cut, shown)
    return each_image(images, ready.model, find)


def label_parts(ready: Prepared, image: EncodedImage, label: str,
                every: bool = False) -> dict[str, Tensor]:
    """`score_parts` of one label; of good parts, the label "", what `detect` finds, as "icas" alone
    unless `every`; as printed (`plain_sum`) S_n + S_n^mfm."""
    plain = ready.model.config.plain_sum
    masks, parts = ready.reference_masks if every or plain and not label else None, {}
    if label or every or plain:
        parts = score_parts(ready.model, image.features, ready.prompt(label), masks)
    if not label and not plain:
        far = beyond_good(ready, image.features, RATE)
        parts["icas"] = leave_good(4 * (far / MASK_FROM - 1), far)
    return parts


def leave_good(odds: Tensor, novelty: Tensor) -> Tensor:
    """Log-odds (H, W) with each region above 0 that is nowhere novel, above 1, put below 0."""
    inside, _ = scipy.ndimage.label(odds.cpu().numpy() > 0, np.ones((3, 3)))
    highest = scipy.ndimage.maximum(novelty.cpu().numpy(), inside, np.arange(inside.max() + 1))
    highest[highest > 1], highest[0] = np.inf, np.inf   # region 0 is what lies outside all
    return odds.minimum(torch.from_numpy(4 * (highest - 1)).to(odds)[torch.from_numpy(inside)])


def guided(values: Tensor, picture: Tensor, scale: int) -> Tensor:
    """(scale H, scale W) of values (H, W), as the colours of the (1, 3, h, w) uint8 picture tell
    them: a fast guided filter (He and Sun, 2015), in each 11 x 11 window a linear function."""
    mean = nn.AvgPool2d(11, stride=1, padding=5, count_include_pad=False)
    fine = F.adaptive_avg_pool2d(picture[0] / 255, [scale * n for n in values.shape])
    both = torch.cat([F.avg_pool2d(fine, scale), values[None]])                     # 4 h w
    centre = mean(both)
    covariance = mean(both[:, None] * both) - centre[:, None] * centre              # 4 4 h w
    covariance = rearrange(covariance, "i j h w -> h w i j")
    own = covariance[..., :3, :3] + 2e-4 * torch.eye(3, device=values.device)   # its epsilon
    slope = torch.cholesky_solve(covariance[..., :3, 3:], torch.linalg.cholesky(own))
    slope = rearrange(slope, "h w i 1 -> i h w")
    offset = centre[3:] - (slope * centre[:3]).sum(dim=0, keepdim=True)
    lines = mean(torch.cat([slope, offset]))   # the mean of all windows that hold a cell
    lines = F.interpolate(lines[None], size=fine.shape[1:], mode="bilinear")[0]
    return (lines[:3] * fine).sum(dim=0) + lines[3]


def follow_edges(odds: Tensor, picture: Tensor, share: float) -> Tensor:
    """(2 H, 2 W) log-odds from (H, W): `share` of them, within [-4, 4], as the picture's colours
    tell them (`guided`). So marks end where the picture has an edge, and an odd cell is overruled
    by what looks like it."""
    told = guided(odds.clamp(-4, 4), picture, scale=2)
    plain = F.interpolate(odds[None, None], size=told.shape, mode="bilinear")[0, 0]
    return plain + share * (told - plain)


def edge_share(mark: Tensor, picture: Tensor) -> float:
    """The share that `follow_edges` deserves, by how much of a mark (H, W) in [0, 1], within five
    cells of it, the colours of its own picture tell: nothing up to an R^2 of 0.3, as of what is
    smaller than a window and has no colour of its own, 0.75 from 0.7 on, or of a whole picture."""
    near = F.max_pool2d(mark[None], 11, stride=1, padding=5)[0] > 0
    own, told = mark[near], guided(mark, picture, scale=1)[near]
    spread = (own - own.mean()).square().sum().clamp_min(1e-6)
    fit = 1 - float((own - told).square().sum() / spread)
    return float(np.interp(fit, (0.3, 0.7), (0.0, 0.75)))


def check_threshold(threshold: float | None) -> float:
    check(threshold is None or isinstance(threshold, numbers.Real) and 0 <= threshold <= 1,
          f"threshold: expected a number in [0, 1], got {threshold!r}")
    return 0.5 if threshold is None else float(threshold)


# ---- 3.4 Inference: detect -----------------------------------------------------------------------

@dataclass(frozen=True)
class Detection(Marked):
    """What `detect` says of one image; `dataclasses.replace(it, threshold=t)` judges it anew. The
    unit of scores, map and threshold is the median score of unseen good parts."""
    score: float            # mean of the three highest tokens, weighed over the levels
    maps: np.ndarray        # (1, H, W) float32 as computed: weighed mean of the levels
    shape: tuple[int, int]  # (h, w) of the image
    threshold: float        # from the good parts alone
    parts: dict[str, float] = field(default_factory=dict)   # the score by each level, if asked for
    labels = ("anomaly",)

    @property
    def is_anomalous(self) -> bool:
        return self.score > self.threshold

    @property
    def label_scores(self) -> np.ndarray:
        return self.map[None]

    @functools.cached_property
    def map(self) -> np.ndarray:
        """(h, w) float32, higher is more anomalous."""
        return to_shape(self.maps, self.shape)[0]

    @functools.cached_property
    def mask(self) -> np.ndarray:
        """(h, w) bool: map > 0.8 threshold (`MASK_FROM`); nothing in an image that is not
        anomalous."""
        return (self.map > MASK_FROM * self.threshold) & self.is_anomalous


class GoodParts(NamedTuple):
    """What good parts look like, level by level; of `mutual` pictures, most of which are good."""
    bank: list[Tensor]      # (1, R, D): their tokens, unit vectors
    owner: list[Tensor]     # (R,): which part a token is of
    typical: np.ndarray     # (levels,) median score of an unseen good part, in cosine distance
    weights: np.ndarray     # (levels,) of sum 1, see `learn_good`
    scores: np.ndarray      # (k,) of the good parts themselves, each against the others


def detect_levels(model: ICAS, features: Features) -> dict[str, tuple[Tensor, tuple[int, int]]]:
    """Name -> unit tokens (1, T, D), grid: tapped blocks, and the detail at strides 8 and 16, of
    the picture and, on the same grid, of that at twice the side."""
    found = {f"block {block}": (tokens, features.maps.shape[-2:])
             for block, tokens in zip(model.config.blocks, model.tokens(features.maps))}
    if model.config.detail:
        fine = F.avg_pool2d(model.look_closer(features)[:, 24:].float(), 2)
        for name, x in (("detail", features.detail[:, 24:]), ("fine detail", fine)):
            found[name] = unit_tokens(x), x.shape[-2:]
    return found


def novelty(ready: Prepared, tokens: Tensor, bank: Tensor, owner: Tensor, leave: int) -> Tensor:
    """(T,) 1 - best cosine of (1, T, D) unit tokens to (1, R, D), of all parts but one; of `mutual`
    pictures the mean over the nearest 30 % of them (MuSc), for some are bad."""
    with ready.model.autocast():
        if not ready.mutual:
            return 1 - best_cosine(tokens, bank, (owner != leave)[None])[0]
        best = torch.stack([best_cosine(tokens, bank, (owner == i)[None])[0]
                            for i in owner.unique().tolist() if i != leave])
    return 1 - best.topk(max(1, round(0.3 * len(best))), dim=0).values.mean(dim=0)


def learn_good(ready: Prepared) -> GoodParts:
    """What the good parts show. Of up to four, copies turned by 45 degrees count too if they
    bring a part that is left out 15 % nearer, where parts lie as they happen to. Of one they
    always do, and stand for a second part. A level weighs by how much farther a damaged part lies
    (the log), and the less the farther good ones do."""
    model, shots = ready.model, ready.normals
    one, few = len(ready.images) == 1, len(ready.images) <= 4

    @functools.lru_cache(64 if few else 0)   # of few, what both looks below compare is kept
    def tokens(features: Features) -> list[Tensor]:
        seen = features.to(model.device, torch.float32)
        return [t for t, _ in detect_levels(model, seen).values()]
    views = [(int(shot.turn > 0) if one else ready.images.index(shot.image), shot.turn,
              shot.features) for shot in sorted(shots, key=lambda shot: shot.image)]
    known, scores = (None, None) if one else leave_one_out(ready, views, tokens)
    if one or few and any(shot.turn for shot in shots):
        for part, _, features in [view for view in views if view[1] == 0]:
            pixels = rearrange(features.picture[0], "c h w -> h w c").cpu()
            for angle in range(45, 360, 45):
                seen = encode_pixels(rotate(pixels, angle), pixels.shape[:2], model)
                views.append((part + one, angle, seen.features))
        more, nearer = leave_one_out(ready, views, tokens)
        if one or np.median(np.median(scores, axis=0) / np.median(nearer, axis=0)) > 1.15:
            known, scores = more, nearer
    bank, owner, tested = known
    random, gains = np.random.default_rng(0), []
    for i in np.arange(DAMAGES) % len(tested):
        part, features = tested[i]
        pixels = cut_paste(features.picture, random)
        levels = tokens(encode_pixels(pixels, pixels.shape[:2], model).features)
        gains.append(np.log(level_scores(ready, levels, bank, owner, part) / scores[i]))
    typical = np.median(scores, axis=0)
    weights = np.mean(gains, axis=0).clip(1e-3) / typical
    weights = weights / weights.sum()
    return GoodParts(bank, owner, typical, weights, scores / typical @ weights)


def leave_one_out(ready: Prepared, views: Sequence[tuple[int, int, Features]],
                  tokens: Callable[[Features], list[Tensor]]) -> tuple[tuple, np.ndarray]:
    """Of views (part, turn, features): the bank, its owners and the views that were tested, 40 at
    most, together; and what these score against the other parts, (k, levels) of `level_scores`.
    tokens(features) gives (1, T, D) unit vectors a level."""
    lying = [features for _, turn, features in views if turn == 0]
    turned = len(views) - len(lying)
    most = BANK // (2 if turned else 1) // len(lying), BANK // 2 // max(1, turned)
    lying, bank, owner, own = evenly(lying, 40), [], [], []
    for part, turn, features in views:
        levels = tokens(features)
        kept = [thin(t, t.new_zeros(2, t.shape[1]), turn, max(16, most[turn > 0]))[0]
                for t in levels]
        bank.append(kept)
        owner.append([torch.full(t.shape[1:2], part, device=t.device) for t in kept])
        own += [(part, features, levels)] if features in lying else []
    bank = [torch.cat(level, dim=1) for level in zip(*bank)]
    owner = [torch.cat(level) for level in zip(*owner)]
    scores = [level_scores(ready, levels, bank, owner, part) for part, _, levels in own]
    return (bank, owner, [view[:2] for view in own]), np.stack(scores)


def level_scores(ready: Prepared, levels: Sequence[Tensor], bank: Sequence[Tensor],
                 owner: Sequence[Tensor], leave: int) -> np.ndarray:
    """(levels,) image score by each, at least 0.001; arguments as of `novelty`, a list each."""
    found = (novelty(ready, *level, leave) for level in zip(levels, bank, owner))
    return np.maximum([float(top_mean(x)) for x in found], 1e-3)


def cut_paste(picture: Tensor, random: np.random.Generator) -> Tensor:
    """(H, W, 3) pixels of a good part's (1, 3, H, W) picture with damage: a piece as wide as 1/64
    to 1/11 of the longer side, give or take a factor of two, is also somewhere else."""
    pixels, (h, w) = rearrange(picture[0], "c h w -> h w c").clone(), picture.shape[2:]
    side, stretch = max(h, w) * 2 ** random.uniform(-6, -3.5), 2 ** random.uniform(-1, 1)
    a, b = (int(np.clip(n, 2, whole // 2)) for n, whole in ((side * stretch, h),
                                                            (side / stretch, w)))
    (y0, y1), (x0, x1) = (random.integers(whole - n, size=2) for n, whole in ((a, h), (b, w)))
    pixels[y1:y1 + a, x1:x1 + b] = pixels[y0:y0 + a, x0:x0 + b].clone()
    return pixels


def compare_good(ready: Prepared, features: Features) -> tuple[Tensor, dict[str, float]]:
    """(4 H0, 4 W0) map and image score by each level, in units of what unseen good parts score. The
    map is the levels' weighed mean, for which of them is right differs from part to part, scaled to
    the weighed mean of their scores, for they peak at other places."""
    # of `mutual` pictures one is not compared with itself
    itself = next((ready.images.index(shot.image) for shot in ready.normals
                   if ready.mutual and torch.equal(shot.features.picture, features.picture)), -1)
    size, whole, scores = [4 * n for n in features.maps.shape[-2:]], 0, {}
    for (name, (tokens, grid)), bank, owner, typical, weight in zip(
            detect_levels(ready.model, features).items(), *ready.good[:4]):
        far = novelty(ready, tokens, bank, owner, itself).view(1, 1, *grid) / typical
        scores[name] = float(top_mean(far))
        whole += F.interpolate(far, size=size, mode="bilinear")[0, 0] * weight
    score = float(ready.good.weights @ list(scores.values()))
    return whole * (score / top_mean(whole).clamp_min(1e-6)), scores   # 0 of a good part itself


def good_spread(scores: Sequence[float]) -> tuple[float, float, int]:
    """Of an unseen good part, from leave-one-out scores of k good parts: median and spread of its
    score, and the degrees of freedom of Student's t. The spread is that of the median deviation,
    for one odd good part must not decide, shrunk towards 20 % of the median (worth 8 parts)."""
    x, worth = np.asarray(scores), 8
    freedom, middle = worth + len(x) - 1, np.median(x)
    deviation = 1.4826 * np.median(abs(x - middle))
    variance = (worth * (0.2 * middle) ** 2 + (len(x) - 1) * deviation ** 2) / freedom
    return float(middle), float(np.sqrt(variance * (1 + 1 / len(x)))), freedom


def check_rate(rate: Any) -> None:
    check(isinstance(rate, numbers.Real) and 0 < rate < 1,
          f"false_positive_rate: expected a number between 0 and 1, got {rate!r}")


def upper_limit(scores: Sequence[float], rate: float) -> float:
    """The score that unseen good parts exceed at the rate."""
    check_rate(rate)
    middle, spread, freedom = good_spread(scores)
    return float(middle - scipy.special.stdtrit(freedom, rate) * spread)


def beyond_good(ready: Prepared, features: Features, rate: float) -> Tensor:
    """(4 H0, 4 W0) map of `compare_good`, in units of what unseen good parts exceed at the rate."""
    return compare_good(ready, features)[0] / upper_limit(ready.good.scores, rate)


def false_positives(scores: Sequence[float], threshold: float) -> float:
    """The rate at which unseen good parts exceed the threshold: `upper_limit` read backwards."""
    middle, spread, freedom = good_spread(scores)
    return float(scipy.special.stdtr(freedom, (middle - threshold) / spread))


@torch.inference_mode()
def detect(images: Any, references: References | Prepared | None = None, *, normals: Sequence = (),
           false_positive_rate: float = RATE, parts: bool = False,
           model: ICAS | None = None) -> Detection | list[Detection]:
    """Say which images are anomalous, from a few good parts (few-shot detection, Sec. 3.4).

    images  as in `segment`; references, normals as in `encode`. What is marked among them is left
            to `segment`. Without a good part each of at least six images is compared with others,
            on the assumption that most are good (`mutual`).
    false_positive_rate  in (0, 1): share of good parts that may be called anomalous.
    parts   fill `Detection.parts` too: the score by each level.
    Raises ValueError, TypeError or FileNotFoundError that names the argument.

        detect(["a.png", "b.png"], normals=["good_1.png", "good_2.png"])[1].is_anomalous
    """
    ready = prepare(References() if references is None else references, model=model)
    ready = ready.join(encode(normals=normals, model=ready.model))
    if not ready.references.normals and type(images) in (list, tuple):
        ready = mutual(images, model=ready.model)
    threshold = upper_limit(ready.good.scores, false_positive_rate)

    def find(image: EncodedImage) -> Detection:
        far, scores = compare_good(ready, image.features)
        return Detection(float(top_mean(far)), far[None].cpu().numpy(), image.shape, threshold,
                         scores if parts else {})
    return each_image(images, ready.model, find)


# ---- Files ---------------------------------------------------------------------------------------

CHECKPOINT = "icas-vits14.safetensors"      # the shipped one; both encoders lie beside it
DETAIL = "detail-lite2.safetensors"
REPORT = "report.html"                      # of a run, to be filled


def write_file(path: str | os.PathLike, tensors: dict[str, Tensor], meta: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    try:
        with whole_file(Path(path)) as part:
            save_file(tensors, part, metadata=meta)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{os.fspath(path)!r} could not be written ({error})") from error


def read_file(path: str | os.PathLike, name: str, form: str = "") -> tuple[dict, dict[str, str]]:
    """Tensors and metadata of a safetensors file, of that format if one is given; or of a .pth."""
    check(isinstance(path, (str, os.PathLike)), f"{name}: expected a path, got {brief(path)}",
          TypeError)
    shown = repr(os.fspath(path))
    check(Path(path).is_file(), f"{name}: no file at {shown}", FileNotFoundError)
    safe = form or Path(path).suffix == ".safetensors"
    try:
        if not safe:
            return torch.load(path, map_location="cpu", weights_only=True), {}
        with safe_open(path, "pt") as file:
            tensors, meta = {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        kind = "whole safetensors file" if safe else ".pth of tensors alone"
        # what torch says of a file that is no pickle at all is advice to be less careful
        why = type(error).__name__ if isinstance(error, pickle.UnpicklingError) else str(error)
        first = why.partition("\n")[0]
        raise ValueError(f"{name}: {shown} is not a {kind} ({first}); get or save it "
                         "again") from error
    found = meta.get("format", "none")
    check(form in ("", found), f"{name}: expected a file of format {form!r}, {shown} has "
          f"{found!r}; is it another kind of file? If it is of another version of icas: make it "
          "again, or update icas")
    return tensors, meta


def save(model: ICAS, path: str | os.PathLike, training: dict | None = None) -> None:
    """Write decoder (fp16), config, training record and the encoder's SHA-256 to one file."""
    tensors = {k: v.half().contiguous().cpu() for k, v in model.decoder.state_dict().items()}
    write_file(path, tensors, {"format": "icas-4", "config": json.dumps(asdict(model.config)),
                               "encoder_sha256": model.encoder_sha256, "version": __version__,
                               "training": json.dumps(training or {})})


@torch.inference_mode(False)  # its parameters must be ordinary tensors wherever it is called first
def load(path: str | os.PathLike | None = None, *, encoder: str | os.PathLike | None = None,
         device: str | torch.device | None = None, compile: bool = False) -> ICAS:
    """A model in eval mode; by default the shipped one. Never touches the network.

    path     checkpoint; by default the shipped one.
    encoder  a released DINOv2 (S, B, L, g, with or without registers), as `convert` takes it; by
             default the one that the checkpoint was trained with, beside it. A decoder that reads
             features takes no other; the shipped one reads relations alone, and takes any.
    device   "cpu", "cuda", "cuda:1", "mps"; by default CUDA if there is one, else the CPU.
    compile  torch.compile encoder and decoder in place: pays on a GPU with images of one size.
    Raises FileNotFoundError or ValueError for a missing, truncated, foreign or newer file.
    """
    device, own, given = check_device(device), None, encoder
    with contextlib.suppress(FileNotFoundError):   # a copied icas.py may have no shipped one
        own = find_shipped(CHECKPOINT)
    path = path or own or find_shipped(CHECKPOINT)
    tensors, meta = read_file(path, "path", "icas-4")
    try:
        config = Config(**json.loads(meta["config"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"path: {os.fspath(path)!r} holds no config that this version reads "
                         f"({error}); update icas") from error
    wanted = meta.get("encoder_sha256", "")
    if encoder is None:
        beside = [file for place in (Path(path).resolve(), own) if place
                  for file in sorted(place.parent.glob("*.safetensors"))]
        encoder = next((file for file in beside if sha256(file) == wanted), None)
        check(encoder, f"encoder: no file with SHA-256 {wanted} beside {os.fspath(path)!r}; pass "
              "encoder=", FileNotFoundError)
    state, name = convert(encoder), os.fspath(encoder)
    found = wanted if given is None else sha256(encoder)
    if found != wanted:
        check(not config.features, f"encoder: {name!r} has SHA-256 {found}, the checkpoint was "
              f"trained with {wanted} and reads its features; pass that file, or train.py "
              "--encoder for this")
        config = replace(config, encoder=encoder_name(state, name), blocks=(),
                         image_size=Config.image_size)   # no longer what suits the shipped one
    model = start(config, state, name, found, device, compile)
    load_state(model.decoder, tensors, os.fspath(path))
    return model


def start(config: Config, state: dict[str, Tensor], name: str, sha: str, device: torch.device,
          compile: bool) -> ICAS:
    """A model in eval mode with both encoders' weights, its decoder as initialised; `state` is
    the encoder's, from the file `name` with this SHA-256."""
    model = ICAS(config).eval()
    load_state(model.encoder, state, f"encoder {name!r}")
    model.encoder_sha256 = sha
    if config.detail:
        detail = find_shipped(DETAIL, Path(name).resolve().parent)   # or beside the encoder
        load_state(model.detail, read_file(detail, "detail")[0], DETAIL)
        model.detail.fuse()
    if compile:
        model.encoder.compile()
        model.decoder.compile()
    return model.to(device).requires_grad_(False)


def load_state(module: nn.Module, state: dict[str, Tensor], name: str) -> None:
    own = {k: v.shape for k, v in module.state_dict().items() if "num_batches_tracked" not in k}
    missing, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(own[k])}"
              for k in sorted(own.keys() & state.keys()) if own[k] != state[k].shape]
    check(not missing + foreign + shapes, f"{name}: weights do not fit; missing {missing[:5]}, "
          f"unexpected {foreign[:5]}, of another shape {shapes[:5]}")
    module.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)


def find_shipped(name: str, *more: Path) -> Path:
    """A file of checkpoints/ beside this one, where pip puts data files, or in `more` folders."""
    import sysconfig
    here, data = Path(__file__).resolve().parent, Path(sysconfig.get_path("data"), "share", "icas")
    places = [here / "checkpoints", here / "share" / "icas", data, here, *more]
    found = [place / name for place in places if (place / name).is_file()]
    check(found, f"path: {name} is in none of {list(map(str, places))}; put it there, or say "
          "where yours is: model=load(path), --model FILE", FileNotFoundError)
    return found[0]


shipped = functools.cache(load)   # shipped() is the default model, loaded once


def sha256(path: str | os.PathLike) -> str:
    return hashlib.sha256(np.memmap(path, mode="r") if os.path.getsize(path) else b"").hexdigest()


def check_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or an error: never another in silence."""
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"device: {device!r} is not available here ({first}); use 'cpu' or "
                         "'auto'") from error
    return torch.device(device)


def convert(state: dict[str, Tensor] | str | os.PathLike) -> dict[str, Tensor]:
    """DINOv2 weights in Meta's, transformers' or timm's layout -> Meta's key names, for `Encoder`.

    state  a state dict, or a .safetensors file or one of torch.save (read with weights_only=True).
    `mask_token` is dropped. Raises FileNotFoundError, or ValueError if the layout is none of them.
    """
    name = "encoder"
    if isinstance(state, (str, os.PathLike)):
        name, state = f"encoder: {os.fspath(state)!r}", read_file(state, "encoder")[0]
    check(isinstance(state, dict), f"{name}: expected a state dict or a path, got {brief(state)}",
          TypeError)
    # in transformers' names, up to version 4 and from 5 on, and timm's -> in Meta's, one by one
    names = {"dinov2.": "", "dinov2_with_registers.": "", "position_embeddings": "pos_embed",
             "patch_embeddings.projection": "patch_embed.proj", "embeddings.": "",
             "encoder.layer.": "blocks.", "layernorm.": "norm.", "attention.attention": "attention",
             "attention.output.dense": "attn.proj", "attention.o_proj": "attn.proj",
             "layer_scale": "ls", "lambda1": "gamma", "weights_in": "w12", "weights_out": "w3",
             "reg_token": "register_tokens"}
    for word in ("query", "key", "value", "q_proj", "k_proj", "v_proj"):
        names[f"attention.{word}"] = f"attn.{word[0]}"
    given = sorted(map(str, state))
    for theirs, ours in names.items():
        state = {str(k).replace(theirs, ours): v for k, v in state.items()}
    check({"cls_token", "pos_embed"} <= state.keys(), f"{name} holds no DINOv2 in Meta's, "
          f"transformers' or timm's layout; its keys are {given[:5]}")
    for key in [k for k in state if ".attn.q." in k]:
        names = [key.replace(".q.", f".{part}.") for part in "qkv"]
        check(state.keys() >= {*names}, f"{name}: of {names} one is missing; get the file again")
        parts = list(map(state.pop, names))
        state[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    if state["pos_embed"].shape[1] == 37 * 37:  # timm with registers: no place of the class token
        state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))
    if state["pos_embed"].shape[-1] == 1536:    # timm's names of the SwiGLU
        state = {k.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3."): v
                 for k, v in state.items()}
    return {k: v for k, v in state.items() if k != "mask_token"}


def encoder_name(state: dict[str, Tensor], name: str) -> str:
    """Which of ENCODERS converted weights are, with "-reg" for registers."""
    variants = {size[:2]: variant for variant, size in ENCODERS.items()}
    depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    width = state["cls_token"].shape[-1]
    check((width, depth) in variants, f"encoder: {name!r} has width {width} and {depth} blocks; "
          f"expected one of {list(variants)}")
    return variants[width, depth] + "-reg" * ("register_tokens" in state)


# ---- Pictures and the command line ---------------------------------------------------------------

HEAT = np.array([[38, 52, 120], [40, 140, 160], [250, 220, 90], [240, 120, 40], [200, 20, 40]])
WRITTEN = ["run.json", "masks", "overlays", "maps", "results.csv", "results.jsonl", "coco.json",
           "report.html"]
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


def overlay(image: Any, heat: np.ndarray, mask: np.ndarray, low: float = 0.0,
            high: float = 1.0) -> np.ndarray:
    """(h, w, 3) uint8: the image, the heat map, a white contour of the mask and a scale with its
    two ends in numbers, where there is room for them.

    heat (h, w), coloured from `low` (blue) to `high` (red): give one range to all images of a run,
    or good parts look red. mask (h, w) bool.
    """
    (h, w), side = mask.shape, max(10, min(mask.shape) // 24)
    table = np.stack([np.interp(np.linspace(0, 4, 256), range(5), c) for c in HEAT.T], axis=-1)
    alpha = np.linspace(0, 1.3, 256).clip(max=0.65)[:, None]
    level = (np.clip((heat - low) / max(high - low, 1e-9), 0, 1) * 255).astype(np.uint8)
    result = to_rgb(image).numpy() * (1 - alpha)[level] + (table * alpha)[level]
    outline = scipy.ndimage.binary_dilation(mask, iterations=max(1, round(min(h, w) / 200))) & ~mask
    result[outline] = 255
    strip = table[np.linspace(0, 255, max(1, w // 3)).astype(int)]
    result[h - max(1, side // 3):, :len(strip)] = strip
    result = result.round().astype(np.uint8)
    if min(h, w) >= 100:
        from PIL import Image, ImageDraw, ImageFont
        drawn, font = Image.fromarray(result), ImageFont.load_default(side)
        for x, value, anchor in ((2, low, "ls"), (len(strip), high, "rs")):
            ImageDraw.Draw(drawn).text((x, h - side // 3 - 3), f"{value:.3g}", "white", font,
                                       anchor, stroke_width=1, stroke_fill="black")
        result = np.array(drawn)
    return result


def list_images(paths: Sequence[str], skipped: list[str] | None = None,
                taken: dict[str, str] | None = None) -> dict[str, Path]:
    """Name -> file: of folders all images below by their path in it, sorted. Hidden files are left
    out, and what icas wrote (a folder with its run.json); other files are added to `skipped`.
    A name that another file has, here or in `taken`, becomes longer."""
    images, taken = {}, dict(taken or {})
    for path in map(Path, paths):
        below = sorted(p for p in path.rglob("*") if p.is_file() and not any(
            part[0] == "." for part in p.relative_to(path).parts))
        outputs = {p.parent for p in below if p.name == "run.json" and
                   '"key"' in p.read_text(encoding="utf-8", errors="replace")}
        files = [p for p in below if outputs.isdisjoint(p.parents)]
        inside = {path.name: path} if path.is_file() else {
            p.relative_to(path).as_posix(): p for p in files if p.suffix.lower() in SUFFIXES}
        check(path.exists(), f"{path}: no image there, nor anything else", FileNotFoundError)
        check(inside, f"{path}: no image there; expected one of {sorted(SUFFIXES)}" +
              f", but not in what icas wrote ({[*map(str, outputs)]})" * bool(outputs),
              FileNotFoundError)
        if skipped is not None:
            skipped += [str(p) for p in files if p.suffix.lower() not in SUFFIXES]
        for name, file in inside.items():
            check(name.encode(errors="ignore").decode() == name,
                  f"{name!r}: the file name is not UTF-8; rename it")
            parts = file.resolve().parts
            for name in (name, *("/".join(parts[-n:]) for n in range(2, len(parts)))):
                if Path(taken.setdefault(name, str(file))).resolve() == file.resolve():
                    break
            images[name] = file
    return images


def progress(items: Iterable, what: str, count: int | None = None):
    """The items, with their number and the time left on stderr: in a log a line every 30 s."""
    from tqdm import tqdm
    often, rank = sys.stderr.isatty(), int(os.environ.get("RANK", 0))
    return tqdm(items, what, count, mininterval=0.1 if often else 30, delay=0 if often else 30,
                disable=rank > 0)


@contextlib.contextmanager
def whole_file(path: Path):
    """A path to write to that takes the place of `path` at the end: all of the file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # ranks and threads write the same file
    part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_image(path: Path, array: np.ndarray, side: int | None = None) -> None:
    """Write an (h, w) or (h, w, 3) uint8 picture, reduced to `side` pixels, as .png or .jpeg."""
    from PIL import Image
    picture = Image.fromarray(array)
    if side:
        picture.thumbnail((side, side))
    with whole_file(path) as part:
        picture.save(part, path.suffix[1:], quality=80, compress_level=1)


def read_lines(path: Path) -> list[dict]:
    """Whole JSON lines only: a run that was killed may have left half of one."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def write_lines(path: Path, lines: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_run(out: Path) -> tuple[dict, dict[str, dict]]:
    """What a run leaves for every threshold to come: run.json with "key", what decides scores,
    "good", the good parts' own scores, "scale" of overlays, "threshold", "rate" it comes from; and
    picture's name -> its line of results.jsonl, sorted, also of ranks that were not joined. Beside
    them lie in maps/ NAME.npz, and small copies: NAME.jpeg of the picture, NAME.png of the heat."""
    path, files = out / "run.json", [out / "results.jsonl", *sorted(out.glob("results.*.jsonl"))]
    try:
        run = dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
        lines = {line["image"]: line for file in files for line in read_lines(file)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out}: run.json or results there are not what icas wrote "
                         f"({type(error).__name__}: {error}); use another folder") from error
    return run, dict(sorted(lines.items()))


def draw_result(out: Path, run: dict, line: dict, pixels: Tensor | None = None) -> dict:
    """Write mask and overlay of a picture at the run's threshold, from its maps; returns the line
    with what they show. A good part that stays good has nothing to be drawn anew."""
    name, cut, shape = line["image"], run["threshold"], (line["height"], line["width"])
    with np.load(out / "maps" / f"{name}.npz") as file:
        maps, labels = file["maps"], file["labels"].tolist()
    found = (Detection(line["score"], maps, shape, cut) if line["task"] == "detect" else
             Segmentation(maps, labels, shape, cut))
    if line.get("label") == "good" and not found.is_anomalous:
        return line | {"threshold": cut}
    if pixels is None:
        try:
            pixels = read_rgb(line["file"], "image", run["range"], PIXELS)[0]
        except (ValueError, OSError):   # it has been moved since
            pixels = to_rgb(out / "maps" / f"{name}.jpeg")
    # a.png keeps its name; a.jpg becomes a.jpg.png, and so a.jpg.png becomes a.jpg.png.png
    plain = name.endswith(".png") and Path(name[:-4]).suffix.lower() not in SUFFIXES
    drawn = name if plain else name + ".png"
    write_image(out / "masks" / drawn, found.mask.view(np.uint8) * 255)
    pixels = shrink(pixels, math.ceil(math.sqrt(pixels[..., 0].numel() / 2e6))).byte().numpy()
    small = replace(found, shape=pixels.shape[:2])
    heat = small.label_scores.max(axis=0)
    write_image(out / "overlays" / drawn, overlay(pixels, heat, small.mask, *run["scale"]))
    return line | {"label": "bad" if found.is_anomalous else "good", "threshold": cut,
                   "score": float(np.max(found.score)), "area": int(found.mask.sum()),
                   "regions": found.boxes(), "mask": f"masks/{drawn}",
                   "overlay": f"overlays/{drawn}"}


def run_folder(images: dict[str, Path], out: Path, run: dict, find: Callable, model: ICAS,
               skipped: Sequence[str]) -> int:
    """Score each image that OUT has no line of, then `finish_run`. Returns the exit status.

    run   as in run.json; results of another "key" are never mixed in.
    find  EncodedImage -> Segmentation or Detection. Under torchrun each rank takes its share.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    failed, (low, high) = 0, run["scale"]
    dates = {name: file.stat().st_mtime_ns for name, file in images.items()}
    done = {name for name, line in read_run(out)[1].items() if line["date"] == dates.get(name)}
    results = out / (f"results.{rank}.jsonl" if world > 1 else "results.jsonl")
    write_text(out / "run.json", json.dumps(run, indent=1))
    write_lines(results, read_lines(results))   # without half a line
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    try:
        for name in progress([n for n in list(images)[rank::world] if n not in done], "pictures"):
            begin = time.perf_counter()
            try:
                pixels, shape = read_rgb(images[name], "image", run["range"], PIXELS)
                found = find(encode_pixels(pixels, shape, model))
            except (ValueError, FileNotFoundError) as error:
                failed += 1
                print(f"icas: {images[name]}: {error}", file=sys.stderr)
                continue
            heat = replace(found, shape=found.maps.shape[1:]).label_scores.max(axis=0)
            level = (np.clip((heat - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)
            write_image(out / "maps" / f"{name}.png", level, 160)
            write_image(out / "maps" / f"{name}.jpeg", pixels.numpy(), 480)
            np.savez(out / "maps" / f"{name}.npz", maps=found.maps, labels=list(found.labels))
            score = found.score if isinstance(found, Detection) else None   # see `draw_result`
            line = {"image": name, "file": os.path.abspath(images[name]), "height": shape[0],
                    "width": shape[1], "task": run["key"]["task"], "score": score,
                    "date": dates[name]}
            line = draw_result(out, run, line, pixels)
            line["seconds"] = round(time.perf_counter() - begin, 3)
            with open(results, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            done.add(name)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f" after {len(done & images.keys())} of {len(images)}") from None
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        print(finish_run(out))
        if skipped:
            print(f"icas: skipped {len(skipped)}, no pictures: {', '.join(skipped[:5])}" +
                  ", ..." * (len(skipped) > 5), file=sys.stderr)
    if failed:
        print(f"icas: {failed} pictures failed", file=sys.stderr)
    if world > 1:   # torchrun stops all ranks when one ends with an error
        torch.distributed.barrier()
    return int(failed > 0)


def finish_run(out: Path) -> str:
    """Join what the ranks found, bring it to the run's threshold, and write it as results.jsonl,
    results.csv, coco.json and report.html; returns what there is to say of it."""
    import csv
    run, lines = read_run(out)
    other = [line for line in lines.values() if line["threshold"] != run["threshold"]]
    undone = {line["image"]: line | {"threshold": None, "label": None} for line in other}
    write_lines(out / "results.jsonl", (lines | undone).values())   # if this is stopped half way
    with ThreadPoolExecutor() as pool:
        redrawn = pool.map(functools.partial(draw_result, out, run), other)
        lines |= {line["image"]: line for line in progress(redrawn, "masks", len(other))}
    lines = list(lines.values())
    write_lines(out / "results.jsonl", lines)
    for part in out.glob("results.*.jsonl"):
        part.unlink()
    columns = ["image", "label", "score", "threshold", "area", "seconds"]
    rows = [["path", *columns[1:]], *([line[key] for key in columns] for line in lines)]
    with whole_file(out / "results.csv") as part, open(part, "w", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    with contextlib.suppress(ImportError):   # without pycocotools there is no coco.json
        write_coco(out, lines)
    text, report = summary(run, lines), out / "report.html"
    write_report(out, run, lines, text)
    return f"{text}\n{report if report.is_file() else out} shows them"


def summary(run: dict, lines: Sequence[dict]) -> str:
    """How many were called bad, how many of good parts would be, and a histogram of scores."""
    good, cut, count = run["good"], run["threshold"], len(lines)
    scores, bad = [line["score"] for line in lines], sum(line["label"] == "bad" for line in lines)
    said = [f"{bad} of {count} pictures are called bad at the threshold {cut:.3g}"]
    if not count:
        return said[0]
    known = "good parts"
    if run["mutual"]:
        known = "compared with"
        said.append(f"no good part was given: each picture was compared with {len(good)} of them, "
                    "as if most were good. With --normal GOOD_IMAGE ... it knows more")
    if good:
        rate = false_positives(good, cut)
        said[0] += f"; if all were good it would be {rate * count:.1f} ({rate:.1%})"
        if len(good) <= 2:
            said.append("one or two good parts do not show how good parts differ, so the threshold "
                        "is a guess; give more, or: icas threshold OUT --bad FILE")
        if not bad:
            highest = sorted(lines, key=lambda line: -line["score"])[:3]
            names = ", ".join(f"{line['image']} ({line['score']:.2f})" for line in highest)
            said.append(f"nothing is above {cut:.3g}; the highest are {names}")
            if len(good) * rate < 1:
                said.append(f"{len(good)} good parts cannot promise a rate of {rate:.1%}; look at "
                            "the highest, and try: icas threshold OUT --rate 0.2")
        if bad <= rate * count:
            said.append("no more than of good parts: all are good, or such defects are out of reach"
                        ". To know, put in a part known to be bad: icas threshold OUT --bad FILE")
    edges = np.linspace(min(cut, *good, *scores), max(cut, *good, *scores) + 1e-6, 13)
    shown = {known: good, "pictures": scores} if good else {"pictures": scores}
    counts = [np.histogram(values, edges)[0] for values in shown.values()]
    rows = [" " * 15 + "".join(f"{f'{name} ({len(shown[name])})':<32}" for name in shown)]
    for i, (low, high) in enumerate(zip(edges, edges[1:])):
        bars = (f"{'#' * math.ceil(24 * n[i] / n.max())} {n[i] or ''}" for n in counts)
        mark = ">" if low <= cut < high else "-"   # the bin of the threshold
        rows.append(f"{low:6.2f} {mark} {high:<6.2f}" + "".join(f"{bar:<32}" for bar in bars))
    return "\n".join([*said, *map(str.rstrip, rows)])


def write_coco(out: Path, lines: Sequence[dict]) -> None:
    """coco.json: COCO annotations, one a connected region, that CVAT and pycocotools read."""
    names = sorted({r["label"] for line in lines for r in line["regions"]} | {"defect"})
    images, annotations = [], []
    for i, line in enumerate(lines, start=1):
        images.append({"id": i, "file_name": line["image"], "height": line["height"],
                       "width": line["width"]})
        mask = to_rgb(out / line["mask"])[..., 0].numpy() > 0
        for region, (box, inside) in zip(line["regions"], regions(mask), strict=True):
            own = np.zeros_like(mask)
            own[box] = inside
            annotations.append(region | {
                "id": len(annotations) + 1, "image_id": i, "iscrowd": 1,
                "category_id": names.index(region["label"]) + 1, "segmentation": run_lengths(own)})
    kinds = [{"id": n, "name": name, "supercategory": "defect"} for n, name in enumerate(names, 1)]
    write_text(out / "coco.json", json.dumps({
        "info": {"description": f"icas {__version__}"}, "licenses": [], "images": images,
        "annotations": annotations, "categories": kinds}))


def write_report(out: Path, run: dict, lines: Sequence[dict], text: str) -> None:
    """report.html: one file with all pictures, small, sorted by score, and a threshold to move."""
    import base64
    try:
        page = find_shipped(REPORT).read_text(encoding="utf-8")
    except FileNotFoundError:   # a copied icas.py may have none
        return

    def copy(line: dict, form: str) -> str:
        data = (out / "maps" / f"{line['image']}.{form}").read_bytes()
        return f"{form};base64,{base64.b64encode(data).decode()}"
    rows = [[line["image"], line["score"], copy(line, "jpeg"), copy(line, "png")]
            for line in sorted(lines, key=lambda line: -line["score"])]
    shown = {key: run[key] for key in ("scale", "threshold", "good")} | {
        "task": run["key"]["task"], "out": os.fspath(out), "text": text, "heat": HEAT.tolist(),
        "version": __version__, "marked": MASK_FROM if run["key"]["task"] == "detect" else 1}
    data = json.dumps([shown, rows]).replace("<", "\\u003c")   # no name ends the script
    write_text(out / "report.html", page.replace("DATA", data, 1))


def parser():
    import argparse
    whole = argparse.ArgumentParser("icas", description="Mark defects from one marked defect, a "
                                    "few good parts, or a click.")
    whole.add_argument("--version", action="version", version=f"icas {__version__}")
    commands = whole.add_subparsers(dest="command", required=True)
    for name, text in (("segment", "masks of what the references show"),
                       ("detect", "which images are anomalous, from good parts, or without any "
                        "if most are good"),
                       ("threshold", "set the threshold of a finished run anew"),
                       ("prompts", "encode references once and write them to a file"),
                       ("demo", "detect and segment on real solar cells (ELPV)")):
        add = commands.add_parser(name, help=text, description=text).add_argument
        if name == "threshold":
            add("out", metavar="OUT", help="folder of a run of icas detect or icas segment")
            add("--score", type=float, help="what scores more is bad")
            add("--rate", type=float, help="share of good parts that may be called bad")
            add("--bad", nargs="+", metavar="FILE", help="pictures of the run known to be bad")
            continue
        add("--out", required=True, help="folder to write; of prompts the file")
        add("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
        if name == "demo":
            continue
        if name != "prompts":
            add("images", nargs="+", metavar="IMAGE_OR_FOLDER")
        add("--anomaly", nargs="+", action="append", default=[], metavar="IMAGE", help="a defect's "
            "IMAGE, and its MASK, a box X0 Y0 X1 Y1, or a .json of LabelMe or COCO; again for more")
        add("--normal", nargs="+", action="extend", default=[], metavar="GOOD_IMAGE_OR_FOLDER",
            help="good parts")
        add("--turns", action=argparse.BooleanOptionalAction, help="encode references with eight "
            "copies of good parts, or all as they lie (default: twelve copies of marked ones, "
            "four of good parts)")
        add("--prompts", metavar="FILE", help="references written by `icas prompts`")
        add("--model", metavar="FILE", help="checkpoint (default: the shipped one)")
        add("--encoder", metavar="FILE", help="a DINOv2 of any size (default: the checkpoint's)")
        add("--range", nargs=2, type=float, metavar=("LOW", "HIGH"), help="values of "
            "16-bit grey pictures that become black and white")
        if name == "segment":
            clicks = {"type": float, "action": "append", "default": []}
            add("--point", nargs=2, **clicks, metavar=("X", "Y"), help="on a defect, pixels")
            add("--negative", nargs=2, **clicks, metavar=("X", "Y"), help="beside it, pixels")
            add("--box", nargs=4, **clicks, metavar=("X0", "Y0", "X1", "Y1"), help="around one")
            add("--threshold", type=float, help="score from which a pixel is marked (default 0.5)")
        if name == "detect":
            add("--false-positive-rate", type=float, help="share of good parts that may be called "
                f"bad (default {RATE}); icas threshold sets it later")
    return whole


def encode_files(args, model: ICAS) -> tuple[References, list[str]]:
    """References of the command line, and the files that they come from."""
    references = References.load(args.prompts) if args.prompts else References()
    normals, anomalies = evenly([*list_images(args.normal).values()], MANY), []
    for image, *marks in args.anomaly:
        with contextlib.suppress(ValueError):
            marks = [[float(x) for x in marks]] if len(marks) == 4 else marks
        check(len(marks) == 1, "--anomaly: expected IMAGE MASK, IMAGE X0 Y0 X1 Y1 or IMAGE "
              f"FILE.json, got {len(marks) + 1} words: {' '.join(map(str, [image, *marks]))}")
        anomalies.append((image, *marks))
    for entry in progress(anomalies, "anomalies"):
        references += encode([entry], turns=args.turns, value_range=args.range, model=model)
    turns = False if args.turns is None and len(normals) > 40 else args.turns   # as `encode` has it
    for entry in progress(normals, "normals"):
        references += encode(normals=[entry], turns=turns, value_range=args.range, model=model)
    files = [x for entry in anomalies for x in entry if isinstance(x, str)]   # no box
    return references, [*files, *map(str, normals)]


def run_command(args) -> int:
    """`icas segment`, `icas detect` and `icas prompts`. What is wrong is said before anything is
    written."""
    out, skipped, given = Path(args.out), [], vars(args)
    asked = given.get("false_positive_rate")
    asked = RATE if asked is None else asked
    check_range(args.range or (0, 1))
    check_rate(asked)
    check_threshold(given.get("threshold"))
    model = load(args.model, encoder=args.encoder, device=args.device)
    if args.command == "prompts":
        references, _ = encode_files(args, model)
        check(references.shots,
              "references: none given; pass --anomaly IMAGE MASK or --normal IMAGE")
        references.save(out)
        print(f"{len(references)} references ({', '.join(references.labels) or 'normal'}) in {out}")
        return 0
    check(not out.is_file() and not any(out.resolve() == Path(x).resolve()
                                        for x in args.images + args.normal),
          f"--out: {out} is a file or the folder of the pictures; give a folder of its own")
    foreign = [n for n in WRITTEN if (out / n).exists()]
    kept, lines = read_run(out)   # looked at last: another rank writes run.json before the others
    check(kept or not foreign, f"--out: {out} holds {foreign} that icas did not write; use another")
    images = list_images(args.images, skipped, {n: line["file"] for n, line in lines.items()})
    references, files = encode_files(args, model)
    ready = prepare(references, model=model)
    free = ("images", "out", "device", "threshold", "false_positive_rate")
    key = {"task": args.command, "version": __version__,
           "arguments": {k: v for k, v in given.items() if k not in free}, "sha256": {
               f: sha256(f) for f in [*files, args.prompts, args.model, args.encoder] if f}}
    if args.command == "detect" and not references.normals:
        key["images"] = sorted(images)   # which are compared with each other
    check(not kept or kept.get("key") == key,
          f"--out: {out} holds results of other arguments (see {out / 'run.json'}); use another")
    good, cut, rate = [], kept.get("threshold"), kept.get("rate")
    if args.command == "detect":
        if not references.normals:
            ready = mutual(list(images.values()), value_range=args.range, model=model)
        good, find = ready.good.scores.tolist(), functools.partial(detect, references=ready)
        if args.false_positive_rate is not None or not kept:
            rate, cut = asked, upper_limit(good, asked)
    else:
        cut = check_threshold(cut if args.threshold is None else args.threshold)
        marks = {"points": args.point + args.negative, "boxes": args.box,
                 "point_labels": [1] * len(args.point) + [0] * len(args.negative)}
        marks = {name: rows for name, rows in marks.items() if rows}
        find = functools.partial(segment, references=ready, **marks)
        check(len(images) == 1 or not marks,
              "--point, --box: expected one image with them; run icas once an image")
        if marks or not references.shots:
            find(encode_image(next(iter(images.values())), value_range=args.range, model=model))
    run = {"key": key, "good": good, "mutual": ready.mutual, "range": args.range, "rate": rate,
           "scale": (1, 2.5) if args.command == "detect" else (0, 1), "threshold": cut}
    return run_folder(images, out, run, find, model, skipped)


def set_threshold(args) -> int:
    """`icas threshold`: masks, labels and report of a run at another threshold."""
    out, score, rate = Path(args.out), args.score, args.rate
    run, lines = read_run(out)
    check(lines and run.get("key", {}).get("version") == __version__,
          f"{out}: no finished run of icas there, or one of another version", FileNotFoundError)
    check([score, rate, args.bad].count(None) == 2, "expected one of --score, --rate and --bad")
    good = run["good"]
    check(good or score is not None, "--rate, --bad: need a run of icas detect; use --score")
    if score is not None:
        check(math.isfinite(score), f"--score: expected a number, got {score}")
        cut = score if good else check_threshold(score)
    elif rate is not None:
        cut = upper_limit(good, rate)
    else:
        by_file = {line["file"]: line for line in lines.values()}
        found = {x: lines.get(x) or by_file.get(os.path.abspath(x)) for x in args.bad}
        missing = [x for x in found if not found[x]]
        check(not missing, f"--bad: {', '.join(missing)}: not among the run's pictures")
        bad = np.array([line["score"] for line in found.values()])
        if run["mutual"]:   # those compared with may be the bad ones; the others most likely not
            good = [x["score"] for x in lines.values() if x not in found.values()]
            check(good, "--bad: all of the run's pictures are named; leave good ones out")
        good = np.array(good)
        every = np.unique([*bad, *good])
        check(len(every) > 1, "--bad: good parts and bad ones all have one score")
        # of the cuts that part them best the one with most room
        low, high = max(zip(every[:-1], every[1:]), key=lambda pair: (
            (bad > pair[0]).mean() - (good > pair[0]).mean(), pair[1] - pair[0]))
        cut, above = float(low + high) / 2, (bad > low).sum()
        print(f"{above} of {len(bad)} known bad parts score above {cut:.3g}, "
              f"{(good > low).sum()} of {len(good)} good ones" +
              "; what scores less looks like a good part here" * bool(above < len(bad)))
    write_text(out / "run.json", json.dumps(run | {"threshold": cut, "rate": rate}, indent=1))
    print(finish_run(out))
    return 0


# The demo's prompt: cell 4 of ELPV, its dark area outlined by hand, (x, y) in pixels of 300 x 300
DEMO_PROMPT = 4, [(15, 243), (40, 226), (90, 211), (140, 202), (200, 203), (240, 212), (262, 230),
                  (256, 242), (225, 254), (150, 259), (60, 257)]
DEMO_GOOD, DEMO_CELLS = (59, 446, 499, 503), (6, 13, 22, 29, 45, 56, 368, 412, 424, 508)


def demo(args) -> int:
    """Write real solar cells (ELPV) to files and run on them what can be run on any folder."""
    try:
        from elpv_dataset.utils import load_dataset
    except ImportError as error:
        raise ImportError('the demo needs, from a clone, pip install ".[demo]"') from error
    (cells, probability, _), out, (index, outline) = load_dataset(), Path(args.out), DEMO_PROMPT
    for folder, chosen in (("prompt", [index]), ("good", DEMO_GOOD), ("cells", DEMO_CELLS)):
        for i in chosen:
            kind = "bad" if probability[i] == 1 else "good"
            write_image(out / folder / f"{i:04d}_{kind}.png", cells[i])
    marked, outlined = out / f"prompt/{index:04d}_bad.png", out / f"prompt/{index:04d}_bad.json"
    shape = {"label": "dark area", "points": outline, "shape_type": "polygon"}
    drawn = {"shapes": [shape], "imageHeight": 300, "imageWidth": 300}   # as LabelMe saves it
    write_text(outlined, json.dumps(drawn))
    for task, *shown in (("detect", "--normal", out / "good"),
                         ("segment", "--anomaly", marked, outlined)):
        command = [*map(str, (task, out / "cells", *shown, "--out", out / task))]
        print("$ icas", *command)
        if status := main([*command, "--device", args.device]):
            return status
        rows = [to_rgb(p).numpy() for p in sorted((out / task / "overlays").glob("*.png"))]
        write_image(out / f"{task}.png", rearrange(rows, "(r c) h w k -> (r h) (c w) k", r=2))
    print(f"look at {out / 'detect.png'}, {out / 'segment.png'} and the reports")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The console script `icas`. Status: 0 done, 1 some images failed, 2 wrong use, 130 stopped."""
    args = parser().parse_args(argv)
    warnings.formatwarning = lambda text, *_, **__: f"icas: {text}\n"
    try:
        return {"demo": demo, "threshold": set_threshold}.get(args.command, run_command)(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"icas: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"icas: stopped{stop}; run the same command to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
