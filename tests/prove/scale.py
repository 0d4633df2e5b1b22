"""Bar 6: `llorch simulate` with our policy, a million tasks over ten thousand replicas: time and memory."""

import json
import os
import resource
import subprocess
import sys
import time
from typing import Final

from tests.prove.goodput import WORKLOADS
from tests.prove.report import Figure, at_least, at_most, not_measured, progress
from tests.support.processes import ROOT

TASKS: Final = 1_000_000
REPLICAS: Final = 10_000
MOST_S: Final = 600.0
MOST_GIB: Final = 4.0
GIVE_UP_S: Final = 900.0
KIB_PER_GIB: Final = 1 << 20


def measure(number: int) -> list[Figure]:
    """One run in a process of its own, measured by the kernel."""
    file = WORKLOADS / "scale_million.yaml"
    what = f"{TASKS:,} tasks over {REPLICAS:,} replicas"
    report = ROOT / "out" / "scale.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "llorch", "simulate", str(file), "--policy", "ours", "--json"]
    begun = time.monotonic()
    with report.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stdin=subprocess.DEVNULL)
    status, usage = _wait(process)
    elapsed = time.monotonic() - begun
    if status != 0:
        return [not_measured(number, what, f"status {status} after {elapsed:.0f} s")]
    [results] = json.loads(report.read_text(encoding="utf-8"))["policies"]
    progress(f"scale: {elapsed:.0f} s, {usage.ru_utime + usage.ru_stime:.0f} s of CPU, {results['fates']}")
    return [
        at_least(number, "tasks simulated", results["tasks"], TASKS),
        at_most(number, f"{what}: wall time", elapsed, MOST_S, " s"),
        at_most(number, f"{what}: resident memory", usage.ru_maxrss / KIB_PER_GIB, MOST_GIB, " GiB"),
    ]


def _wait(process: "subprocess.Popen[bytes]") -> tuple[int, resource.struct_rusage]:
    """Its exit status and what it used; one that takes far too long is ended, which its status tells."""
    late = time.monotonic() + GIVE_UP_S
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage
        if time.monotonic() > late:
            os.kill(process.pid, 9)
        time.sleep(0.2)
