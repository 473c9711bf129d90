"""The modules of score_sde's DDPM and DDPM++ in their order, random numbers in them, and what files hold of them. No torch."""

from typing import NamedTuple

import numpy as np


class Spec(NamedTuple):
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attention: tuple[int, ...] = (1,)
    plusplus: bool = True
    colours: int = 3


def modules(spec: Spec) -> list[tuple[str, dict[str, tuple[int, ...]]]]:
    """(the JAX code's class, shapes by name as PyTorch has them), in their order."""
    out, width, have, skips = [], 4 * spec.channels, spec.channels, [spec.channels]
    out += [("Dense", affine((width, spec.channels))), ("Dense", affine((width, width)))]
    out += [("Conv", affine((have, spec.colours, 3, 3)))]
    for level, times in enumerate(spec.multipliers):
        for _ in range(spec.blocks):
            out.append(block(spec, have, spec.channels * times))
            have = spec.channels * times
            out += [attention(spec, have)] * (level in spec.attention)
            skips.append(have)
        if level < len(spec.multipliers) - 1:
            out.append(resampling(spec, have, "Downsample"))
            skips.append(have)
    out += [block(spec, have, have), attention(spec, have), block(spec, have, have)]
    for level, times in reversed(list(enumerate(spec.multipliers))):
        for _ in range(spec.blocks + 1):
            out.append(block(spec, have + skips.pop(), spec.channels * times))
            have = spec.channels * times
        out += [attention(spec, have)] * (level in spec.attention)
        if level:
            out.append(resampling(spec, have, "Upsample"))
    return [*out, ("GroupNorm", affine((have,))), ("Conv", affine((spec.colours, have, 3, 3)))]


def affine(shape):
    return {"weight": shape, "bias": shape[:1]}


def below(**parts):
    return {f"{name}.{key}": shape for name, part in parts.items() for key, shape in part.items()}


def nin(have, gives):
    return {"W": (have, gives), "b": (gives,)}


def block(spec, have, gives, resamples=False):
    norms = affine((have,)), affine((gives,))
    convs = affine((gives, have, 3, 3)), affine((gives, gives, 3, 3))
    dense = affine((gives, 4 * spec.channels))
    # In the order in which each makes them, which is the order of the averages in a .pth.
    if not spec.plusplus:
        more = {"NIN_0": nin(have, gives)} if have != gives else {}
        named = below(GroupNorm_0=norms[0], GroupNorm_1=norms[1], Conv_0=convs[0], Conv_1=convs[1], Dense_0=dense, **more)
        return "ResnetBlockDDPM", named
    more = {"Conv_2": affine((gives, have, 1, 1))} if have != gives or resamples else {}
    named = below(GroupNorm_0=norms[0], Conv_0=convs[0], Dense_0=dense, GroupNorm_1=norms[1], Conv_1=convs[1], **more)
    return "ResnetBlockBigGANpp", named


def attention(spec, channels):
    parts = {f"NIN_{i}": nin(channels, channels) for i in range(4)}
    return "AttnBlockpp" if spec.plusplus else "AttnBlock", below(GroupNorm_0=affine((channels,)), **parts)


def resampling(spec, channels, name):
    return block(spec, channels, channels, True) if spec.plusplus else (name, below(Conv_0=affine((channels, channels, 3, 3))))


def filled(spec: Spec, seed: int = 0) -> list[tuple[str, dict[str, np.ndarray]]]:
    """The modules with random tensors, of a size that keeps what goes through them near 1."""
    rng = np.random.default_rng(seed)

    def tensor(name, shape):
        a = rng.standard_normal(shape)
        if len(shape) == 1:
            return (0.2 * a + (name.endswith("weight"))).astype(np.float32)
        return (a / np.sqrt(shape[0] if name.endswith("W") else np.prod(shape[1:]))).astype(np.float32)

    return [(kind, {name: tensor(name, shape) for name, shape in held.items()}) for kind, held in modules(spec)]


def torch_state(spec: Spec, seed: int = 0) -> dict[str, np.ndarray]:
    """The names that PyTorch gives the parameters."""
    return {f"module.all_modules.{i}.{name}": a for i, (_, held) in enumerate(filled(spec, seed)) for name, a in held.items()}


def checkpoint(spec: Spec, seed: int = 0) -> dict:
    """What a .pth holds: other parameters (seed + 1), their noise levels, and the averages of this seed."""
    model = {"module.sigmas": np.zeros(5, np.float32)} | torch_state(spec, seed + 1)
    return {"model": model, "ema": {"decay": 0.9999, "shadow_params": list(torch_state(spec, seed).values())}, "step": 3}


def flax_tree(spec: Spec, seed: int = 0) -> dict:
    """The parameters as the JAX code nests and lays them out; its norms have [1, 1, 1, C], as in Flax of 2021."""
    counts, out = {}, {}
    for kind, held in filled(spec, seed):
        number = counts[kind] = counts.get(kind, -1) + 1
        for name, a in held.items():
            *above, last = f"{kind}_{number}.{name}".split(".")
            at = out
            for key in above:
                at = at.setdefault(key, {})
            if "GroupNorm" in above[-1]:
                at[{"weight": "scale"}.get(last, last)] = a[None, None, None]
            elif last == "weight":
                at["kernel"] = np.ascontiguousarray(a.transpose(2, 3, 1, 0) if a.ndim == 4 else a.T)
            else:
                at[last] = a
    return out


def flax_state(spec: Spec, seed: int = 0) -> dict:
    """What a checkpoint_N of the JAX code holds."""
    return {"step": 3, "optimizer": {"target": flax_tree(spec, seed + 1)}, "lr": 2e-4, "params_ema": flax_tree(spec, seed)}
