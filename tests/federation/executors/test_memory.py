import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from fedamm_pl.federation.executors.worker import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(40 * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="nothing is done for other C libraries")
def test_a_worker_does_not_get_the_same_memory_from_the_system_again() -> None:
    before, after = map(int, subprocess.check_output([sys.executable, "-c", FAULTS], text=True).split())
    assert before >= 50  # one for each page of 4 KB, or of 2 MB
    assert after < 5
