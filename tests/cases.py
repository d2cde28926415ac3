"Cases that are too small to be tests of their own."

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest


def each(
    names: str | Sequence[str], rows: Iterable[Any], ids: Iterable[str] | None = None
) -> Callable[..., Any]:
    """As `pytest.mark.parametrize`, but one test tries all rows; a failure names the rows
    that failed and shows why.
    """
    keys = (
        [name.strip() for name in names.split(',')]
        if isinstance(names, str)
        else list(names)
    )
    table = [row if len(keys) > 1 else (row,) for row in rows]
    labels = (
        list(ids) if ids is not None else [', '.join(map(repr, row))[:100] for row in table]
    )

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function)
        others = [p for p in signature.parameters.values() if p.name not in keys]

        @functools.wraps(function)
        def run(**fixtures: Any) -> None:
            errors: list[BaseException] = []
            for label, row in zip(labels, table, strict=True):
                try:
                    function(**fixtures, **dict(zip(keys, row, strict=True)))
                except (Exception, pytest.fail.Exception) as error:
                    error.add_note(f'in the case {label}')
                    errors.append(error)
            if len(errors) == 1:
                raise errors[0]
            if errors:
                raise BaseExceptionGroup(
                    f'{len(errors)} of {len(table)} cases fail', errors
                )

        run.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        return run

    return decorate
