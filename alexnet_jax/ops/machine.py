"""What this machine's CPU can do."""

from pathlib import Path

# Linux's names of the instructions that multiply matrices, or pairs, of bfloat16.
BFLOAT16 = frozenset({"amx_bf16", "avx512_bf16"})


def instruction_sets(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Reads the instruction sets of the first CPU, by Linux's names: "avx2", "amx_bf16".

    Args:
        cpuinfo: The file that Linux describes its CPUs in.

    Returns:
        Nothing where there is no such file, or none that lists "flags" as those of x86 do.
    """
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()
