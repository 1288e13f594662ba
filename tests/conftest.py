import numpy as np
import pytest
import torch

from safetensors.torch import save_file

import icas

icas.ENCODERS["tiny14"] = (48, 4, 3)  # a real layout, small enough for random weights


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny():
    torch.manual_seed(0)
    model = icas.ICAS(icas.Config(encoder="tiny14", image_size=112, blocks=(2, 3, 4), debias=4, queries=12, dim=32, heads=4, layers=2,
                                  ffn_dim=64, pixel_dim=16, relation_dim=16)).eval().requires_grad_(False)
    model.encoder_sha256 = "tiny"
    return model


@pytest.fixture
def checkpoint(tiny, tmp_path, monkeypatch):
    """Path of the tiny checkpoint, in a folder of its own with its encoder."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(tiny.encoder.state_dict(), folder / "encoder.safetensors")
    monkeypatch.setattr(tiny, "encoder_sha256", icas._sha256(folder / "encoder.safetensors"))
    icas.save(tiny, folder / "tiny.safetensors", training={"steps": 0})
    return folder / "tiny.safetensors"
