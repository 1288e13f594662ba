"""Sec. 3.1: encoder, mask pooling, debiasing, decoder. Expected values come from transformers, NumPy loops or printed formulas."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import icas


def theirs(registers: bool):
    transformers = pytest.importorskip("transformers")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    shape = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=3, image_size=518, patch_size=14)
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**shape)).eval()
    with torch.no_grad():
        for p in model.parameters():  # their start is all but zero; these make every part count
            p.copy_(torch.randn_like(p) * 0.08)
    return model


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("size", [(518, 518), (140, 140), (84, 140)])
def test_encoder_equals_transformers_with_the_same_weights(registers, size):
    model = theirs(registers)
    name = "tiny14-reg" if registers else "tiny14"
    # transformers resizes positions to the exact size, Meta's own code to (h0 + 0.1) / 37
    ours = icas.Encoder(name, position_offset=0.0).eval()
    ours.load_state_dict(icas.convert(model.state_dict()))
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    normal = (images - torch.tensor(icas.MEAN).reshape(3, 1, 1)) / torch.tensor(icas.STD).reshape(3, 1, 1)
    with torch.no_grad():
        expected = model(normal).last_hidden_state[:, 5 if registers else 1:]
        got = ours(images, (2, 4))[-1].flatten(2).transpose(1, 2)
    np.testing.assert_allclose(got.numpy(), expected.numpy(), atol=1e-4)


def test_timm_s_layout_of_a_register_model_is_read():
    ours = icas.Encoder("tiny14-reg")
    state = ours.state_dict()
    timm = {k.replace("register_tokens", "reg_token"): v for k, v in state.items()} | {"pos_embed": state["pos_embed"][:, 1:]}
    back = icas.convert(timm)
    assert back.keys() == state.keys() and not back["pos_embed"][:, 0].any()


def test_vit_l_has_the_paper_s_322_m_parameters():
    with torch.device("meta"):
        model = icas.ICAS(icas.Config(encoder="vitl14"))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(321.6e6, rel=0.005)


def test_mask_pool_is_the_mean_under_the_mask(rng):
    features, masks = rng.normal(size=(2, 12, 5)), (rng.random((2, 6, 12)) > 0.5).astype(float)
    masks[0, 0] = 0
    expected = np.zeros((2, 6, 5))
    for b, n in np.ndindex(2, 6):
        if masks[b, n].any():
            expected[b, n] = features[b][masks[b, n] > 0].mean(axis=0)
    got = icas.mask_pool(torch.from_numpy(features), torch.from_numpy(masks))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_an_empty_mask_has_no_gradient_however_steep_the_loss():
    features, masks = torch.randn(1, 12, 5, requires_grad=True), torch.zeros(1, 2, 12)
    masks[0, 0, :3] = 1
    (1e6 * icas.mask_pool(features, masks)).sum().backward()
    assert torch.isfinite(features.grad).all() and (features.grad[0, 3:] == 0).all()


@pytest.mark.parametrize("at", [(0, 0), (499, 699), (13, 357)])
def test_a_mask_of_one_pixel_keeps_a_share(at):
    mask = torch.zeros(1, 500, 700)
    mask[0, at[0], at[1]] = 1
    assert icas.token_share(mask, 28, 39).max() > 0


def test_debiased_tokens_are_unit_and_have_no_component_in_the_basis(tiny, rng):
    basis = tiny.bases(6, 8)[0]
    np.testing.assert_allclose((basis.T @ basis).numpy(), np.eye(4), atol=1e-5)
    tokens = icas.unit_tokens(torch.from_numpy(rng.normal(size=(2, 48, 6, 8))).float(), basis)
    np.testing.assert_allclose((tokens @ basis).numpy(), 0, atol=1e-6)
    np.testing.assert_allclose(tokens.norm(dim=-1).numpy(), 1, atol=1e-6)


def test_token_grids_keep_area_and_aspect():
    config = icas.Config()
    assert icas.token_grid(518, 518, config) == (37, 37)
    h0, w0 = icas.token_grid(1260, 500, config)
    assert abs(h0 * w0 / 37 ** 2 - 1) < 0.05 and abs(h0 / w0 / 2.52 - 1) < 0.05


def pairs(model, grid=8, batch=2, seed=0):
    make = torch.Generator().manual_seed(seed)
    width = model.encoder.cls_token.shape[-1] * len(model.config.blocks)
    foreground, truth = torch.zeros(batch, grid, grid), torch.zeros(4 * grid, 4 * grid)
    foreground[:, 2:4, 2:5], truth[8:16, 8:20] = 1, 1
    truths = [icas.Truths(torch.stack([truth, 1 - truth]), torch.tensor([0, 1]))] * batch
    rand = lambda *shape: torch.randn(*shape, generator=make)  # noqa: E731
    shares = [F.interpolate(x[:, None], scale_factor=4)[:, 0] for x in (foreground, 1 - foreground)]
    moments = icas.pixel_moments(torch.rand(batch, 3, 8 * grid, 8 * grid, generator=make), *shares)
    return icas.Batch(icas.Features(rand(batch, width, grid, grid), torch.rand(batch, 3, 8 * grid, 8 * grid, generator=make)),
                      rand(batch, 1, width, grid, grid), foreground[:, None], 1 - foreground[:, None], moments, torch.zeros(batch), truths)


@pytest.mark.parametrize("change", [{}, {"learned_queries": True}, {"debias": 0}, {"correspondence": False}, {"blocks": (4,)},
                                    {"masked_attention": True}, {"prompt_attends": False}, {"separate_ffn": False}, {"plain_sum": True}])
def test_every_form_of_the_paper_runs_and_learns(change):
    base = dict(encoder="tiny14", image_size=112, blocks=(2, 3, 4), debias=4, queries=12, dim=32, heads=4, layers=2, ffn_dim=64, pixel_dim=16,
                relation_dim=16)
    torch.manual_seed(0)
    model = icas.ICAS(icas.Config(**base | change))
    loss = sum(icas.pair_loss(model, pairs(model), torch.Generator().manual_seed(0)).values())
    loss.backward()
    unused = [n for n, p in model.decoder.named_parameters() if p.grad is None]
    assert torch.isfinite(loss) and not unused
