"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest
from model_utils import ROOT

CODE = """
import importlib.util, resource, sys

spec = importlib.util.spec_from_file_location("memory", sys.argv[1])
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
for keep in (lambda: False, memory.keep_freed_memory):
    kept = keep()
    b"1" * 2**26
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        b"1" * 2**26
    print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can keep freed memory")
def test_keep_freed_memory_next_allocations_have_the_same_pages():
    """In a process of its own: it changes all of the process, and works in the main thread."""
    command = [sys.executable, "-c", CODE, ROOT / "reldn_d2/utils/memory.py"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, after = (line.split() for line in output.splitlines())
    pages = 5 * 2**26 // 4096
    assert before[0] == "False" and int(before[1]) > pages / 2
    assert after[0] == "True" and int(after[1]) < pages / 50
