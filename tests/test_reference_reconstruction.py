"""PSNR and SSIM against scikit-image."""

import numpy as np
import pytest

from jaxdiff.evaluation import reconstruction

metrics = pytest.importorskip("skimage.metrics", reason="needs scikit-image")


def pairs(channels):
    """Noise, a smooth picture with noise of several strengths, and nearly flat images, where variances lose digits."""
    random = np.random.default_rng(0)
    x = [random.integers(0, 256, (40, 33, channels))]
    smooth = 127 + 100 * np.sin(np.arange(40)[:, None, None] / 6) * np.cos(np.arange(33)[None, :, None] / 5)
    x += [np.broadcast_to(smooth, (40, 33, channels))] * 3 + [np.full((40, 33, channels), 250)]
    y = [each + random.normal(size=each.shape) * noise for each, noise in zip(x, (40, 2, 10, 60, 1))]
    return [np.clip(np.round(np.stack(each)), 0, 255).astype(np.uint8) for each in (x, y)]


@pytest.mark.parametrize("channels", [1, 3])
def test_both_are_scikit_images(channels):
    x, y = pairs(channels)
    ssim = [
        metrics.structural_similarity(
            a, b, data_range=255, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in zip(x, y)
    ]
    psnr = [metrics.peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(x, y)]
    np.testing.assert_allclose(reconstruction.psnr(x, y), psnr, rtol=1e-5)
    np.testing.assert_allclose(reconstruction.ssim(x, y), ssim, atol=2e-5)
    assert min(ssim) < 0.6 and max(ssim) > 0.9
