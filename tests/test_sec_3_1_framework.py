"""Sec. 3.1: encoder, mask pooling, debiasing, decoder. Expected values come from transformers,
NumPy loops or printed formulas."""
import dataclasses
import types

import numpy as np
import pytest
import torch
from conftest import TINY

import icas


def theirs(registers: bool, **change):
    transformers = pytest.importorskip("transformers")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    shape = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=3, image_size=518,
                 patch_size=14, **change)
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**shape))
    with torch.no_grad():
        for p in model.parameters():  # their start is all but zero; these make every part count
            p.copy_(torch.randn_like(p) * 0.08)
    return model.eval()


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("size", [(518, 518), (140, 140), (84, 140)])
def test_encoder_equals_transformers_with_the_same_weights(registers, size):
    model = theirs(registers)
    ours = icas.Encoder("tiny14-reg" if registers else "tiny14").eval()
    ours.load_state_dict(icas.convert(model.state_dict()))
    if not registers and size != (518, 518):
        # transformers resizes positions to the exact size, Meta's own code to (h0 + 0.1) / 37
        model.embeddings.interpolate_pos_encoding = types.MethodType(
            lambda self, x, h, w: torch.cat([self.position_embeddings[:, :1],
                                             ours.positions(h // 14, w // 14)], dim=1),
            model.embeddings)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(x).reshape(3, 1, 1) for x in (icas.MEAN, icas.STD))
    with torch.no_grad():
        states = model((images - mean) / std, output_hidden_states=True).hidden_states
        for block, got in zip((2, 4), ours(images, (2, 4)), strict=True):   # after the final norm
            expected = model.layernorm(states[block])[:, 5 if registers else 1:]
            np.testing.assert_allclose(got.flatten(2).mT.numpy(), expected.numpy(), atol=1e-4)


def test_the_feed_forward_net_of_vit_g_equals_transformers(monkeypatch, tmp_path):
    monkeypatch.setitem(icas.ENCODERS, "vitg_tiny", (48, 4, 3))
    model, ours = theirs(False, use_swiglu_ffn=True), icas.Encoder("vitg_tiny").eval()
    model.save_pretrained(tmp_path)  # version 5 has other names in memory than in its files
    ours.load_state_dict(icas.convert(tmp_path / "model.safetensors"))
    assert isinstance(ours.blocks[0].mlp, icas.SwiGLU)
    images = torch.rand(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(x).reshape(3, 1, 1) for x in (icas.MEAN, icas.STD))
    with torch.no_grad():
        expected = model((images - mean) / std).last_hidden_state[:, 1:]
        got = ours(images, (4,))[-1].flatten(2).transpose(1, 2)
    np.testing.assert_allclose(got.numpy(), expected.numpy(), atol=1e-4)


def cubic(values: np.ndarray, size: int) -> np.ndarray:
    """Bicubic resize (a = -0.75, borders repeated) of axis 0 by Meta's factor (size + 0.1) / n."""
    n, out = len(values), np.zeros((size, *values.shape[1:]))
    for i in range(size):
        at = (i + 0.5) * n / (size + 0.1) - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            d = abs(at - j)
            near = 1.25 * d ** 3 - 2.25 * d ** 2 + 1
            weight = near if d <= 1 else -0.75 * (d ** 3 - 5 * d ** 2 + 8 * d - 4)
            out[i] += weight * values[min(max(j, 0), n - 1)]
    return out


def test_positions_are_resized_as_meta_s_code_does_it_and_not_at_all_at_518_pixels():
    encoder = icas.Encoder("tiny14")
    grid = encoder.pos_embed[0, 1:].double().numpy().reshape(37, 37, 48)
    expected = cubic(cubic(grid, 6).swapaxes(0, 1), 45).swapaxes(0, 1)
    got = encoder.positions(6, 45)[0].numpy().reshape(6, 45, 48)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert torch.equal(encoder.positions(37, 37), encoder.pos_embed[:, 1:])


def test_timm_s_layout_of_a_register_model_is_read():
    ours = icas.Encoder("tiny14-reg")
    state = ours.state_dict()
    timm = {k.replace("register_tokens", "reg_token"): v for k, v in state.items()}
    back = icas.convert(timm | {"pos_embed": state["pos_embed"][:, 1:]})
    assert back.keys() == state.keys() and not back["pos_embed"][:, 0].any()
    assert torch.equal(back["pos_embed"][:, 1:], state["pos_embed"][:, 1:])


def test_vit_l_has_the_paper_s_322_m_parameters():
    with torch.device("meta"):
        model = icas.ICAS(icas.Config(encoder="vitl14", detail=False))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(322e6, rel=0.01)


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
    basis = icas.positional_basis(tiny.encoder, (6, 8), tiny.config)[0]
    np.testing.assert_allclose((basis.T @ basis).numpy(), np.eye(4), atol=1e-5)
    tokens = icas.unit_tokens(torch.from_numpy(rng.normal(size=(2, 48, 6, 8))).float(), basis)
    np.testing.assert_allclose((tokens @ basis).numpy(), 0, atol=1e-6)
    np.testing.assert_allclose(tokens.norm(dim=-1).numpy(), 1, atol=1e-6)


def test_the_basis_spans_what_differs_most_between_the_tokens_of_empty_pictures(tiny):
    encoder = tiny.encoder
    got = icas.positional_basis(encoder, (6, 8), tiny.config)[1]
    noise = torch.rand(3, 3, 84, 112, generator=torch.Generator().manual_seed(0))
    images = torch.cat([torch.full((1, 3, 84, 112), 0.5), noise])
    tokens = encoder(images, (3,))[0].permute(0, 2, 3, 1).reshape(-1, 48).double().numpy()
    axes = np.linalg.svd(tokens - tokens.mean(axis=0), full_matrices=False)[2][:4]
    overlap = np.linalg.svd(axes @ got.double().numpy())[1]  # cosines of the angles between both
    np.testing.assert_allclose(overlap, 1, atol=1e-4)


def test_tokens_of_a_model_are_without_the_basis_of_their_grid_which_is_made_once(rng, monkeypatch):
    torch.manual_seed(0)
    model, made, make = icas.ICAS(icas.Config(**TINY)).eval(), [], icas.positional_basis
    monkeypatch.setattr(icas, "positional_basis", lambda *a: made.append(a[1]) or make(*a))
    grids = [(6, 8), (8, 6), (6, 8)]
    for h0, w0 in grids:
        maps = torch.from_numpy(rng.normal(size=(2, 3 * 48, h0, w0))).float()
        bases = make(model.encoder, (h0, w0), model.config)
        for x, basis, part in zip(model.tokens(maps), bases, maps.split(48, dim=1), strict=True):
            assert torch.equal(x, icas.unit_tokens(part, basis))
    assert made == grids[:2] and len(model.kept) == 2


def test_a_model_of_another_config_does_not_keep_its_bases(rng):
    torch.manual_seed(0)
    model = icas.ICAS(icas.Config(**TINY)).eval()
    maps = torch.from_numpy(rng.normal(size=(1, 3 * 48, 6, 8))).float()
    for debias in (4, 2, 0, 4):
        model.config = dataclasses.replace(model.config, debias=debias)
        fresh = icas.ICAS(model.config).eval()
        fresh.load_state_dict(model.state_dict())
        for one, other in zip(model.tokens(maps), fresh.tokens(maps), strict=True):
            assert torch.equal(one, other)


def test_token_grids_keep_area_and_aspect():
    config = icas.Config()
    assert icas.token_grid(518, 518, config) == (37, 37)
    h0, w0 = icas.token_grid(1260, 500, config)
    assert abs(h0 * w0 / 37 ** 2 - 1) < 0.05 and abs(h0 / w0 / 2.52 - 1) < 0.05


def pairs(model, grid=8, batch=2, seed=0):
    make = torch.Generator().manual_seed(seed)
    width = model.encoder.cls_token.shape[-1] * len(model.config.blocks)
    fine = 14 * grid // 8
    foreground, truth = torch.zeros(batch, grid, grid), torch.zeros(4 * grid, 4 * grid)
    foreground[:, 2:4, 2:5], truth[8:16, 8:20] = 1, 1
    truths = [icas.Truths(torch.stack([truth, 1 - truth]), torch.tensor([0, 1]))] * batch
    features = lambda: icas.Features(*(torch.randn(batch, *shape, generator=make)  # noqa: E731
                                       for shape in ((width, grid, grid), (280, *2 * [fine]))))
    sides = [torch.stack([x, 1 - x], dim=1)[:, None] for x in (
        foreground, icas.token_share(foreground, fine, fine))]
    return icas.Batch(features(), features(), sides, truths)


@pytest.mark.parametrize("change", [
    {}, {"learned_queries": True}, {"debias": 0}, {"correspondence": False}, {"plain_sum": True},
    {"blocks": (4,)}, {"detail": False}, {"features": False}])
def test_every_form_of_the_paper_runs_and_learns(change):
    torch.manual_seed(0)
    model = icas.ICAS(icas.Config(**TINY | change))
    loss = sum(icas.pair_loss(model, pairs(model), torch.Generator().manual_seed(0)).values())
    loss.backward()
    unused = [n for n, p in model.decoder.named_parameters() if p.grad is None]
    assert torch.isfinite(loss) and not unused


def test_without_correspondence_no_relation_map_is_computed(monkeypatch):
    def never(*_):
        raise AssertionError("computed for nothing")
    monkeypatch.setattr(icas, "relations", never)
    model = icas.ICAS(icas.Config(**TINY | {"correspondence": False})).eval()
    assert not any("relation" in name for name, _ in model.decoder.named_parameters())
    losses = icas.pair_loss(model, pairs(model), torch.Generator().manual_seed(0))
    assert losses.keys() == {"target", "other", "mask"} and losses["mask"] > 0
    image, mask = np.zeros((40, 40, 3), np.uint8), np.eye(40, dtype=bool)
    for given in ({"anomalies": [(image, mask)], "normals": [image]}, {"points": [(3, 3)]}):
        found = icas.segment(image, model=model, parts=True, **given)
        assert np.isfinite(found.score).all()
    with pytest.raises(AssertionError, match="for nothing"):  # the names are those that are used
        whole = icas.ICAS(icas.Config(**TINY))
        icas.pair_loss(whole, pairs(whole), torch.Generator())
