import numpy as np
import pytest
import torch

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
