"""The same numbers as OpenAI's networks, given their state dicts: by a forward pass in torch that is here, and by their library.

The library is guided-diffusion (on PyPI as guided-diffusion-sdk); where it is not installed only that part is skipped. All tensors
are random, none of them where it begins in training.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from openai_layout import PUBLISHED, Spec, filled, layout

import jaxdiff as jd
from jaxdiff import experiment, models, solvers, times
from jaxdiff import run as runs
from jaxdiff.interop import openai, workdir
from jaxdiff.level import Level

torch = pytest.importorskip("torch", reason="a reference implementation; not a dependency")
from torch.nn import functional as F

try:
    from guided_diffusion import unet
except ImportError:
    unet = None

FACTS = openai.Facts(8, heads=2, steps=1000, schedule="linear")
WIDE = FACTS._replace(heads=0, head_channels=16, new_attention_order=True)
UPDOWN = Spec(updown=True, classes=5, attention=(0, 1), multipliers=(1, 1, 2))
CASES = {
    "improved": (Spec(blocks=2), FACTS),
    "rescaled": (Spec(), FACTS._replace(steps=4000, schedule="cosine", rescale_timesteps=True)),
    "scaled betas": (Spec(outputs=1), FACTS._replace(steps=250)),
    "no shifts, grey": (Spec(shifts=False, colours=1, attention=()), FACTS._replace(heads=1)),
    "labels, updown, new order": (UPDOWN, WIDE),
    "labels, updown, by head": (UPDOWN, WIDE._replace(new_attention_order=False)),
    "half width first": (Spec(64, (0.5, 1, 1), updown=True, attention=(2,)), WIDE._replace(schedule="cosine")),
}
JUDGES = {
    "updown": (Spec(classes=7, outputs=0, updown=True, attention=(0, 1), blocks=2), WIDE._replace(new_attention_order=False)),
    "new order": (Spec(64, (0.5, 1, 2), classes=7, outputs=0, updown=True), WIDE),
    "convolutions": (Spec(classes=7, outputs=0), FACTS._replace(head_channels=32, heads=0)),
}


class Theirs:
    """Their network as functions of its tensors."""

    def __init__(self, state, spec, facts):
        self.s = {name: torch.from_numpy(a) for name, a in state.items()}
        self.spec, self.facts = spec, facts

    def __call__(self, x, row, label=None):
        """x [B, C, H, W], the number of the row [B] -> [B, outputs C, H, W], or logits."""
        emb, spec = self.embed(row, label), self.spec
        h = self.conv("input_blocks.0.0", x)
        skips = [h]
        for n in range(1, len(spec.multipliers) * (spec.blocks + 1)):
            name = f"input_blocks.{n}"
            if f"{name}.0.op.weight" in self.s:
                h = F.conv2d(h, self.s[f"{name}.0.op.weight"], self.s[f"{name}.0.op.bias"], stride=2, padding=1)
            else:
                h = self.block(f"{name}.0", h, emb, "down" if n % (spec.blocks + 1) == 0 else None)
                h = self.attend(f"{name}.1", h)
            skips.append(h)
        h = self.attend("middle_block.1", self.block("middle_block.0", h, emb))
        h = self.block("middle_block.2", h, emb)
        if not spec.outputs:
            return self.pool(F.silu(self.norm("out.0", h)))
        for n in range(len(skips)):
            name = f"output_blocks.{n}"
            h = self.attend(f"{name}.1", self.block(f"{name}.0", torch.cat([h, skips.pop()], 1), emb))
            for m in (1, 2):
                if f"{name}.{m}.in_layers.0.weight" in self.s:
                    h = self.block(f"{name}.{m}", h, emb, "up")
                elif f"{name}.{m}.conv.weight" in self.s:
                    h = self.conv(f"{name}.{m}.conv", F.interpolate(h, scale_factor=2.0))
        return self.conv("out.2", F.silu(self.norm("out.0", h)))

    def embed(self, row, label):
        half = self.spec.channels // 2
        number = row.float() * (1000 / self.facts.steps if self.facts.rescale_timesteps else 1)
        angle = number[:, None] * 10000.0 ** (-torch.arange(half) / half)
        h = F.silu(self.linear("time_embed.0", torch.cat([angle.cos(), angle.sin()], 1)))
        h = self.linear("time_embed.2", h)
        return h if label is None else h + self.s["label_emb.weight"][label]

    def linear(self, name, x):
        return F.linear(x, self.s[f"{name}.weight"], self.s[f"{name}.bias"])

    def conv(self, name, x):
        w = self.s[f"{name}.weight"]
        return F.conv2d(x, w, self.s[f"{name}.bias"], padding=w.shape[-1] // 2)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.s[f"{name}.weight"], self.s[f"{name}.bias"], 1e-5)

    def block(self, name, x, emb, change=None):
        resize = {"up": lambda a: F.interpolate(a, scale_factor=2.0), "down": lambda a: F.avg_pool2d(a, 2), None: lambda a: a}[
            change
        ]
        h = self.conv(f"{name}.in_layers.2", resize(F.silu(self.norm(f"{name}.in_layers.0", x))))
        e = self.linear(f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
        if self.spec.shifts:
            scale, shift = e.chunk(2, 1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + e)
        x = resize(x)
        x = self.conv(f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in self.s else x
        return x + self.conv(f"{name}.out_layers.3", F.silu(h))

    def attend(self, name, x):
        if f"{name}.qkv.weight" not in self.s:
            return x
        h = self.norm(f"{name}.norm", x).flatten(2)
        h = self.mix(F.conv1d(h, self.s[f"{name}.qkv.weight"], self.s[f"{name}.qkv.bias"]), self.facts.new_attention_order)
        h = F.conv1d(h, self.s[f"{name}.proj_out.weight"], self.s[f"{name}.proj_out.bias"])
        return x + h.reshape(x.shape)

    def mix(self, qkv, parts_first):
        """qkv [B, 3 C, T] -> [B, C, T]: head by head, whose rows are found in one of the two orders."""
        channels = qkv.shape[1] // 3
        heads = self.facts.heads or channels // self.facts.head_channels
        width, out = channels // heads, []
        for head in range(heads):
            if parts_first:
                q, k, v = (qkv[:, part * channels + head * width :][:, :width] for part in range(3))
            else:
                q, k, v = (qkv[:, (3 * head + part) * width :][:, :width] for part in range(3))
            weight = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(width), -1)
            out.append(v @ weight.transpose(1, 2))
        return torch.cat(out, 1)

    def pool(self, h):
        h = h.flatten(2)
        h = torch.cat([h.mean(-1, keepdim=True), h], -1) + self.s["out.2.positional_embedding"]
        h = self.mix(F.conv1d(h, self.s["out.2.qkv_proj.weight"], self.s["out.2.qkv_proj.bias"]), True)
        return F.conv1d(h, self.s["out.2.c_proj.weight"], self.s["out.2.c_proj.bias"])[:, :, 0]


def library(state, spec, facts):
    """The same network of their library, its tensors the state's; the module itself where there is none."""
    attention = [2**level for level in spec.attention]
    head = {"num_heads": facts.heads} if facts.heads else {"num_head_channels": facts.head_channels}
    fields = dict(
        image_size=spec.size,
        in_channels=spec.colours,
        model_channels=spec.channels,
        out_channels=spec.outputs * spec.colours or spec.classes,
        num_res_blocks=spec.blocks,
        attention_resolutions=attention,
        channel_mult=spec.multipliers,
        use_scale_shift_norm=spec.shifts,
        resblock_updown=spec.updown,
        use_new_attention_order=facts.new_attention_order,
        **head,
    )
    if spec.outputs:
        net = unet.UNetModel(**fields, num_classes=spec.classes or None)
    else:
        net = unet.EncoderUNetModel(**fields, pool="attention")
    if state is None:
        return net
    net.load_state_dict({name: torch.from_numpy(a) for name, a in state.items()})
    net.eval()
    scale = 1000 / facts.steps if facts.rescale_timesteps else 1
    return lambda x, row, label=None: net(x, row.float() * scale, *([] if label is None else [label]))


