"""load(encoder=FILE): any released DINOv2, in Meta's, transformers' and timm's layout.

The weights are random, the names and shapes those of the releases.
"""
import dataclasses
import warnings

import numpy as np
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file

import icas

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
MASK = np.zeros((40, 40), bool)
MASK[10:20, 10:20] = True


@pytest.fixture(autouse=True)
def detail_file(tiny, tmp_path_factory, monkeypatch):
    """The frozen small net of the tiny model stands for the shipped file."""
    from conftest import keep_detail
    keep_detail(tiny, tmp_path_factory.mktemp("detail") / "detail.safetensors", monkeypatch)


def random_state(name):
    """Random weights under Meta's names, float16, and the `mask_token` that Meta's files hold."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in icas.Encoder(name).state_dict().items()}
    seeded = torch.Generator().manual_seed(len(shapes))
    noise = torch.randn(8_000_000, generator=seeded).half() * 0.05
    state = {k: noise[i:i + shape.numel()].reshape(shape).clone()
             for i, (k, shape) in enumerate(shapes.items())}
    return state | {"mask_token": torch.zeros(1, shapes["cls_token"][-1])}


def transformers_names(state):
    """Meta's names -> those that `save_pretrained` of transformers 4 writes."""
    parts = {"attn.proj": "attention.output.dense", "ls1.gamma": "layer_scale1.lambda1",
             "ls2.gamma": "layer_scale2.lambda1", "patch_embed.proj":
             "embeddings.patch_embeddings.projection", "pos_embed":
             "embeddings.position_embeddings", "cls_token": "embeddings.cls_token", "mask_token":
             "embeddings.mask_token", "register_tokens": "embeddings.register_tokens"}
    named = {}
    for key, value in state.items():
        for ours, theirs in parts.items():
            key = key.replace(ours, theirs)
        key = key.replace("blocks.", "encoder.layer.")
        key = "layernorm." + key[5:] if key.startswith("norm.") else key
        if ".attn.qkv." in key:
            for part, third in zip(("query", "key", "value"), value.chunk(3)):
                named[key.replace("attn.qkv", f"attention.attention.{part}")] = third.contiguous()
        else:
            named[key] = value
    return named


def timm_names(state):
    state = {k.replace("register_tokens", "reg_token"): v for k, v in state.items()
             if k != "mask_token"}
    if "reg_token" in state:  # timm adds positions to patches alone
        state["pos_embed"] = state["pos_embed"][:, 1:].contiguous()
    return state


def write(state, layout, folder):
    """A file of one of the three layouts. returns its path."""
    if layout == "meta":
        torch.save(state, folder / "dinov2_pretrain.pth")
        return folder / "dinov2_pretrain.pth"
    named = transformers_names(state) if layout == "transformers" else timm_names(state)
    save_file(named, folder / "model.safetensors")
    return folder / "model.safetensors"


