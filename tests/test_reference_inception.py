"""The same features as pytorch-fid, torch-fidelity and transformers say, given the same random weights and images.

Skipped where they are not installed; nothing is downloaded. The weights go through a file of torch.save, read without torch.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.evaluation import features
from jaxdiff.models.dino import cubic

torch = pytest.importorskip("torch", reason="a reference implementation; not a dependency")

# A batch of each size is one program of the network, and only the resize differs.
SIZES = [(8, 8), (32, 32), (64, 64), (299, 299), (512, 512), (200, 333)]


def images(*shape, seed=0):
    """Smooth shapes with noise: random weights tell apart images that differ in more than their noise."""
    rng = np.random.default_rng(seed)
    batch, height, width, channels = shape
    rows, columns = np.linspace(0, 1, height)[None, :, None, None], np.linspace(0, 1, width)[None, None, :, None]
    phase = rng.uniform(0, 6, (batch, 1, 1, channels))
    waves = np.sin(phase + 6 * rows * phase) * np.cos(5 * columns * phase) + rng.normal(0, 0.3, shape)
    return (127.5 + 90 * waves).clip(0, 255).astype(np.uint8)


def error(ours, theirs):
    """(the largest error by the largest of an image's features, the rms error by the rms of what tells the images apart)."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape and np.isfinite(theirs).all()
    off, apart = np.abs(ours - theirs), theirs - theirs.mean(axis=0)
    return (off / np.abs(theirs).max(axis=1, keepdims=True)).max(), np.sqrt((off**2).mean() / (apart**2).mean())


def close(ours, theirs):
    largest, apart = error(ours, theirs)
    assert largest < 1e-4 and apart < 1e-3, (largest, apart)


def randomise(module, seed=0):
    """Weights that keep activations alive, and statistics of batch normalisation that are not those of an untrained network."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if value.ndim > 1:
            fan_in = value[0].numel()
            value.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
        elif name.endswith(("running_var", "bn.weight")):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.is_floating_point():
            value.normal_(0, 0.1, generator=generator)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(pytorch-fid's whole network with random weights, the path of its state dict)."""
    module = pytest.importorskip("pytorch_fid.inception", reason="a reference implementation; not a dependency")
    load, module.load_state_dict_from_url = module.load_state_dict_from_url, lambda *args, **kwargs: {}
    strict = torch.nn.Module.load_state_dict
    torch.nn.Module.load_state_dict = lambda self, state: None
    try:
        network = randomise(module.fid_inception_v3())
    finally:
        module.load_state_dict_from_url, torch.nn.Module.load_state_dict = load, strict
    path = tmp_path_factory.mktemp("weights") / features.INCEPTION.file
    torch.save(network.state_dict(), path)
    return network, path


@pytest.mark.slow
def test_inceptions_features_are_pytorch_fids(published, monkeypatch):
    """Its own InceptionV3 with its resize, images of several sizes; sFID's features by a hook, logits by its last layer."""
    module = pytest.importorskip("pytorch_fid.inception")
    network, path = published
    monkeypatch.setattr(module, "fid_inception_v3", lambda: network)
    theirs, ours, spatial = module.InceptionV3([3]), features.inception(path), []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *args: spatial.append(args[2]))
    for i, size in enumerate(SIZES):
        x = images(2, *size, 3, seed=i)
        want = theirs(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255)[0][:, :, 0, 0]
        out = ours.apply(x)
        close(out["pool"], want)
        close(out["logits"], network.fc(want))
        close(out["spatial"], spatial.pop()[:, :7].permute(0, 2, 3, 1).reshape(2, -1))
    assert out["spatial"].shape == (2, 2023)
    grey = images(2, 40, 40, 1)
    want = theirs(torch.from_numpy(grey).permute(0, 3, 1, 2).expand(2, 3, 40, 40).float() / 255)[0][:, :, 0, 0]
    close(ours.apply(grey)["pool"], want)


