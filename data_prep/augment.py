"""Views of training images: augmentation and synthetic defects."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage, sparse
from torch import Tensor


def augment(image: Tensor, labels: Tensor, size: int, rng: np.random.Generator, turns: bool,
            strong: bool = False) -> tuple[Tensor, Tensor]:
    """One square view: large-scale jitter, flips, quarter turns (`turns`: anomaly data, flipped all
    ways so), mild colour.

    strong  crops and zooms that keep more of the image, mirrored borders, much more colour.
    returns (3, size, size) in [0, 1] and (size, size).
    """
    if strong:
        image, labels = crop_or_mirror(image, labels, size, rng)
    else:
        image, labels = jitter(image, labels, size, rng)
    if rng.random() < 0.5:
        image, labels = image.flip(-1), labels.flip(-1)
    if turns:
        quarter = int(rng.integers(4))
        image, labels = image.rot90(quarter, (-2, -1)), labels.rot90(quarter, (-2, -1))
    if strong:  # a crop of any shape
        image, labels = resize(image, size, size), resize_labels(labels, size, size)
    return (colour if strong else mild_colour)(image, rng), labels


def resize(image: Tensor, h: int, w: int) -> Tensor:
    return F.interpolate(image[None], size=(h, w), mode="bicubic", antialias=True)[0].clamp(0, 1)


def resize_labels(labels: Tensor, h: int, w: int) -> Tensor:
    return F.interpolate(labels[None, None].float(), size=(h, w), mode="nearest-exact")[0, 0].byte()


def enough(crop: Tensor, labels: Tensor) -> bool:
    """Whether a crop keeps the object: a tenth of what is marked, in at least 12 px."""
    return not labels.any() or int((crop > 0).sum()) >= max(12, 0.1 * int((labels > 0).sum()))


def jitter(image: Tensor, labels: Tensor, size: int, rng: np.random.Generator,
           ) -> tuple[Tensor, Tensor]:
    """Large-scale jitter (Ghiasi et al. 2021): the longer side becomes 0.1 to 2 times `size`; what
    is larger is cropped, what is smaller laid at random on the image's mean colour."""
    for attempt in range(10):
        scale = size / max(labels.shape) * (rng.uniform(0.1, 2.0) if attempt < 9 else 1)
        h, w = (max(1, round(n * scale)) for n in labels.shape)
        y, x = (int(np.sign(size - n) * rng.integers(abs(n - size) + 1)) for n in (h, w))
        marked = resize_labels(labels, h, w)
        crop = lay(marked, torch.zeros(size, size, dtype=torch.uint8), y, x)
        if enough(crop, marked):
            break
    mean = image.mean(dim=(1, 2), keepdim=True).repeat(1, size, size)
    return lay(resize(image, h, w), mean, y, x), crop


def lay(picture: Tensor, canvas: Tensor, y: int, x: int) -> Tensor:
    """Lay a picture (..., h, w) on a canvas (..., H, W), its first pixel at (y, x), which may be
    outside; returns the canvas."""
    (h, w), (height, width) = picture.shape[-2:], canvas.shape[-2:]
    part = picture[..., max(-y, 0):height - y, max(-x, 0):width - x]
    canvas[..., max(y, 0):y + h, max(x, 0):x + w] = part
    return canvas


