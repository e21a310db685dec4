"""Python 3.11's parser, which fails if it is used twice at the same moment.

`ast.parse` counts the depth of its recursion in one place for the whole process. A collection of garbage in the middle
of a call can run other code, of this thread or of another one; if that code calls `ast.parse`, too, the first call ends
with "SystemError: AST constructor recursion depth mismatch". That happens in practice: JAX takes part in collections,
NumPy reads the headers of its files by `ast.literal_eval`, the help of a command reads the source of the recipe's
classes, and TensorFlow is imported in a thread. Python 3.12 counts otherwise.
"""

import ast
import contextlib
import functools
import gc
import sys
import threading
from collections.abc import Iterator
from typing import Any

_ONE_AT_A_TIME = threading.RLock()
_MARK = "_is_alone"


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within the context no other thread is within it, and no garbage is collected."""
    with _ONE_AT_A_TIME:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()


def protect() -> None:
    """Lets every call of `ast.parse` in this process run `alone`, on Python 3.11; repeated calls do no harm.

    A library should not replace a function of Python's own. But each thread of each library is affected, and the calls
    that fail are not ours.
    """
    parse: Any = ast.parse
    if sys.version_info >= (3, 12) or getattr(parse, _MARK, False):
        return

    @functools.wraps(parse)
    def parse_alone(*arguments: Any, **options: Any) -> Any:
        with alone():
            return parse(*arguments, **options)

    setattr(parse_alone, _MARK, True)
    ast.parse = parse_alone