@pytest.mark.skipif(unet is None, reason="a reference implementation; not a dependency")
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_layouts_are_their_librarys(name):
    facts = openai.PUBLISHED[name]
    with torch.device("meta"):
        net = library(None, PUBLISHED[name], facts)
    assert {k: tuple(a.shape) for k, a in net.state_dict().items()} == layout(PUBLISHED[name])


def level_of(config, rows):
    """The levels of rows [B], counted from 0, as [B, 1, 1, 1]."""
    at = times.grid(experiment.build(config).schedule(None), (np.asarray(rows) + 1) / config.sampling.get("max_steps", 1000))
    return Level(*(jnp.asarray(a).reshape(-1, 1, 1, 1) for a in at))


def close(ours, theirs):
    """To 1e-4 of the root mean square."""
    theirs = theirs.detach().numpy()
    assert np.sqrt((theirs**2).mean()) > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.sqrt((theirs**2).mean()))


def back(a):
    return np.moveaxis(np.asarray(a), -1, 1)


def inputs(spec, size, rows, seed=1):
    x = np.random.default_rng(seed).standard_normal((len(rows), spec.colours, size, size)).astype(np.float32)
    label = np.arange(len(rows)) % spec.classes if spec.classes and spec.outputs else None
    return x, label


def said(config, params, x, rows, label=None):
    """Our network's output, its axes as theirs; the parameters are an argument: as constants they would take long to compile."""
    built = experiment.build(config)
    net = jax.jit(lambda params, x, snr, cond: built.net(params, cond)(x, snr))
    cond = None if label is None else {"label": jnp.asarray(label)}
    y, aux = net(params, jnp.moveaxis(x, 1, -1), jd.logsnr(level_of(config, rows)), cond)
    return back(y if aux is None else np.concatenate([y, aux], -1))