def load(path):
    """The model on `path`, at a small input size; loading warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = icas.load(encoder=path, device="cpu")
    model.config = model.decoder.config = dataclasses.replace(model.config, image_size=56, debias=2)
    return model


@pytest.fixture(scope="module")
def states():
    kept = {}

    def state(name):
        if name not in kept:
            kept.clear()  # one at a time: ViT-L has 300 million weights
            kept[name] = random_state(name)
        return kept[name]
    return state


LAYOUTS = ("meta", "transformers", "timm")
SIZES = {"vits14-reg": (384, 12, 6), "vitb14": (768, 12, 12), "vitl14": (1024, 24, 16)}


@pytest.mark.parametrize("name, layout", [(n, k) for n in SIZES for k in LAYOUTS])
def test_any_released_dinov2_detects_and_segments(states, name, layout, tmp_path):
    state = states(name)
    path = write(state, layout, tmp_path)
    model = load(path)
    path.unlink()
    width, depth, heads = SIZES[name]
    assert model.config.encoder == name and not model.training
    assert model.encoder.cls_token.shape[-1] == width and len(model.encoder.blocks) == depth
    assert model.encoder.blocks[0].attn.heads == heads
    assert max(model.config.blocks) == depth
    # every weight is where it was: that of timm with registers adds the class token's place to it
    own = model.encoder.state_dict()
    assert own.keys() == state.keys() - {"mask_token"}
    for key in own:
        theirs = state[key].float()
        if layout == "timm" and key == "pos_embed" and "reg" in name:
            assert not own[key][:, 0].any()
            own[key], theirs = own[key][:, 1:], theirs[:, 1:]
        assert torch.equal(own[key], theirs), key
    good = icas.encode(normals=[IMAGE], turns=False, model=model)
    found = icas.detect(255 - IMAGE, good, parts=True, model=model)
    assert np.isfinite(found.map).all() and found.map.shape == (40, 40) and found.score > 0
    assert any(part.startswith("block") for part in found.parts)
    marked = icas.encode([(IMAGE, MASK)], turns=False, model=model)
    found = icas.segment(255 - IMAGE, marked, parts=True, model=model)
    assert found.score.shape == (40, 40) and np.isfinite(found.score).all()
    assert {"S_s", "S_s mfm", "novelty"} <= set(found.parts)   # the shipped decoder goes with it
    trained = icas.load(device="cpu").decoder.state_dict()
    assert all(torch.equal(v, trained[k]) for k, v in model.decoder.state_dict().items())


def tiny_file(path, seed=0, name="tiny14"):
    torch.manual_seed(seed)
    torch.save({k: torch.randn_like(v) * 0.05 for k, v in icas.Encoder(name).state_dict().items()},
               path)
    return path


def test_with_another_encoder_clicks_boxes_masks_and_good_parts_work_too(tmp_path):
    model = load(tiny_file(tmp_path / "a.pth"))
    for given in ({"points": [(9, 9), (30, 30)], "point_labels": [1, 0]}, {"mask": MASK},
                  {"boxes": [(3, 3, 20, 20)]}, {"normals": [IMAGE]},
                  {"anomalies": [(IMAGE, MASK, "a"), (IMAGE, ~MASK, "b")]}):
        found = icas.segment(255 - IMAGE, model=model, **given)
        assert np.isfinite(found.score).all() and 0 <= found.score.min() <= found.score.max() <= 1


def test_matching_finds_the_marked_spot_of_the_picture_itself_again(tmp_path):
    model = load(tiny_file(tmp_path / "a.pth"))
    score = icas.segment(IMAGE, anomalies=[(IMAGE, MASK)], model=model).score
    assert score[12:18, 12:18].min() > 2 * score[:, 30:].max()


def test_the_file_decides_which_references_fit(tmp_path):
    one = load(tiny_file(tmp_path / "a.pth"))
    other = load(tiny_file(tmp_path / "b.pth", seed=1))
    again = load(tmp_path / "a.pth")
    assert one.encoder_sha256 == again.encoder_sha256 == icas.sha256(tmp_path / "a.pth")
    references = icas.encode([(IMAGE, MASK)], model=one)
    np.testing.assert_array_equal(*(icas.segment(IMAGE, references, model=m).score
                                    for m in (one, again)))
    with pytest.raises(ValueError, match="references: made with"):
        icas.segment(IMAGE, references, model=other)


def test_a_decoder_that_reads_features_goes_with_its_own_encoder_alone(checkpoint, tmp_path):
    encoder = checkpoint.with_name("encoder.safetensors")
    assert icas.load(checkpoint, encoder=encoder, device="cpu").config.features
    other = tiny_file(tmp_path / "other.pth")
    with pytest.raises(ValueError) as caught:
        icas.load(checkpoint, encoder=other, device="cpu")
    said = str(caught.value)
    assert said.startswith(f"encoder: '{other}' has SHA-256 {icas.sha256(other)}")
    assert icas.sha256(encoder) in said and "train.py --encoder" in said


# ---- files of other nets -------------------------------------------------------------------------


def of_detail(tiny, folder):
    save_file(load_file(icas.DETAIL), folder / "x.safetensors")
    return folder / "x.safetensors"


def of_another_net(tiny, folder):
    state = {"conv1.weight": torch.zeros(3), "layer1.0.bn1.bias": torch.zeros(1)}
    torch.save(state, folder / "x.pth")
    return folder / "x.pth"


def of_a_whole_module(tiny, folder):
    torch.save(torch.nn.Linear(2, 2), folder / "x.pth")
    return folder / "x.pth"


def of_a_list(tiny, folder):
    torch.save([torch.zeros(1)], folder / "x.pth")
    return folder / "x.pth"


def of_decoder(tiny, folder):
    icas.save(tiny, folder / "x.safetensors")
    return folder / "x.safetensors"


def of_references(tiny, folder):
    icas.encode([(IMAGE, MASK)], turns=False, model=tiny).save(folder / "x.safetensors")
    return folder / "x.safetensors"


def half(suffix):
    def make(tiny, folder):
        state, path = tiny.encoder.state_dict(), folder / f"x{suffix}"
        torch.save(state, path) if suffix == ".pth" else save_file(state, path)
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
        return path
    return make


def text(suffix):
    def make(tiny, folder):
        (folder / f"x{suffix}").write_text("version https://git-lfs.github.com/spec/v1\n")
        return folder / f"x{suffix}"
    return make


def dinov2_but(**change):
    """A ViT of DINOv2's names that is none: tensors of `change` replaced, or left out if None."""
    def make(tiny, folder):
        state = tiny.encoder.state_dict() | change
        torch.save({k: v for k, v in state.items() if v is not None}, folder / "x.pth")
        return folder / "x.pth"
    return make


