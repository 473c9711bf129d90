"""Distances of the same features: equal to pytorch-fid's, torch-fidelity's, clean-fid's and prdc's."""

import numpy as np
import pytest

from jaxdiff.evaluation import distances

torch = pytest.importorskip("torch", reason="compares with published metrics, which need PyTorch")


@pytest.fixture(scope="module", autouse=True)
def torchvision():
    """Beside a PyTorch without CUDA, torchvision's operators may not load, which none of these metrics use."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        return pytest.importorskip("torchvision", reason="pytorch-fid, torch-fidelity and clean-fid need torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        return torchvision


def package(name):
    return pytest.importorskip(name, reason=f"compares with {name.split('.')[0]}")


def features(n, d=64, seed=0, shift=0.0):
    """Like a network's: not negative, correlated, many zeros; float64 of float32 values, so that all compute in float64."""
    random = np.random.default_rng(seed)
    mix = np.random.default_rng(9).normal(size=(d, d)) / np.sqrt(d)
    return np.maximum(random.normal(size=(n, d)) @ mix + shift, 0).astype(np.float32).astype(np.float64)


SAMPLES, REFERENCE = features(700, seed=1, shift=0.3), features(900, seed=2, shift=0.1)


def test_frechet_equals_pytorch_fid_clean_fid_and_torch_fidelity():
    ours = distances.frechet(distances.moments(SAMPLES), distances.moments(REFERENCE))
    both = [s for x in (SAMPLES, REFERENCE) for s in (x.mean(0), np.cov(x, rowvar=False))]
    assert ours > 1
    for name in ("pytorch_fid.fid_score", "cleanfid.fid"):
        module = package(name)
        theirs = getattr(module, "calculate_frechet_distance", None) or module.frechet_distance
        assert ours == pytest.approx(theirs(*both), rel=1e-6), name
    fidelity = package("torch_fidelity.metric_fid")
    statistics = [fidelity.fid_features_to_statistics(torch.tensor(x)) for x in (SAMPLES, REFERENCE)]
    found = fidelity.fid_statistics_to_metric(*statistics, verbose=False)
    assert ours == pytest.approx(found["frechet_inception_distance"], rel=1e-6)


def test_the_kernel_distance_equals_torch_fidelitys_with_its_subsets_and_clean_fids_on_whole_sets():
    fidelity = package("torch_fidelity.metric_kid")
    settings = {"kid_subsets": 20, "kid_subset_size": 300, "rng_seed": 2020, "verbose": False}
    theirs = fidelity.kid_features_to_metric(
        torch.tensor(SAMPLES), torch.tensor(REFERENCE), kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1, **settings,
    )  # fmt: skip
    ours = distances.kernel_distance(SAMPLES, REFERENCE, subsets=20, size=300)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert ours.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6)
    whole = package("cleanfid.fid").kernel_distance(REFERENCE[:700], SAMPLES, num_subsets=1)
    assert distances.kernel_distance(SAMPLES, REFERENCE[:700]).mean == pytest.approx(whole, rel=1e-6)


def test_the_inception_score_equals_torch_fidelitys():
    fidelity = package("torch_fidelity.metric_isc")
    logits = 3 * np.random.default_rng(0).normal(size=(1003, 20))
    theirs = fidelity.isc_features_to_metric(torch.tensor(logits), 10, True, 2020)
    mean, std = distances.inception_score(logits)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert std == pytest.approx(theirs["inception_score_std"], rel=1e-6)


def test_precision_and_recall_equal_torch_fidelitys_and_prdcs_and_so_do_density_and_coverage():
    fidelity = package("torch_fidelity.metric_prc")
    theirs = fidelity.calculate_precision_recall_part(torch.tensor(SAMPLES), torch.tensor(REFERENCE), 3)
    ours = distances.precision_recall(REFERENCE, SAMPLES)
    assert 0.1 < min(ours) < 0.9
    assert ours == pytest.approx(theirs, abs=1e-6)
    compute = package("prdc").compute_prdc
    assert ours == pytest.approx([compute(REFERENCE, SAMPLES, 3)[name] for name in ("precision", "recall")], abs=1e-9)
    theirs = compute(REFERENCE, SAMPLES, 5)
    ours = distances.density_coverage(REFERENCE, SAMPLES)
    assert 0.1 < ours[0] < 0.95 and 0.1 < ours[1] < 0.95
    assert ours == pytest.approx([theirs["density"], theirs["coverage"]], abs=1e-9)
