"""Large blocks are used again in the next step, unless the user says otherwise."""

import platform
import resource
import subprocess
import sys

import pytest

from tests.environment import environment

# One block of 100 MB after the other, each freed before the next; pages that the kernel had to find for the
# last ten, once the first have found their place.
PROGRAM = """
import resource
import torch
from megamoe.parallel.memory import keep_freed_memory

kept = keep_freed_memory()
for index in range(20):
    if index == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25_000_000)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
@pytest.mark.parametrize(
    ("settings", "kept"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "131072"}, False)], ids=["default", "set"]
)
def test_large_blocks_are_used_again(settings, kept):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment() | settings, capture_output=True, text=True
    )
    said, n_pages = done.stdout.split()
    assert said == str(kept)
    if kept:  # else the kernel may give large pages
        assert int(n_pages) < 0.1 * 100_000_000 / resource.getpagesize()
