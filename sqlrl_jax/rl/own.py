"""Functions of the user's own, named in the configuration as package.module:function."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any

from rollout.errors import UserError


def load_function(key: str, name: str) -> Callable[..., Any]:
    """The function that setting `key` names. Raises UserError saying what is wrong and what is near."""
    module_name, _, function_name = name.partition(":")
    where = f"{key} = {name!r}"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{where}: cannot import {module_name}: {error}; the module must be installed, on PYTHONPATH or beside launch.py"
        ) from error
    except SyntaxError as error:
        raise UserError(f"{where}: {error.filename}, line {error.lineno}: {error.msg}") from error
    found: Any = getattr(module, function_name, None)
    if callable(found):
        return found
    near = difflib.get_close_matches(function_name, [n for n, v in vars(module).items() if callable(v)], n=1)
    hint = f"; did you mean '{module_name}:{near[0]}'?" if near else ""
    raise UserError(f"{where}: {module.__file__} has no function {function_name}{hint}")
