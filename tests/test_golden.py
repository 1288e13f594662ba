"""Outputs of the public functions on six fixed pictures, kept in golden.npz.

    python tests/test_golden.py            how far this checkout is from them, or "equal bits"
    python tests/test_golden.py --write    keep this checkout's, in a commit that says why

A change that claims equal results shows it with the first command, on one machine and number of
threads, before and after:
other processors round otherwise, which is why the test itself allows a little.
"""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import icas

FILE = Path(__file__).with_name("golden.npz")
CELLS = (4, 6, 13, 17, 368, 8)   # of ELPV: the prompt, three with a dark area or crack, two good


def pictures() -> tuple[list[np.ndarray], np.ndarray]:
    """Six (300, 300) uint8 solar cells, and the mask of the dark area on the first."""
    from elpv_dataset.utils import load_dataset
    from PIL import Image, ImageDraw
    cells = load_dataset()[0]
    canvas = Image.new("L", (300, 300))
    ImageDraw.Draw(canvas).polygon(icas.DEMO_PROMPT[1], fill=255)
    return [cells[i] for i in CELLS], np.array(canvas) > 0


def outputs() -> dict[str, np.ndarray]:
    """Every tenth pixel of scores and maps, the image scores, the loss parts of one pair."""
    (first, *others), mask = pictures()
    thin = lambda x: np.asarray(x)[5::10, 5::10].astype(np.float32)  # noqa: E731
    dark = icas.encode(anomalies=[(first, mask)])
    found = {f"segment {i}": thin(r.score) for i, r in enumerate(icas.segment(others, dark))}
    clicks = {"points": [(80, 122), (150, 30)], "point_labels": [1, 0]}
    found["segment clicks"] = thin(icas.segment(others[0], **clicks).score)
    detected = icas.detect(others[:4], normals=[others[4]])
    found |= {f"detect {i}": thin(r.map) for i, r in enumerate(detected)}
    scores = [r.score for r in detected] + [detected[0].threshold]
    found["detect scores"] = np.array(scores, dtype=np.float32)
    found["pair_loss"] = pair_loss(first, mask)
    return found


def pair_loss(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Loss parts of one pair: the first cell prompts, its mirror image is the target."""
    model, (marked, mirrored) = icas.load(), (torch.from_numpy(m.copy())[None].float()
                                              for m in (mask, mask[:, ::-1]))
    sides = [torch.stack([share, 1 - share], dim=1)[None]
             for share in (icas.token_share(marked, n, n) for n in (28, 49))]
    fine = icas.token_share(mirrored, 112, 112)
    pixels = torch.from_numpy(picture / 255).float().expand(1, 3, -1, -1)
    pixels = F.interpolate(pixels, size=(392, 392), mode="bicubic", antialias=True).clamp(0, 1)
    seen, target = model.describe(pixels), model.describe(pixels.flip(3))
    truths = [icas.Truths(torch.cat([fine, 1 - fine]), torch.tensor([0, 1]))]
    batch = icas.Batch(target, seen, sides, truths)
    with torch.no_grad():
        parts = icas.pair_loss(model, batch, torch.Generator().manual_seed(0))
    return np.array([parts[k] for k in sorted(parts)], dtype=np.float32)


def differences() -> dict[str, float]:
    """Output -> largest absolute difference from the kept one; infinite if missing or misshapen."""
    kept, now = dict(np.load(FILE)), outputs()
    same = {k for k in kept.keys() & now.keys() if kept[k].shape == now[k].shape}
    return {k: float(np.abs(kept[k] - now[k]).max()) if k in same else np.inf
            for k in sorted(kept.keys() | now.keys())}


def test_outputs_are_those_kept_on_file():
    pytest.importorskip("elpv_dataset")
    far = {k: d for k, d in differences().items() if not d <= 0.05}   # NaN is far too
    assert not far, f"further than rounding from golden.npz: {far}"


def test_the_kept_file_is_small():
    assert FILE.stat().st_size < 100_000


if __name__ == "__main__":
    if "--write" in sys.argv:
        np.savez_compressed(FILE, **outputs())
    found = differences()
    print("\n".join(f"{k:<16} {d:.2e}" for k, d in found.items()))
    print("equal bits" if not any(found.values()) else "different")
