"""What the scripts share: flags, one-line errors with exit code 2, and the compile cache. Importing it changes nothing."""

import errno
import gc
import os
import re
import runpy
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from jaxdiff.errors import InputError, RunError, nearest
from jaxdiff.experiment import check_keys


def run(main: Callable[..., None], *arguments: str) -> None:
    """Parses the command line and calls `main` with what it gives for these positional `arguments`, as "WORKDIR".

    Wrong input prints one line on stderr and leaves with exit code 2, a run that cannot go on with 1.
    """
    script = Path(sys.argv[0])
    program = script.parent.name if script.name == "__main__.py" else script.name  # of python -m
    warnings.formatwarning = lambda message, *args, **kwargs: f"{program}: {message}\n"
    # What cannot be written is told in one line; Orbax would log it with a traceback as well.
    logging.set_verbosity(logging.FATAL)
    # What was imported stays: to look through it again and again while programs are traced takes some 7% of a start.
    gc.freeze()
    gc.set_threshold(50_000)
    try:
        given = _parse(sys.argv, arguments)
        enable_compile_cache()
        main(*given)
    except InputError as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (RunError, OSError) as error:
        if not isinstance(error, RunError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # At once: threads of libraries that cannot write either would add a traceback each.
        os._exit(1)


def enable_compile_cache() -> None:
    """Keeps compiled programs for the next run, in $XDG_CACHE_HOME/jaxdiff/xla or ~/.cache/jaxdiff/xla unless JAX has a place.

    A cache folder that cannot be written is left alone: it only costs time.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "jaxdiff" / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Small programs too: a start has about 80, of a few KB each, and compiling them takes longer than reading them.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def age() -> float:
    """For how many seconds this process has run; where the system does not say, for how many it has computed."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.process_time()


def _parse(argv: list[str], arguments: Sequence[str] = ()) -> list[str]:
    """The positional arguments; flags are where absl keeps them."""
    app.define_help_flags()
    try:
        rest = flags.FLAGS(argv)
        given = "config" in flags.FLAGS and flags.FLAGS["config"].present
        config = flags.FLAGS["config"].value if given else None
        getattr(config, "keys", None)  # what stands for a file that failed to load raises here
    except Exception as error:  # a config file is a program, and may raise anything
        raise InputError(_explain(argv, error)) from error
    if len(rest) > 1 + len(arguments):
        raise InputError(f"unexpected argument {rest[1 + len(arguments)]!r}; options are written --name=value")
    if len(rest) < 1 + len(arguments):
        raise InputError(f"{arguments[len(rest) - 1]} is missing; the command is written {' '.join(arguments)} [--name=value ...]")
    if given:
        check_keys(config)
    return rest[1:]


def _explain(argv: list[str], error: Exception) -> str:
    """One line that names the wrong flag, config file or config key."""
    options = list(_options(argv))
    file = next((value for name, value in options if name == "config"), None)
    if file is None:
        return str(error)
    path, *argument = file.split(":", 1)
    if not Path(path).is_file():
        there = sorted(str(p) for p in Path("configs").glob("*.py"))
        return f"config file {file} is not there{nearest(file, there)}; allowed: {', '.join(there) or 'the path of a config'}"
    try:
        config = runpy.run_path(path)["get_config"](*argument)
    except Exception as failure:
        return f"config file {file} failed to load: {type(failure).__name__}: {failure}"
    if isinstance(error, flags.Error):
        return str(error)
    if not isinstance(config, ConfigDict):
        return f"config file {file}: get_config() returned {type(config).__name__}, not an ml_collections.ConfigDict"
    for name, _ in options:
        key = re.fullmatch(r"(?:no)?config\.(.*)", name)  # --noconfig.data.flip is how to write a false one
        if key and (wrong := unknown_key(config, key[1])):
            return wrong
    return str(error)


def _options(argv: list[str]) -> Iterator[tuple[str, str]]:
    """The options with their values, written --name=value, --name value, -name=value or -name value."""
    for argument, following in zip(argv[1:], [*argv[2:], ""]):
        if found := re.fullmatch(r"--?([^-=][^=]*)(?:=(.*))?", argument, re.DOTALL):
            yield found[1], following if found[2] is None else found[2]


def unknown_key(config: ConfigDict, dotted: str) -> str | None:
    """What is wrong with a config key such as "model.channels", None where it exists."""
    group, seen = config, "config"
    for part in dotted.split("."):
        if not isinstance(group, ConfigDict) or part not in group:
            allowed = ", ".join(group) if isinstance(group, ConfigDict) else "none, it is a value"
            near = nearest(part, group if isinstance(group, ConfigDict) else [])
            return f"unknown config key {seen}.{part}{near}; allowed in {seen}: {allowed}"
        group, seen = group[part], f"{seen}.{part}"
    return None
