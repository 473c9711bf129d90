"""score_sde's checkpoints: what tensors tell, which averages are read, what is refused. Numbers: test_reference_score_sde.py."""

import jax
import numpy as np
import pytest
from flax import serialization
from score_sde_layout import Spec, checkpoint, flax_state, modules

from jaxdiff import experiment
from jaxdiff.errors import InputError
from jaxdiff.interop import files, score_sde

SPECS = {"ddpm++": Spec(), "ddpm": Spec(plusplus=False, blocks=2), "deep": Spec(multipliers=(1, 2, 2), attention=(0, 2), blocks=2)}
# 32 pixels and 16x16 at the second level, as the JAX files' attention is taken to be.
CIFAR = dict(sde="vp", image_size=32)


def flat(spec, seed=0):
    return files.flat(checkpoint(spec, seed))


def test_published_counts():
    """DDPM++ and its deep form (configs/cifar_score_sde.py tells where they are from); DDPM as its modules add up."""
    for spec, count in (
        (Spec(128, (1, 2, 2, 2), 4), 61_804_419),
        (Spec(128, (1, 2, 2, 2), 8), 106_632_579),
        (Spec(128, (1, 2, 2, 2), 2, plusplus=False), None),
    ):
        laid_out = sum(int(np.prod(shape)) for _, held in modules(spec) for shape in held.values())
        # Of a tensor no more than its shape is looked at: views of one number.
        state = {
            f"all_modules.{i}.{name}": np.broadcast_to(np.float32(0), shape)
            for i, (_, held) in enumerate(modules(spec))
            for name, shape in held.items()
        }
        found = score_sde.plan(state)
        assert (found.blocks, found.attention, found.multipliers) == (spec.blocks, spec.attention, spec.multipliers)
        shapes = jax.eval_shape(experiment.build(score_sde.config_of(found, "vp", 32)).init, jax.random.key(0))
        assert sum(a.size for a in jax.tree.leaves(shapes)) == laid_out == (count or laid_out)


@pytest.mark.parametrize("name", SPECS)
def test_the_network_is_found_and_the_averages_are_read(name):
    spec = SPECS[name]
    state = flat(spec)
    config, params = score_sde.of(state, "vp", 32)
    assert (config.model.blocks, config.model.attention, config.model.multipliers) == (
        spec.blocks,
        spec.attention,
        spec.multipliers,
    )
    assert config.model.block == ("DDPMppBlock" if spec.plusplus else "ResBlock(groups=32)") and not config.model.attend_each
    average = state["ema.shadow_params.0"]
    np.testing.assert_array_equal(params["params"]["embed1"]["kernel"], average.T)
    assert not np.allclose(average, state["model.module.all_modules.0.weight"])


@pytest.mark.parametrize("spec", [Spec(), Spec(plusplus=False)])
def test_the_jax_original_is_the_same_model(tmp_path, spec):
    """A file that Flax's own serializer wrote gives the parameters that the .pth of the same numbers gives."""
    (tmp_path / "checkpoint_3").write_bytes(serialization.msgpack_serialize(flax_state(spec)))
    read = score_sde.read(tmp_path / "checkpoint_3", **CIFAR)
    config, params = score_sde.of(flat(spec), **CIFAR)
    assert read.config == config
    jax.tree.map(np.testing.assert_array_equal, read.params, params)


@pytest.mark.parametrize("folder", score_sde.PUBLISHED)
def test_the_folder_says_which_sde(tmp_path, folder):
    place = tmp_path / folder
    place.mkdir(parents=True)
    (place / "checkpoint_3").write_bytes(serialization.msgpack_serialize(flax_state(Spec())))
    process = score_sde.read(place / "checkpoint_3").config.process
    curve = "subvp(0.1, 20.0)" if "subvp" in folder else "vp(0.1, 20.0)" if "continuous" in folder else "linear_beta(steps=1000)"
    assert process.schedule == curve and process.target == "eps"


