"""Python 3.11's parser in several threads."""

import subprocess
import sys

PARSES = """
import argparse
import ast
import gc
import inspect
import threading
import time

from nfnet_flax import python_parser

{protection}
source = inspect.getsource(argparse)
gc.callbacks.append(lambda phase, info: sum(range(50)))  # code that runs within a collection, as JAX's does
failed = []
end = time.monotonic() + 2


def parse(text, depth):
    if depth:
        return parse(text, depth - 1)
    try:
        ast.parse(text)
    except SystemError as error:
        failed.append(error)
    time.sleep(0.001)


def repeat(*arguments):
    while time.monotonic() < end:
        parse(*arguments)


other = threading.Thread(target=repeat, args=("f(x)", 0))
other.start()
repeat(source, 20)
other.join()
print(len(failed))
"""


def num_failed(protection: str) -> int:
    command = [sys.executable, "-c", PARSES.format(protection=protection)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)


def test_two_threads_may_parse() -> None:
    assert num_failed("python_parser.protect(); python_parser.protect()") == 0


def test_what_the_protection_is_for() -> None:
    assert (num_failed("") > 0) == (sys.version_info < (3, 12))
