"""Conversion. The package answers to a call as the verb, because importing any part of it makes
`headwise.convert` this package and no longer the function."""

import sys
from types import ModuleType
from typing import Any


class _Convert(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from headwise.convert.pipeline import convert

        return convert(*arguments, **options)


sys.modules[__name__].__class__ = _Convert
