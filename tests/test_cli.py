"""What the command line says about a wrong config file or key, however it is written."""

import sys
import warnings
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from jaxdiff import cli

DIGITS = str(Path(__file__).parent.parent / "configs" / "digits.py")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script with these arguments: (exit code, the config its `main` saw, stderr)."""

    def call(*arguments):
        argv = ["train.py", *arguments]
        monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # `run` sets it; put back afterwards
        config_flags.DEFINE_config_file("config", None, flag_values=flags.FLAGS, sys_argv=argv, lock_config=True)
        seen, code = [], 0
        try:
            cli.run(lambda: seen.append(flags.FLAGS.config))
        except SystemExit as error:
            code = error.code
        return code, seen, capsys.readouterr().err

    return call


@pytest.fixture
def said(run):
    """What a script with wrong arguments says: one line, exit code 2, and `main` is not called."""

    def call(*arguments):
        code, seen, err = run(*arguments)
        assert (code, seen, err.count("\n")) == (2, [], 1) and "Traceback" not in err
        return err

    return call


FORMS = [lambda n, v: [f"--{n}={v}"], lambda n, v: [f"--{n}", v], lambda n, v: [f"-{n}={v}"], lambda n, v: [f"-{n}", v]]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_option_is_taken(run, form):
    code, (config,), err = run(*form("config", DIGITS), *form("config.model.channels", "16"))
    assert (code, config.model.channels, err) == (0, 16, "")


@pytest.mark.parametrize("form", FORMS)
def test_a_config_file_that_is_not_there(said, form, monkeypatch):
    monkeypatch.chdir(Path(DIGITS).parent.parent)
    assert "config file configs/digit.py is not there; did you mean 'configs/digits.py'" in said(
        *form("config", "configs/digit.py")
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("of_key", FORMS)
def test_an_unknown_config_key(said, form, of_key):
    for key, near in (("model.chanels", "channels"), ("stpes", "steps"), ("trainning.keep", "training")):
        words = f"unknown config key config.{'.'.join(key.split('.')[:-1]) if 'trainning' in key else key}; did you mean '{near}'"
        assert words in said(*form("config", DIGITS), *of_key(f"config.{key}", "3"))


def test_an_unknown_boolean(said):
    assert "unknown config key config.data.flp; did you mean 'flip'" in said("--config", DIGITS, "--noconfig.data.flp")


def edited(tmp_path, old, new):
    text = Path(DIGITS).read_text()
    assert old in text
    path = tmp_path / "edited.py"
    path.write_text(text.replace(old, new))
    return f"--config={path}"


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("save_every=", "sav_every=", "config key training.sav_every is unknown; did you mean 'save_every'"),
        ("        keep_every=0,\n", "", "config key training.keep_every is missing"),
        (", flip=False", "", "config key data.flip is missing"),
        ("classes=10", "clases=10", "config key model.clases is unknown; did you mean 'classes'"),
        ("config.seed = 0", "config.sed = 0", "config key sed is unknown; did you mean 'seed'"),
        ("config.seed = 0", "config.seed = -1", "config.seed=-1 is out of range"),
        ("config.seed = 0", "config.seed = 0.5", "config.seed=0.5 is out of range"),
        ("config.seed = 0", "config.seed = 2**63", "config.seed=9223372036854775808 is out of range"),
        ("config.sampling =", "config.samplng =", "config key samplng is unknown; did you mean 'sampling'"),
        ("    return config", "    config.optimizer = 'adam'\n    return config", "failed to load: TypeError: Could not override"),
        ("config.optimizer = dict(", "config.optimizer = str(dict(", "failed to load: SyntaxError"),
        ("return config", "return config.to_dict()", "the config is of type dict, not an ml_collections.ConfigDict"),
        ("return config", "return [config]", "the config is of type list, not an ml_collections.ConfigDict"),
        ("return config", "config.data.nmae", "AttributeError"),
        ("return config", "return confg", "failed to load: NameError: name 'confg' is not defined"),
    ],
)
def test_a_config_file_with_wrong_keys(said, tmp_path, old, new, words):
    assert words in said(edited(tmp_path, old, new))


def test_a_config_file_that_forgets_to_return(run, tmp_path):
    code, seen, err = run(edited(tmp_path, "return config", "config"))
    assert (code, seen) == (2, []) and "the config is of type NoneType" in err  # behind a warning of ml_collections


def test_a_file_with_an_argument_gets_it_when_asked_for_an_unknown_key(said, tmp_path):
    config = edited(tmp_path, "def get_config()", "def get_config(size)")
    assert "unknown config key config.stpes; did you mean 'steps'" in said(f"{config}:8", "--config.stpes=3")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["a"], "TO is missing; the command is written FROM TO [--name=value ...]"),
        ([], "FROM is missing; the command is written FROM TO"),
        (["a", "b", "c"], "unexpected argument 'c'; options are written --name=value"),
    ],
)
def test_positional_arguments_are_asked_for(monkeypatch, capsys, given, words):
    """A command that has any is given just those, before, between and after its flags; its name is that of the package."""
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    flags.DEFINE_string("name", None, "", flag_values=flags.FLAGS)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    seen: list = []
    for argv in (["a", "--name=x", "b"], ["--name=x", "a", "b"], ["a", "b", "--name", "x"]):
        monkeypatch.setattr(sys, "argv", ["there/interop/__main__.py", *argv])
        cli.run(lambda *got: seen.append((*got, flags.FLAGS.name)), "FROM", "TO")
    assert seen == 3 * [("a", "b", "x")]
    monkeypatch.setattr(sys, "argv", ["there/interop/__main__.py", *given])
    with pytest.raises(SystemExit) as error:
        cli.run(seen.append, "FROM", "TO")
    err = capsys.readouterr().err
    assert (error.value.code, len(seen), err.count("\n")) == (2, 3, 1) and err.startswith("interop: ") and words in err
