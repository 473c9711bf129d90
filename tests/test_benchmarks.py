"""The speed benchmarks: what they share, by numbers known beforehand; and each of them, tiny and without PyTorch."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import all as everything
from benchmarks import forward, likelihood, measure, peers, sampling, scaling, training_step
from jaxdiff import experiment
from jaxdiff.training import hardware

TINY = ["--channels", "8", "--size", "8"]
whole = peers.config_of


def shallow(channels=8, size=8, dropout=0.1):
    """The benchmarks' config with a network of few layers, which compiles soon."""
    config = whole(channels, size, dropout)
    config.model.multipliers, config.model.blocks = (1, 2), 1
    return config


def small_ceilings():
    return {"matmul": measure.product(64), "convolution": measure.convolution(1, 8, 8)}


@pytest.fixture
def alone(monkeypatch):
    """A shallow network, no PyTorch, and no second spent on the machine's ceilings."""
    monkeypatch.setattr(peers, "config_of", shallow)
    monkeypatch.setattr(peers, "torch_is_here", lambda: False)
    monkeypatch.setattr(measure, "ceilings", small_ceilings)


def rows(text):
    """The cells of the Markdown tables in a text, their heads and rules left out."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    rules = [i for i, line in enumerate(lines) if set("".join(line)) == {"-"}]
    return [line for i, line in enumerate(lines) if i not in rules and i + 1 not in rules]


def test_functions_take_turns_in_both_orders(monkeypatch):
    clock, said = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def taking(name, seconds):
        def function():
            said.append(name)
            clock[0] += seconds

        return function

    taken = measure.turns({"a": taking("a", 1.0), "b": taking("b", 3.0)}, 3)
    assert "".join(said) == "ab" + "ab" + "ba" + "ab"  # once each that does not count
    np.testing.assert_array_equal(taken["a"], [1.0, 1.0, 1.0])
    np.testing.assert_array_equal(taken["b"], [3.0, 3.0, 3.0])


def test_a_ratio_is_of_each_turn():
    found = measure.ratio(np.array([2.0, 40.0, 9.0]), np.array([1.0, 10.0, 3.0]))
    assert found == measure.Ratio(3.0, 2.5, 3.5)
    assert str(found) == "3.000 (2.500 to 3.500)"


def test_a_table_is_markdown():
    assert measure.table(("what", "s"), [["a", 1], ["b", 2.5]]) == "| what | s |\n|---|---|\n| a | 1 |\n| b | 2.5 |"


def test_ceilings_count_operations_as_a_traced_program_does():
    x, kernel = jnp.zeros((3, 16, 16, 4)), jnp.zeros((3, 3, 4, 4))
    conv = jax.make_jaxpr(
        lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )
    limit = measure.convolution(batch=3, size=16, channels=4)
    assert limit.flops == hardware.flops(conv(x, kernel)) and limit.run().shape == x.shape
    limit = measure.product(n=32)
    assert limit.flops == hardware.flops(jax.make_jaxpr(jnp.matmul)(jnp.zeros((32, 32)), jnp.zeros((32, 32))))
    assert limit.run().shape == (32, 32)


def test_a_ceiling_that_is_repeated_counts_every_time():
    done = []
    work = measure._repeated(measure.Work(2.0, lambda: done.append(0)), 3)
    work.run()
    assert work.flops == 6.0 and len(done) == 3


def test_a_share_is_of_what_the_machine_did_in_the_same_turns():
    limits = {"matmul": measure.Work(8.0, lambda: None), "convolution": measure.Work(4.0, lambda: None)}
    seconds = {"matmul": np.array([1.0, 2.0, 1.0]), "convolution": np.array([1.0, 2.0, 4.0])}
    assert measure.rates(limits, seconds) == [8.0, 2.0]
    # 6 operations at rates of 3, 1 and 6, beside 8, 4 and 8, and 4, 2 and 1
    assert measure.shares(6.0, np.array([2.0, 6.0, 1.0]), limits, seconds) == [0.375, 0.75]


def test_a_ceiling_is_the_quicker_of_the_two_compiled(monkeypatch):
    for seconds, quicker in (
        (
            (
                [3.0, 9.0],
                [4.0, 5.0],
            ),
            0,
        ),
        (([4.0, 5.0], [3.0, 9.0]), 1),
    ):
        kept = []
        monkeypatch.setattr(
            measure, "turns", lambda runs, n, s=seconds, k=kept: k.extend(runs.values()) or dict(zip(runs, map(np.array, s)))
        )
        assert measure._quickest(lambda x: x + 1, jnp.zeros(2)) is kept[quicker]


def test_an_entry_goes_above_the_others_and_they_stay(tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text("# Benchmarks\n\nNewest first.\n\n## Old\n\nfigures\n\n## Older\n\nmore\n")
    measure.publish("New", "| a |\n|---|\n| 1 |\n", "python benchmarks/a.py --b 2", page)
    first, *others = page.read_text().split("\n## ")
    assert first == "# Benchmarks\n\nNewest first.\n"
    assert others[1:] == ["Old\n\nfigures\n", "Older\n\nmore\n"]
    assert others[0].startswith("New\n\n") and f"jax {jax.__version__}" in others[0] and "commit " in others[0]
    assert others[0].endswith("\n\n| a |\n|---|\n| 1 |\n\n    python benchmarks/a.py --b 2\n")
    measure.publish("Newer", "b", "c", page)
    assert re.findall(r"^## (.*)", page.read_text(), re.M) == ["Newer", "New", "Old", "Older"]


def test_milliseconds_have_three_digits():
    assert [measure.ms(s) for s in (12.3456, 0.1234, 0.012345, 0.00012345)] == ["12346", "123", "12.3", "0.123"]


def test_the_command_is_told_without_where_it_writes():
    assert measure.command("/x/y/forward.py", ["--batch", "4", "--publish"]) == "python benchmarks/forward.py --batch 4"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_memory_is_seen_after_it_is_gone():
    measure.forget_peak()
    before, size = measure.resident(), 2**26
    held = np.ones(size, np.uint8)
    assert measure.resident() - before > 0.9 * size
    del held
    assert measure.resident() - before < 0.5 * size
    assert 0.9 * size < measure.peak() - before < 1.5 * size
    measure.forget_peak()
    assert measure.peak() - before < 0.5 * size


def test_the_network_is_that_of_the_config_but_for_what_it_hears():
    built = experiment.build(peers.config_of())
    assert peers.count(jax.eval_shape(built.init, jax.random.key(0))) == 35_746_307
    narrow = experiment.build(peers.config_of(32))
    assert peers.count(jax.eval_shape(narrow.init, jax.random.key(0))) == 2_245_763


def test_parameters_that_are_drawn_keep_activations_their_size():
    built = experiment.build(shallow())
    params, (x, rows, logsnr) = peers.drawn(built), peers.noisy(4, 8)
    assert ((0 <= rows) & (rows < 1000)).all()
    said = jax.jit(peers.forward(built))(params, x, logsnr)
    assert said.shape == x.shape and 0.1 < float(jnp.std(said)) < 10


def test_forward_alone(alone, capsys, monkeypatch, tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text("# Benchmarks\n\n## Old\n\nfigures\n")
    publish = measure.publish
    monkeypatch.setattr(measure, "publish", lambda *entry: publish(*entry, page))
    monkeypatch.setattr(measure, "shares", lambda flops, ours, *limits: [flops / float(np.median(ours)) / 1e11] * 2)
    forward.main([*TINY, "--batch", "2", "--repeats", "3", "--publish"])
    told = rows(capsys.readouterr().out)
    assert [row[0] for row in told] == ["2"] and {row[2] for row in told} == {"not here"}
    for batch, ms, _, _, pace, gflops, of_matmul, of_convolution in told:
        assert float(pace) == pytest.approx(1e3 * int(batch) / float(ms), rel=0.01)  # both of three digits
        assert of_matmul == of_convolution and float(of_matmul[:-1]) == pytest.approx(float(gflops), abs=0.1)
    assert rows(page.read_text()) == told and page.read_text().endswith("\n## Old\n\nfigures\n")


@pytest.mark.slow
def test_training_step_alone(alone, capsys, monkeypatch):
    # A process of its own would have the whole network.
    monkeypatch.setattr(training_step, "memory", lambda asked, n: training_step.memory_here(shallow(), n))
    training_step.main([*TINY, "--batch", "2", "--repeats", "2", "--parts"])
    told = rows(capsys.readouterr().out)
    assert told[0][0] == "2" and told[0][2] == "not here" and float(told[0][4]) > 0
    parts = {row[0]: row[2] for row in told[1:7]}
    assert parts["the step"] == "1.000 (1.000 to 1.000)" and len(parts) == 6
    if sys.platform == "linux":
        (_, state, temporaries, whole, measured, ratio), size = (
            told[7],
            peers.count(peers.drawn(experiment.build(shallow()))),
        )
        # Parameters, the average and Adam's two, four bytes each.
        assert float(state) == pytest.approx(16 * size / 2**20, abs=1)
        assert float(whole) >= float(state) + float(temporaries) - 1
        assert float(ratio) > 0 and float(measured) > 0


def test_a_step_goes_on_from_the_last():
    step = training_step.going(lambda key, state, batch: (state + batch, state), None, 1, 10)
    assert [step() for _ in range(3)] == [(11, 1), (21, 11), (31, 21)]


@pytest.mark.slow
def test_sampling_alone(alone, capsys):
    sampling.main(["--channels", "8", "--size", "8", "--batch", "2", "--steps", "4", "--repeats", "2"])
    ((channels, _, calls, ours, theirs, _, bare, ratio, _),) = rows(capsys.readouterr().out)
    assert (channels, calls, theirs) == ("8", "4", "not here") and float(ours) >= 0 and float(bare) >= 0
    assert float(ratio.split()[0]) > 0


def test_the_rows_asked_are_the_strides_of_the_table(alone):
    made = sampling.sampler(8, 8, 1, 4)
    assert sampling.rows_asked(made) == [750, 500, 250, 0]


@pytest.mark.slow
def test_likelihood_alone(alone, capsys):
    likelihood.main([*TINY, "--batch", "2", "--terms", "2", "--steps", "1", "--repeats", "2"])
    bound, exact = rows(capsys.readouterr().out)
    assert bound[:2] == ["bpd_elbo", "3"] and exact[:2] == ["bpd_ode", "4"]
    assert float(bound[5].split()[0]) > 0 and bound[7] == "" and float(exact[7].split()[0]) > 0


def test_slopes_are_of_logarithms():
    points = [scaling.Point(flops, 3e-9 * flops**0.75, 5, (), ()) for flops in (1e6, 2e8, 5e9)]
    assert scaling.slope(points) == pytest.approx(0.75)


def test_long_calls_are_fewer(monkeypatch):
    for seconds, calls in ((1.0, 5), (4.0, 3)):
        clock = iter(np.arange(100) * seconds)
        monkeypatch.setattr(measure.time, "perf_counter", lambda clock=clock: float(next(clock)))
        limits = {"matmul": measure.Work(14.0, lambda: None)}
        assert scaling.measured((lambda: None, 7.0), 5, limits) == scaling.Point(7.0, seconds, calls, (14.0 / seconds,), (0.5,))


@pytest.mark.slow
def test_scaling_alone(alone, capsys, tmp_path):
    few = ["--batch", "1", "2", "--train_batch", "1", "--channels", "8", "--size", "8", "--middle", "8", "8", "1", "--repeats", "1"]
    scaling.main([*few, "--out", str(tmp_path / "plot.png")])
    told = rows(capsys.readouterr().out)
    points = [row for row in told if len(row) == len(scaling.COLUMNS)]
    assert [row[0] for row in points] == ["forward"] * 4 + ["training step"] * 3
    one, two = (float(row[5]) for row in points[:2])
    assert two == pytest.approx(2 * one, rel=0.01) and one > 0
    assert points[0][5:] == points[2][5:]  # the same size in two series is measured once
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_one_that_fails_is_told_and_the_others_run(capfd, monkeypatch):
    words = {"bad": [sys.executable, "-c", "raise SystemExit(3)"], "good": [sys.executable, "-c", "print('it ran')"]}
    monkeypatch.setattr(everything, "commands", lambda *asked: {name: words[name] for name in ("bad", "good")})
    with pytest.raises(SystemExit) as left:
        everything.main(["--only", "forward"])
    out = capfd.readouterr().out
    assert left.value.code == 1 and "it ran" in out and "bad: failed with exit code 3" in out
    assert out.rstrip().endswith("failed: bad") and out.index("== good") > out.index("== bad")


def test_what_all_passes_on():
    told = everything.commands(["forward", "compile_time", "training_step"], quick=False, publish=True)
    assert told["forward"][1:] == [str(ROOT / "benchmarks" / "forward.py"), "--publish"]
    assert "--publish" not in told["compile_time"] and "--parts" in told["training_step"]
    quick = everything.commands(["forward"], quick=True, publish=False)
    assert "--channels" in quick["forward"] and "--publish" not in quick["forward"]
    told = everything.commands(["forward", "input_pipeline"], False, False, "prepared")
    assert "--data_dir=prepared" in told["input_pipeline"] and "--data_dir=prepared" not in told["forward"]


def test_a_rehearsal_is_not_published(capsys):
    with pytest.raises(SystemExit):
        everything.main(["--quick", "--publish"])
    assert "rehearsal" in capsys.readouterr().err