@torch.no_grad()
def agree(spec, facts, sizes):
    """Ours is what the forward pass here says, and what their library says where it is installed."""
    state = filled(layout(spec))
    config, params = openai.of(state, facts)
    rows = [0, 1, facts.steps // 3, facts.steps - 1]
    for size in sizes:
        x, label = inputs(spec, size, rows)
        ours = said(config, params, x, rows, label)
        given = torch.from_numpy(x), torch.tensor(rows), None if label is None else torch.from_numpy(label)
        close(ours, Theirs(state, spec, facts)(*given))
        if unet is not None:
            close(ours, library(state, spec, facts)(*given))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_unet_says_the_same(case):
    spec, facts = CASES[case]
    agree(spec, facts, (8, 16) if case == "improved" else (8,))


@pytest.mark.slow
@pytest.mark.parametrize("case", JUDGES)
def test_a_classifier_says_the_same(case):
    spec, facts = JUDGES[case]
    agree(spec, facts, (spec.size,))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(models, "ResBlockDown"), reason="there is no such part")
def test_blocks_that_resample_without_scales_say_the_same():
    agree(Spec(updown=True, shifts=False), FACTS, (8,))


def file_of(folder, spec, facts):
    """A file of torch.save, the network that is in it, and what we read of it."""
    state = filled(layout(spec))
    torch.save({name: torch.from_numpy(a) for name, a in state.items()}, folder / "model.pt")
    flags = {name: value for name, value in facts._asdict().items() if value and name != "data"}
    return Theirs(state, spec, facts), openai.read(folder / "model.pt", **flags)