def refused(said, call, *args, **flags):
    with pytest.raises(InputError) as error:
        call(*args, **flags)
    assert said in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_a_flag_that_is_missing_or_wrong_is_named(tmp_path):
    path = tmp_path / "checkpoint_3"
    path.write_bytes(serialization.msgpack_serialize(flax_state(Spec())))
    refused("tells --sde, and its folder is none of vp/cifar10_ddpm, ", score_sde.read, path)
    refused("tells --image_size", score_sde.read, path, sde="vp")
    refused("--sde='sub' is unknown", score_sde.read, path, sde="sub")
    refused("--image_size=0 is out of range", score_sde.read, path, sde="vp", image_size=0)
    refused(
        "--image_size=64 has attention at 0 levels (16x16), but the file 3 modules", score_sde.read, path, sde="vp", image_size=64
    )
    refused("--image_size=33 is not divisible by 2, as 2 levels need", score_sde.of, flat(Spec()), "vp", 33)


def changed(spec=None, **changes):
    """A .pth's tensors with some of both the model's and the averages' replaced, left out where None or added."""
    held = checkpoint(spec or Spec())
    averages = dict(zip([k for k in held["model"] if "all_modules" in k], held["ema"]["shadow_params"], strict=True))
    for name, a in changes.items():
        averages[f"module.all_modules.{name}"] = a
    kept = {k: a for k, a in averages.items() if a is not None}
    return files.flat({"model": kept, "ema": {"shadow_params": list(kept.values())}})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"3.Conv_1.bias": None}, "tensor all_modules.3.Conv_1.bias is missing"),
        ({"3.Conv_1.bias": np.ones(31)}, "tensor all_modules.3.Conv_1.bias has shape (31,), this architecture's has (32,)"),
        ({"3.Conv_2.bias": np.ones(1)}, "tensor all_modules.3.Conv_2.bias belongs to nothing"),
        ({"0.W": np.ones(1)}, "tensor all_modules.0.W is of no DDPM or DDPM++"),
        ({"4.Conv2d_0.weight": np.ones(1)}, "tensor all_modules.4.Conv2d_0 is of no DDPM or DDPM++"),
        ({"x.weight": np.ones(1)}, "tensor all_modules.x.weight has no number"),
        ({"2.weight": None}, "tensor all_modules.2.weight is missing"),
        (
            {"20.GroupNorm_1.weight": np.ones(3), "20.Conv_0.weight": np.ones((3, 3, 3, 3))},
            "residual blocks, and 2 changes of size",
        ),
    ],
)
def test_a_tensor_that_is_missing_of_nothing_or_misshapen_is_named(changes, said):
    refused(said, score_sde.of, changed(**changes), "vp", 32)


def test_averages_that_do_not_fit_and_other_blocks_are_refused():
    state = flat(Spec())
    refused(
        "has 0 averages (ema.shadow_params) of the ",
        score_sde.of,
        files.below(state, "nothing.") | {"model.a": state["ema.shadow_params.0"]},
        "vp",
        32,
    )
    refused(
        "the average of tensor all_modules.0.weight has shape (3,)",
        score_sde.of,
        state | {"ema.shadow_params.0": np.ones(3)},
        "vp",
        32,
    )
    # NCSN++'s blocks of the type ddpm have the tensors of DDPM's in another order, and scale their sum.
    held = checkpoint(Spec(plusplus=False))
    order = sorted(held["model"])
    averages = dict(zip([k for k in held["model"] if "all_modules" in k], held["ema"]["shadow_params"], strict=True))
    other = files.flat(
        {
            "model": {k: averages[k] for k in order if k in averages},
            "ema": {"shadow_params": [averages[k] for k in order if k in averages]},
        }
    )
    refused("blocks of the type ddpm in NCSN++, which are not read", score_sde.of, other, "vp", 32)


def test_files_that_cannot_be_read(tmp_path):
    whole = serialization.msgpack_serialize(flax_state(Spec()))
    path = tmp_path / "checkpoint_3"
    path.write_bytes(whole[:1000])
    refused("checkpoint_3 is no checkpoint of Flax, or is cut short", score_sde.read, path, **CIFAR)
    path.write_bytes(serialization.msgpack_serialize({"params": {"a": np.ones(2)}}))
    refused("is no checkpoint of score_sde", score_sde.read, path, **CIFAR)
    files.write(tmp_path / "a.safetensors", {"a": np.ones(2, np.float32)})
    refused("a.safetensors is no checkpoint of score_sde", score_sde.read, tmp_path / "a.safetensors", **CIFAR)
    refused("gone is not there", score_sde.read, tmp_path / "gone", **CIFAR)