@pytest.mark.slow
def test_inceptions_features_are_torch_fidelitys_with_tensorflows_resize(published):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="a reference implementation")
    wanted = ["2048", "logits_unbiased", "logits"]
    theirs = module.FeatureExtractorInceptionV3("inception-v3-compat", wanted, feature_extractor_weights_path=str(published[1]))
    ours, other = (features.inception(published[1], resize) for resize in (features.resize_tensorflow, features.resize_pytorch))
    for i, size in enumerate(SIZES):
        x = images(2, *size, 3, seed=i)
        out = ours.apply(x)
        for name, want in zip(("pool", "logits_unbiased", "logits"), theirs(torch.from_numpy(x).permute(0, 3, 1, 2))):
            close(out[name], want)
    assert error(other.apply(x)["logits"], want)[1] > 0.1  # the resize is not a detail
    assert ours.digest != other.digest


@pytest.mark.parametrize("size", [(8, 8), (64, 48), (512, 300)])
def test_the_resizes_are_theirs(size):
    module = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow", reason="a reference implementation")
    x = images(1, *size, 3)
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2).float()
    torchs = torch.nn.functional.interpolate(pixels / 255, (299, 299), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(features.resize_pytorch(jnp.asarray(x)), 2 * torchs.permute(0, 2, 3, 1) - 1, atol=5e-5)
    tensorflows = module.interpolate_bilinear_2d_like_tensorflow1x(pixels, (299, 299), align_corners=False)
    np.testing.assert_allclose(features.resize_tensorflow(jnp.asarray(x)), (tensorflows.permute(0, 2, 3, 1) - 128) / 128, atol=5e-5)


# DINOv2.


@pytest.fixture(scope="module")
def dino():
    """transformers' network, small and random, of as many positions as 224 pixels have: theirs leaves out the rounding guard."""
    transformers = pytest.importorskip("transformers", reason="a reference implementation; not a dependency")
    config = transformers.Dinov2Config(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=224, patch_size=14, attn_implementation="eager"
    )
    network = transformers.Dinov2Model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.named_parameters():
            value.normal_(float(name.endswith(("norm1.weight", "norm2.weight"))), 0.2, generator=generator)
    return network.eval().requires_grad_(False)


def test_dinov2s_class_token_is_transformers(dino, tmp_path):
    dino.save_pretrained(tmp_path)
    made = features.dinov2(tmp_path / "model.safetensors")
    for i, size in enumerate([(32, 32), (300, 200)]):
        x = images(2, *size, 3, seed=i)
        seen = torch.from_numpy(np.array(features.resize_pillow(jnp.asarray(x)))).permute(0, 3, 1, 2)
        close(made.apply(x)["pool"], dino(seen).pooler_output)
    fused = {}
    for name, a in dino.state_dict().items():  # Meta's file has one map for queries, keys and values
        for old, new in (
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.", ""),
            ("encoder.layer.", "blocks."),
            ("attention.o_proj", "attn.proj"),
            ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"),
            ("layernorm.", "norm."),
        ):
            name = name.replace(old, new)
        fused[name] = a
    for i in range(3):
        for kind in ("weight", "bias"):
            each = [fused.pop(f"blocks.{i}.attention.{part}_proj.{kind}") for part in "qkv"]
            fused[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(each)
    torch.save(fused, tmp_path / "meta.pth")
    meta = features.dinov2(tmp_path / "meta.pth")
    assert meta.digest == made.digest
    np.testing.assert_array_equal(meta.apply(x)["pool"], made.apply(x)["pool"])


@pytest.mark.parametrize("side", [16, 20, 50])
def test_places_on_another_grid_are_torchs_with_metas_scale(side):
    learned = torch.randn((1, 5, 37, 37), generator=torch.Generator().manual_seed(0))
    scale = (side + 0.1) / 37
    want = torch.nn.functional.interpolate(learned, scale_factor=(scale, scale), mode="bicubic")
    assert want.shape[-2:] == (side, side)
    weights = cubic(37, side, scale)
    got = np.einsum("in,jm,bcnm->bcij", weights, weights, learned.numpy().astype(np.float64))
    np.testing.assert_allclose(got, want, atol=1e-4)
