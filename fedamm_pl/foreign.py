"""Code of other authors: import it by its path, and describe its errors in one line."""

import importlib
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NOT_OWN = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parent}{os.sep}", "<frozen importlib")
"""Beginnings of the paths of torch, this package and importlib, which call the code of other authors."""


def failure(error: BaseException) -> str:
    """Return type and message of an error in one line, with the innermost place outside torch and this package."""
    summary = traceback.TracebackException.from_exception(error)  # also where str(error) itself raises
    text = " ".join(str(summary).split())
    own = [frame for frame in summary.stack if not frame.filename.startswith(NOT_OWN)]
    place = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}{f': {text:.300}' if text else ''}{place}"


def imported(name: str, expected: str) -> Callable[..., Any]:
    """Return the callable at an import path.

    Args:
        name: The import path: module, dot, attribute.
        expected: The beginning of an error message, which says what the option expects, without a full stop.

    Raises:
        ValueError: If there is no such callable, or its module raises an error.
    """
    path, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(path), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"{expected}, got {name!r}" + (f" ({error})." if path else ".")) from error
    except Exception as error:  # a module may raise any error
        raise ValueError(f"{expected}, got {name!r}, whose import raises {failure(error)}.") from error
    if not callable(found):
        raise ValueError(
            f"{expected}, got {name!r}, which cannot be called like this (it is a {type(found).__name__})."
        )
    return found  # type: ignore[no-any-return]