def clean_crop(image: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The largest of 30 random squares that show nothing marked; all, if there is none."""
    best, (h, w) = None, labels.shape
    for side in sorted((min(h, w) * np.exp(rng.uniform(np.log(0.2), 0, 30))).astype(int))[::-1]:
        y, x = rng.integers(h - side + 1), rng.integers(w - side + 1)
        if best is None and side >= 1 and not labels[y:y + side, x:x + side].any():
            best = slice(y, y + side), slice(x, x + side)
    return (image, labels) if best is None else (image[:, best[0], best[1]], labels[best])


def crop_or_mirror(image: Tensor, labels: Tensor, size: int, rng: np.random.Generator,
                   ) -> tuple[Tensor, Tensor]:
    """A crop of 0.45 of the shorter side or more, of pictures larger than `size` down to 0.25, or
    all; one in five zoomed out before, to 0.4 at least: mirrored copies fill the frame."""
    least = np.clip(0.5 * size / min(labels.shape), 0.25, 0.45)
    h, w = labels.shape
    if rng.random() < 0.2:
        pad_y, pad_x = (min(n - 1, round(n * rng.uniform(0.1, 0.75))) for n in (h, w))
        pad = (pad_x, pad_x, pad_y, pad_y)
        image = F.pad(image[None], pad, mode="reflect")[0]
        labels = F.pad(labels[None, None].float(), pad, mode="reflect")[0, 0].byte()
        h, w = labels.shape
    for attempt in range(10):
        side, aspect = np.exp([rng.uniform(np.log(least), 0), rng.uniform(-0.2, 0.2)])
        side *= min(h, w)
        ch, cw = (max(1, min(n, round(x))) for n, x in ((h, side * aspect), (w, side / aspect)))
        if rng.random() < 0.3 or attempt == 9:
            ch, cw = h, w
        y, x = rng.integers(h - ch + 1), rng.integers(w - cw + 1)
        crop = labels[y:y + ch, x:x + cw]
        if enough(crop, labels):
            break
    return image[:, y:y + ch, x:x + cw], crop


def mild_colour(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast and saturation, 0.8 to 1.2 times each; (3, H, W) in [0, 1]."""
    bright, contrast, saturation = rng.uniform(0.8, 1.2, 3)
    image = image * bright
    for middle, factor in ((image.mean(), contrast), (image.mean(dim=0, keepdim=True), saturation)):
        image = (image - middle) * factor + middle
    return image.clamp(0, 1)


def colour(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Light, shade, contrast, tint, blur and noise; (3, H, W) in [0, 1]."""
    if rng.random() < 0.1:
        image = 1 - image
    if rng.random() < 0.15:
        image = image[rng.permutation(3)]
    if rng.random() < 0.3:  # light from one side
        angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.6)
        y, x = (torch.linspace(-0.5, 0.5, n) for n in image.shape[-2:])
        image = image * (1 + depth * (np.sin(angle) * y[:, None] + np.cos(angle) * x))
    gain = torch.from_numpy(rng.uniform(0.75, 1.3) * rng.uniform(0.93, 1.07, (3, 1, 1))).float()
    image = (image.clamp(0, 1) ** rng.uniform(0.6, 1.7)) * gain
    image = (image - image.mean()) * rng.uniform(0.5, 1.4) + image.mean()
    if rng.random() < 0.1:
        image = image.mean(dim=0, keepdim=True).expand(3, -1, -1)
    if rng.random() < 0.2:
        blur = [rng.uniform(0.5, 1.5)] * 2
        image = torch.from_numpy(ndimage.gaussian_filter(image.numpy(), (0, *blur)))
    if rng.random() < 0.3:
        image = image + torch.from_numpy(rng.normal(0, rng.uniform(0, 0.04), image.shape)).float()
    return image.clamp(0, 1)


def cut_out(image: Tensor, marked: Tensor, side: int, source: np.random.Generator,
            rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A region of marked (H, W) bool that `source` draws, large ones likelier, as it would look on
    a picture of `side`, resized, flipped and turned by rng: (3, h, w) with a frame, and its mask
    (h, w) bool, False at the border."""
    numbered, _ = ndimage.label(marked.numpy(), np.ones((3, 3)))
    which = int(source.choice(numbered[numbered > 0])) - 1
    (y, x), (height, width) = ndimage.find_objects(numbered)[which], marked.shape
    place = (..., slice(max(0, y.start - 4), min(height, y.stop + 4)),
             slice(max(0, x.start - 4), min(width, x.stop + 4)))
    patch, mask = image[place], torch.from_numpy(numbered[place] == which + 1)
    zoom = min(side / max(height, width) * rng.uniform(0.7, 1.4), 0.6 * side / max(mask.shape))
    h, w = (max(3, round(n * zoom)) for n in mask.shape)
    turn, mirror = int(rng.integers(4)), [-1] * int(rng.integers(2))
    patch, mask = (x.flip(mirror).rot90(turn, (-2, -1))
                   for x in (resize(patch, h, w), resize_labels(mask, h, w) > 0))
    inner = torch.zeros_like(mask)
    inner[1:-1, 1:-1] = mask[1:-1, 1:-1]
    return patch, inner


def poisson_blend(surface: Tensor, patch: Tensor, mask: Tensor) -> Tensor:
    """The patch's gradients under the mask and around it, from the surface's own colour beyond
    (Perez et al. 2003): (3, h, w) each; mask (h, w) bool, False at the border."""
    around = ndimage.binary_dilation(mask.numpy(), iterations=2)
    y, x = np.nonzero(np.pad(around[1:-1, 1:-1], 1))
    number = np.full(mask.shape, -1)
    number[y, x] = np.arange(len(y))
    laplace, wanted = 4 * sparse.eye(len(y), format="csr"), 4 * patch[:, y, x].double()
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        beside = number[y + dy, x + dx]
        free, = np.nonzero(beside >= 0)
        laplace -= sparse.csr_matrix((np.ones(len(free)), (free, beside[free])), laplace.shape)
        border = surface[:, y + dy, x + dx] * torch.from_numpy(beside < 0)
        wanted += border - patch[:, y + dy, x + dx]
    blended = surface.clone()
    if len(y):
        solved = sparse.linalg.splu(laplace.tocsc()).solve(wanted.T.numpy())
        blended[:, y, x] = torch.from_numpy(solved.T).float().clamp(0, 1)
    return blended


@dataclass(frozen=True)
class SyntheticDefect:
    """One kind of damage, drawn once and then put on several images, each time in a new shape and
    place."""
    kind: str            # one of KINDS
    size: float          # length or diameter as a share of the image's side
    width: float         # of lines, as a share of the side
    colour: tuple        # RGB in [0, 1]
    opacity: float       # 0.3 to 1
    softness: float      # blur of the outline, as a share of the side
    count: int           # instances an image, at most
    texture: int         # seed of the image that a foreign texture comes from
    relative: bool       # the colour shifts that of the surface, as shade and soot do

    KINDS = ("scratch", "crack", "blob", "stain", "dent", "missing", "texture", "speckle", "smear",
             "pit", "scuff")

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "SyntheticDefect":
        kind = str(rng.choice(cls.KINDS))
        grey = rng.random()
        tint = tuple(np.clip(grey + rng.normal(0, 0.25 if rng.random() < 0.4 else 0.02, 3), 0, 1))
        small = {"scratch": (.15, .9), "crack": (.2, 1.2), "blob": (.02, .2), "stain": (.1, .5),
                 "dent": (.05, .3), "missing": (.06, .35), "texture": (.08, .45),
                 "speckle": (.1, .4), "smear": (.1, .5), "pit": (.01, .05),
                 "scuff": (.15, .8)}[kind]
        size = float(np.exp(rng.uniform(*np.log(small))))
        width = float(np.exp(rng.uniform(np.log(.003), np.log(.025))))
        return cls(kind, size, width, tint, rng.uniform(0.35, 1), rng.uniform(0, 0.006),
                   int(rng.integers(1, 6)), int(rng.integers(1 << 30)), bool(rng.random() < 0.4))

    def paint(self, image: Tensor, foreign: Tensor, rng: np.random.Generator,
              ) -> tuple[Tensor, Tensor]:
        """Damage image (3, S, S) in [0, 1]; `foreign` is another one. returns the image and its
        bool mask (S, S)."""
        side = image.shape[-1]
        mask = np.zeros((side, side), bool)
        for _ in range(int(rng.integers(1, self.count + 1))):
            mask |= self._shape(side, rng)
        alpha = ndimage.gaussian_filter(mask.astype(np.float32), self.softness * side + 0.4)
        alpha = torch.from_numpy(alpha).clamp(0, 1) * self.opacity
        if self.kind == "texture":
            paint = foreign
        elif self.kind == "smear":
            blur = side * .03
            paint = torch.from_numpy(ndimage.gaussian_filter(image.numpy(), (0, blur, blur)))
            paint = 0.8 * paint + 0.2 * torch.tensor(self.colour)[:, None, None].float()
        elif self.kind == "dent":  # light on one side, shade on the other
            height = ndimage.gaussian_filter(mask.astype(np.float32), self.size * side / 5)
            slope = np.gradient(height, axis=0) + np.gradient(height, axis=1)
            shade = torch.from_numpy(0.5 * slope / (np.abs(slope).max() + 1e-6)).float()
            paint, alpha = image + shade, alpha.sign() * self.opacity
        else:
            tint = torch.from_numpy(rng.normal(0, 0.06, (3, 1, 1))).float()
            paint = torch.tensor(self.colour)[:, None, None].float() + tint
            paint = paint + torch.from_numpy(rng.normal(0, 0.03, (3, side, side))).float()
            if self.relative:
                paint = image + 0.8 * (paint - 0.5)
        return (image * (1 - alpha) + paint * alpha).clamp(0, 1), torch.from_numpy(mask)

    def _shape(self, side: int, rng: np.random.Generator) -> np.ndarray:
        length = self.size * side * rng.uniform(0.6, 1.6)
        thick = max(0.6, self.width * side * rng.uniform(0.7, 1.4))
        seeds = np.ones((side, side), bool)
        yx, angle = rng.uniform(0.1, 0.9, 2) * side, rng.uniform(0, 2 * np.pi)
        if self.kind in ("scratch", "crack"):
            bend = rng.normal(0, 0.004) if self.kind == "scratch" else 0
            for _ in range(int(length)):
                angle += bend + (rng.normal(0, 0.25) if self.kind == "crack" else 0)
                yx = yx + (np.sin(angle), np.cos(angle))
                y, x = yx.astype(int)
                if 0 <= y < side and 0 <= x < side:
                    seeds[y, x] = False
            return near(seeds, thick / 2)
        if self.kind == "scuff":  # many short parallel strokes
            for _ in range(int(rng.integers(4, 15))):
                start = yx + rng.normal(0, length / 5, 2)
                steps = np.arange(int(length * rng.uniform(0.3, 1)))
                way = np.array([[np.sin(angle)], [np.cos(angle)]])
                line = (start[:, None] + way * steps).astype(int)
                line = line[:, ((line >= 0) & (line < side)).all(axis=0)]
                seeds[line[0], line[1]] = False
            return near(seeds, thick / 2)
        if self.kind == "speckle":
            spots = (yx[:, None] + rng.normal(0, length / 3, (2, 25))).astype(int)
            spots = spots[:, ((spots >= 0) & (spots < side)).all(axis=0)]
            seeds[spots[0], spots[1]] = False
            return near(seeds, thick)
        y, x = np.mgrid[:side, :side] - yx[:, None, None]
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        radius = np.hypot(u, v * rng.uniform(1, 2.2)) / (length / 2 + 1)
        ragged = ndimage.gaussian_filter(rng.normal(size=(side, side)), max(1.5, length / 8))
        rough = {"blob": .1, "dent": .05, "missing": .15, "pit": .1}.get(self.kind, .45)
        ragged *= rough / (ragged.std() + 1e-9)
        return radius + ragged < 1


def near(seeds: np.ndarray, radius: float) -> np.ndarray:
    """(S, S) bool: within `radius` of a pixel that is False in `seeds`; nothing where none is."""
    return ndimage.distance_transform_edt(seeds) <= radius if not seeds.all() else ~seeds
