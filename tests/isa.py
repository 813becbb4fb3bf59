"""The instruction sets of the CPU kernels: how to compile for them, and whether this machine runs them."""

from __future__ import annotations

import platform
from pathlib import Path

ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if platform.machine() == "x86_64":
    ISA_FLAGS["baseline"] = ["-O2"]
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    widths = ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mprefer-vector-width=512"]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], *widths]


def runs(isa: str) -> bool:
    info = Path("/proc/cpuinfo")
    features = set(info.read_text().replace("_", "").split()) if info.exists() else set()
    return all(flag.removeprefix("-m") in features for flag in ISA_FLAGS[isa] if "=" not in flag)
