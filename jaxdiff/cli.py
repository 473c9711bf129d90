"""What the scripts share: flags, one-line errors with exit code 2, and the compile cache. Importing it changes nothing."""

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import ConfigDict

from jaxdiff.errors import InputError, nearest


def run(main: Callable[[], None]) -> None:
    """Parses the command line and calls `main`; wrong input prints one line on stderr and leaves with exit code 2."""
    program = Path(sys.argv[0]).name
    try:
        _parse(sys.argv)
        enable_compile_cache()
        main()
    except InputError as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def enable_compile_cache() -> None:
    """Keeps compiled programs for the next run, in $XDG_CACHE_HOME/jaxdiff/xla or ~/.cache/jaxdiff/xla unless JAX has a place.

    A cache folder that cannot be written is left alone: it only costs time.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "jaxdiff" / "xla"))


def _parse(argv: list[str]) -> None:
    app.define_help_flags()
    try:
        rest = flags.FLAGS(argv)
        config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
        if config is not None:
            dict(config)  # what stands for a file that failed to load raises here
    except (flags.Error, OSError, KeyError, AttributeError, TypeError, ValueError, SyntaxError, ImportError) as error:
        raise InputError(_explain(argv, error)) from error
    if len(rest) > 1:
        raise InputError(f"unexpected argument {rest[1]!r}; options are written --name=value")


def _explain(argv: list[str], error: Exception) -> str:
    """One line that names the wrong flag, config file or config key."""
    file = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
    if file is None or isinstance(error, flags.Error):
        return str(error)
    path = Path(file.split(":")[0])
    if not path.is_file():
        there = sorted(str(p) for p in Path("configs").glob("*.py"))
        return f"config file {file} is not there{nearest(file, there)}; allowed: {', '.join(there) or 'the path of a config'}"
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except Exception as failure:
        return f"config file {file} failed to load: {type(failure).__name__}: {failure}"
    for argument in argv:
        if argument.startswith("--config."):
            wrong = unknown_key(config, argument[len("--config.") :].split("=")[0])
            if wrong:
                return wrong
    return str(error)


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
