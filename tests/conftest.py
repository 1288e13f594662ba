import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import icas

icas.ENCODERS["tiny14"] = (48, 4, 3)  # a real layout, small enough for random weights

TINY = dict(encoder="tiny14", image_size=112, blocks=(2, 3, 4), matched=(3,), debias=4, queries=12,
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
