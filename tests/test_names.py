import functools
from types import ModuleType

import numpy as np
import pytest

from jaxdiff import names, schedules, times
from jaxdiff.errors import InputError, nearest


def test_a_bare_name_is_the_function_and_brackets_call_it():
    assert names.named(schedules, "cosine", "k") is schedules.cosine
    made = names.named(schedules, "linear_beta(10, last=0.5)", "k")
    want = schedules.linear_beta(10, last=0.5)
    assert float(made(0.7).alpha) == float(want(0.7).alpha) != float(schedules.linear_beta(10)(0.7).alpha)


def test_an_argument_may_be_a_name_or_a_call_again():
    made = names.named(schedules, "shifted(linear_beta(10, last=0.5), ratio=0.5)", "k")
    want = schedules.shifted(schedules.linear_beta(10, last=0.5), 0.5)
    assert float(made(0.7).alpha) == float(want(0.7).alpha)
    twice = names.named(schedules, "shifted(schedule=shifted(cosine, 0.5), ratio=2)", "k")
    np.testing.assert_allclose(twice(0.3).alpha, schedules.cosine(0.3).alpha, rtol=1e-6)
    function, args, kwargs = names.parse(schedules, "shifted(cosine, ratio=-1)", "k")
    assert (function, args, kwargs) == (schedules.shifted, (schedules.cosine,), {"ratio": -1})


def test_arguments_wait_for_the_rest():
    make = names.with_arguments(times, "strided(100, spacing='trailing')", "k")
    assert isinstance(make, functools.partial)
    assert make(n=2).tolist() == times.strided(100, 2, "trailing").tolist()
    assert names.with_arguments(times, "uniform", "k")(n=4).tolist() == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    "text, said",
    [
        ("cosin", "process.schedule='cosin' is unknown; did you mean 'cosine'?; allowed: cosine, cosine_beta, edm, learned, "),
        ("linear_beta(steps=", "process.schedule='linear_beta(steps=' is not a name"),
        ("linear_beta(steps=x)", "process.schedule='linear_beta(steps=x)': 'x' is unknown; allowed: cosine, "),
        ("shifted(cosin, 0.5)", "process.schedule='shifted(cosin, 0.5)': 'cosin' is unknown; did you mean 'cosine'?; allowed: "),
        ("shifted(linear_bet(3), 0.5)", ": 'linear_bet' is unknown; did you mean 'linear_beta'?"),
        ("shiftd(cosine, 0.5)", "process.schedule='shiftd(cosine, 0.5)' is unknown; did you mean 'shifted'?"),
        ("shifted(linear_beta(0), 0.5)", "'shifted(linear_beta(0), 0.5)': linear_beta needs steps >= 1"),
        ("shifted(cosine, 0)", "'shifted(cosine, 0)': shifted needs a finite ratio > 0"),
        ("shifted(learned(-1, 1), 2)", "shifted needs a schedule t -> Level, got Learned"),
        ("shifted(os.system('true'), 1)", "is not a name"),
        ("shifted(cosine.mro(), 1)", "is not a name"),
        ("os.system('true')", "is not a name"),
        ("linear_beta(stepz=3)", "unexpected keyword argument 'stepz'"),
        ("linear_beta(steps=0)", "steps >= 1"),
        ("linear_beta({[]: 1})", "is not a name"),
        ("Callable", "is unknown"),
    ],
)
def test_wrong_names_say_what_is_allowed(text, said):
    with pytest.raises(InputError) as error:
        names.named(schedules, text, "process.schedule")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_arithmetic_that_fails_in_a_call_is_one_line():
    module = ModuleType("module")
    module.share = lambda n: 1 / n
    with pytest.raises(InputError, match=r"^process\.draw='share\(0\)': division by zero$"):
        names.named(module, "share(0)", "process.draw")


def test_a_whole_number_is_an_integer_and_no_boolean():
    assert names.whole(3, 3) and names.whole(np.int32(0), 0)
    assert not any(names.whole(value, 0) for value in (-1, 1.0, True, "1", None, (1,)))


def test_nearest_suggests_only_what_is_near_and_not_the_word_itself():
    assert nearest("cosin", ["cosine", "edm"]) == "; did you mean 'cosine'?"
    assert nearest("zzz", ["cosine"]) == ""
    assert nearest("cosine", ["cosine"]) == ""