def alpha_bars(facts):
    """Their table, in float64."""
    if facts.schedule == "cosine":
        bar = np.cos((np.arange(facts.steps + 1) / facts.steps + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.cumprod(1 - np.minimum(1 - bar[1:] / bar[:-1], 0.999))
    return np.cumprod(1 - np.linspace(0.1, 20, facts.steps) / facts.steps)


def predicted(net, x, row, bar, label):
    """Their x0, clipped, eps of it, and the variance's place."""
    with torch.no_grad():
        y = net(x, torch.full((len(x),), row), label)
    eps, place = y.chunk(2, 1)
    x0 = ((x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)).clamp(-1, 1)
    return x0, (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar), (place + 1) / 2


def constant(noise, key, shape, dtype):
    return jnp.asarray(noise, dtype)


def drawn(solver, start, levels):
    """What our loop ends with; the solver, with its parameters, is an argument of the program."""
    draw = jax.jit(lambda solver, x: jd.sample(jax.random.key(0), solver, x, levels))
    return back(draw(solver, jnp.moveaxis(start, 1, -1)))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rescaled", "labels, updown, new order"])
def test_ten_steps_of_ddim_end_alike(case, tmp_path):
    spec, facts = CASES[case]
    net, read = file_of(tmp_path, spec, facts)
    bars = alpha_bars(facts)
    rows = np.arange(10)[::-1] * (facts.steps // 10) + 1
    start, label = inputs(spec, 8, [0, 1])
    x = torch.from_numpy(start)
    for n, row in enumerate(rows):
        x0, eps, _ = predicted(net, x, int(row), bars[row], None if label is None else torch.from_numpy(label))
        if n + 1 < len(rows):
            below = bars[rows[n + 1]]
            x = math.sqrt(below) * x0 + math.sqrt(1 - below) * eps
    workdir.write(tmp_path / "w", read.config, read.params)
    run = jd.load(tmp_path / "w")
    levels = times.grid(experiment.build(run.config).schedule(None), (rows + 1) / facts.steps)
    ours = drawn(solvers.ddim(run.denoiser(label=label)), start, levels)
    np.testing.assert_allclose(ours, x0.numpy(), atol=3e-4)


@pytest.mark.slow
def test_learned_variances_and_the_same_noise_end_alike(tmp_path):
    spec, facts = CASES["improved"]
    net, read = file_of(tmp_path, spec, facts)
    bars, rows = alpha_bars(facts), np.round(np.linspace(0, facts.steps - 1, 10)).astype(int)[::-1]
    noise = np.random.default_rng(3).standard_normal((3, 8, 8)).astype(np.float32)
    start, _ = inputs(spec, 8, [0])
    x = torch.from_numpy(start)
    for n, row in enumerate(rows):
        x0, _, place = predicted(net, x, int(row), bars[row], None)
        if n + 1 == len(rows):
            break
        bar, below = bars[row], bars[rows[n + 1]]
        beta = 1 - bar / below
        mean = math.sqrt(below) * beta / (1 - bar) * x0 + math.sqrt(bar / below) * (1 - below) / (1 - bar) * x
        small, large = math.log(beta * (1 - below) / (1 - bar)), math.log(beta)
        x = mean + torch.exp((place * large + (1 - place) * small) / 2) * torch.from_numpy(noise)
    run = runs.of(read.config, experiment.build(read.config), read.params)
    np.testing.assert_array_equal(times.strided(facts.steps, 10, spacing="linspace") * facts.steps - 1, rows)
    levels = times.grid(experiment.build(run.config).schedule(None), (rows + 1) / facts.steps)
    solver = solvers.ddpm_learned(run.denoiser(), jax.tree_util.Partial(constant, np.moveaxis(noise, 0, -1)))
    ours = drawn(solver, start, levels)
    np.testing.assert_allclose(ours, x0.numpy(), atol=3e-4)


@pytest.mark.slow
def test_a_classifier_of_a_file_guides(tmp_path):
    spec, facts = JUDGES["updown"]
    net, read = file_of(tmp_path, spec, facts)
    workdir.write(tmp_path / "w", read.config, read.params)
    judge = jd.load_classifier(tmp_path / "w")
    x, _ = inputs(spec, 8, [0, 1])
    level = level_of(judge.config, [700, 20])
    slope = jax.jit(jax.grad(lambda x, log_prob: log_prob(x, level).sum()))
    ours = slope(jnp.moveaxis(x, 1, -1), judge.log_prob(np.array([3, 5])))
    theirs = torch.from_numpy(x).requires_grad_()
    torch.log_softmax(net(theirs, torch.tensor([700, 20])), 1)[[0, 1], [3, 5]].sum().backward()
    np.testing.assert_allclose(back(ours), theirs.grad.numpy(), rtol=1e-3, atol=1e-4 * float(theirs.grad.abs().max()))