OF_DINO = {"pos_embed": torch.zeros(1, 197, 48)} | {
    f"blocks.{i}.ls{n}.gamma": None for i in range(4) for n in (1, 2)}


@pytest.mark.parametrize("make, fragment", [
    (of_detail, "holds no DINOv2"), (of_another_net, "holds no DINOv2"),
    (of_a_list, "expected a state dict"), (of_decoder, "holds no DINOv2"),
    (of_references, "holds no DINOv2"), (of_a_whole_module, "is not a .pth of tensors alone"),
    (half(".pth"), "is not a .pth of tensors alone"),
    (half(".safetensors"), "is not a whole safetensors file"),
    (text(".pth"), "is not a .pth of tensors alone"),
    (text(".safetensors"), "is not a whole safetensors file"),
    (dinov2_but(cls_token=torch.zeros(1, 1, 96)), "has width 96 and 4 blocks; expected one of"),
    (dinov2_but(**{"blocks.4.norm1.weight": torch.zeros(48)}), "has width 48 and 5 blocks"),
    (dinov2_but(**OF_DINO), "weights do not fit"),
    (dinov2_but(**{"norm.bias": None}), "weights do not fit")])
def test_a_file_of_another_net_gives_one_error_that_names_it(tiny, tmp_path, make, fragment):
    path = make(tiny, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ValueError, TypeError)) as caught:
            icas.load(encoder=path, device="cpu")
    message = str(caught.value)
    assert message.startswith("encoder") and fragment in message and path.name in message
    assert "\n" not in message


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    for path in (tmp_path / "no.pth", tmp_path / "no.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="encoder: no file at"):
            icas.load(encoder=path, device="cpu")


def test_names_of_vit_g_are_read_in_all_three_layouts():
    meta = {"cls_token": torch.zeros(1, 1, 1536), "pos_embed": torch.zeros(1, 1370, 1536),
            "blocks.0.mlp.w12.weight": torch.zeros(2, 2), "blocks.0.mlp.w3.bias": torch.ones(2)}
    timm = {k.replace("w12", "fc1").replace("w3", "fc2"): v for k, v in meta.items()}
    assert icas.convert(meta).keys() == icas.convert(timm).keys() == meta.keys()
    assert torch.equal(icas.convert(timm)["blocks.0.mlp.w3.bias"], torch.ones(2))


@pytest.mark.parametrize("registers", [False, True])
def test_the_names_here_are_those_of_a_file_of_transformers(registers, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=48, num_hidden_layers=4, num_attention_heads=3, image_size=518, patch_size=14)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    name = "tiny14-reg" if registers else "tiny14"
    ours = transformers_names(icas.Encoder(name).state_dict() | {"mask_token": torch.zeros(1, 48)})
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    model = load(tmp_path / "model.safetensors")
    assert model.encoder.registers == 4 * registers
    assert torch.equal(model.encoder.norm.weight, theirs["layernorm.weight"])
