"""What this machine's CPU is, and what it can do."""

import os
import platform
from pathlib import Path

# Linux's names of the instructions that multiply matrices, or pairs, of bfloat16.
BFLOAT16 = frozenset({"amx_bf16", "avx512_bf16"})
_CPUINFO = Path("/proc/cpuinfo")


def instruction_sets(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """Reads the instruction sets of the first CPU, by Linux's names; only of x86 on Linux."""
    return frozenset(_first("flags", cpuinfo).split())


def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    """Returns the name of the first CPU, or of its architecture where Linux does not tell it."""
    return _first("model name", cpuinfo) or platform.processor() or platform.machine()


def cores() -> int:
    """Returns how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _first(wanted: str, cpuinfo: Path) -> str:
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == wanted), "")
