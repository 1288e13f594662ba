import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import icas

icas.ENCODERS["tiny14"] = (48, 4, 3)  # a real layout, small enough for random weights

TINY = dict(encoder="tiny14", image_size=112, blocks=(2, 3, 4), debias=4, queries=12,
            dim=32, heads=4, layers=2, ffn_dim=64, pixel_dim=16, relation_dim=16)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny():
    torch.manual_seed(0)
    model = icas.ICAS(icas.Config(**TINY)).eval().requires_grad_(False)
    model.encoder_sha256 = "tiny"
    return model


@pytest.fixture
def checkpoint(tiny, tmp_path, monkeypatch):
    """Path of the tiny checkpoint, in a folder of its own with both its encoders."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(tiny.encoder.state_dict(), folder / "encoder.safetensors")
    keep_detail(tiny, folder / "detail.safetensors", monkeypatch)
    monkeypatch.setattr(tiny, "encoder_sha256", icas.sha256(folder / "encoder.safetensors"))
    icas.save(tiny, folder / "tiny.safetensors", training={"steps": 0})
    return folder / "tiny.safetensors"


def keep_detail(model, path, monkeypatch):
    """Write a model's detail weights and let `load` take them for the shipped ones."""
    state = model.detail.state_dict()
    save_file({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    monkeypatch.setattr(icas, "DETAIL", str(path))  # a whole path wins over the folders searched


# ---- the command line ----------------------------------------------------------------------------

DEFECT = ["--anomaly", "defect.png", "mask.png"]


@pytest.fixture
def model(checkpoint, tmp_path, monkeypatch):
    """The tiny checkpoint by a relative path: the working folder is tmp_path."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return str(checkpoint.relative_to(tmp_path))


@pytest.fixture
def parts(rng, tmp_path):
    """Four parts, one defect with its mask, two good parts. returns the parts' names in a run."""
    for folder in ("parts/deep", "good"):
        (tmp_path / folder).mkdir(parents=True)
    square = ("parts/a", "parts/deep/d", "defect", "good/1", "good/2")
    sizes = dict.fromkeys(square, (40, 40)) | {"parts/b": (30, 44), "parts/c": (44, 30)}
    for name, shape in sizes.items():
        noise = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
    mask = np.zeros((40, 40), np.uint8)
    mask[10:20, 10:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "parts" / "._a.png").write_text("macOS")
    return ["a.png", "b.png", "c.png", "deep/d.png"]


def icas_main(*arguments, model):
    return icas.main([*map(str, arguments), "--model", model, "--device", "cpu"])


def lines(out="out"):
    return [json.loads(line) for line in Path(out, "results.jsonl").read_text().splitlines()]


def timeless(records):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def read(path):
    return np.array(Image.open(path))


def run_json(out="out"):
    return json.loads(Path(out, "run.json").read_text())


def forbid(monkeypatch, *names):
    """Let functions of icas fail a test that calls them."""
    for name in names:
        def fail(*a, name=name, **k):
            pytest.fail(f"icas.{name} was called")
        monkeypatch.setattr(icas, name, fail)


def middle_threshold(model):
    """A threshold at which an untrained model marks something and not everything."""
    loaded = icas.load(model, device="cpu")
    references = icas.encode([("defect.png", "mask.png")], model=loaded)
    found = icas.segment("parts/a.png", references, model=loaded)
    return str(round(float(np.median(found.score)), 4))
