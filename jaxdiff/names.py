"""Names in a config become objects: "cosine" or "linear_beta(steps=1000)" is looked up in a module, no registry between."""

import ast
import functools
import numbers
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from jaxdiff.errors import InputError, nearest


def public(module: ModuleType) -> list[str]:
    """The names that a config may use of a module: its __all__, or its public callables."""
    return sorted(getattr(module, "__all__", None) or [n for n, f in vars(module).items() if callable(f) and n[0] != "_"])


def parse(module: ModuleType, text: str, key: str, allowed: Iterable[str] | None = None) -> tuple[Callable, tuple, dict[str, Any]]:
    """The function that `text`, "name" or "name(1, x=2)", names in `module`, and its arguments.

    An argument is a literal, or again a name or a call from the module: "shifted(linear_beta(1000), ratio=0.5)". Raises InputError
    naming the config's `key`, the wrong value and the allowed names.
    """
    try:
        node = ast.parse(str(text).strip(), mode="eval").body
        return _parsed(module, node, text, key, sorted(public(module) if allowed is None else allowed))
    except InputError:
        raise
    except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError):
        raise InputError(f'{key}={text!r} is not a name such as "cosine" or a name with numbers such as "edm(0.5)"') from None


def _parsed(
    module: ModuleType, node: ast.expr, text: str, key: str, names: list[str], inner: bool = False
) -> tuple[Callable, tuple, dict[str, Any]]:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    name = call.func.id  # type: ignore[attr-defined]
    # What is no name at all is told before a name that does not exist.
    args = tuple(_argument(module, a, text, key, names) for a in call.args)
    kwargs = {k.arg: _argument(module, k.value, text, key, names) for k in call.keywords if k.arg}
    if name not in names:
        # The list of a whole library helps nobody; the nearest name does.
        listed = f"; allowed: {', '.join(names)}" if len(names) <= 40 else f"; {module.__name__} has no such name"
        raise InputError(f"{key}={text!r}{f': {name!r}' if inner else ''} is unknown{nearest(name, names)}{listed}")
    return getattr(module, name), args, kwargs


def _argument(module: ModuleType, node: ast.expr, text: str, key: str, names: list[str]) -> Any:
    if not isinstance(node, ast.Name | ast.Call):
        return ast.literal_eval(node)
    function, args, kwargs = _parsed(module, node, text, key, names, inner=True)
    return _call(function, text, key, *args, **kwargs) if isinstance(node, ast.Call) else function


def named(module: ModuleType, text: str, key: str) -> Any:
    """What `text` names in `module`: the function itself, or where it has arguments or empty brackets, what the call returns.

    Raises InputError where the call fails.
    """
    function, args, kwargs = parse(module, text, key)
    return _call(function, text, key, *args, **kwargs) if "(" in str(text) else function


def with_arguments(module: ModuleType, text: str, key: str) -> Callable:
    """The function that `text` names, holding the arguments it gives; a later call that does not fit raises InputError."""
    function, args, kwargs = parse(module, text, key)
    return functools.partial(_call, function, text, key, *args, **kwargs)


def _call(function: Callable, text: str, key: str, *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except InputError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:  # draw_table(0) divides by it
        raise InputError(f"{key}={text!r}: {' '.join(str(error).split())}") from error


def whole(value: Any, least: int) -> bool:
    """Whether a config's value is an integer, True and False being none, and at least `least`."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least
