"""torch.compile for what is around the blocks, where the number of rows is not always the same."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from types import FunctionType
from typing import Any

import torch

_numbers = count()


def compile_by_row(function: Callable[..., Any], rows: int = 1) -> Callable[..., Any]:
    """`function`, compiled once for any length of the first axis of its first `rows` arguments, tensors.

    So its results do not depend on which lengths came before, e.g. in the life of a run that was cut off. The function
    may be the forward of one of torch.nn's own modules, which torch.compile by itself passes over.
    """
    around = lambda *args: function(*args)  # noqa: E731
    # torch keeps eight compilations of one piece of code, and then fails: each function has a piece of its own
    code = around.__code__.replace(co_name=f"row_{next(_numbers)}")
    compiled = torch.compile(FunctionType(code, globals(), code.co_name, None, around.__closure__), fullgraph=True)

    def call(*args: Any) -> Any:
        for tensor in args[:rows]:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(*args)

    return call
