"""``python -m tests.triton_compiler [--all]``: compiles the Triton kernel for GPUs that are absent, and reports.

Prints a line of JSON for each variant and target. Triton must not run in its interpreter here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from dracopt_ext.rule import RULES

DTYPES = ("fp32", "bf16", "fp16", "fp64")
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
PRODUCT = list(itertools.product(DTYPES, repeat=3))
"""All combinations of the dtypes of parameter, gradient and states."""
USUAL = [*((d, d, d) for d in DTYPES), ("bf16", "bf16", "fp32"), ("fp16", "fp16", "fp32"), ("fp32", "fp32", "bf16")]
PAIRWISE = [dtypes for dtypes in PRODUCT if "fp64" not in dtypes and sum(map(DTYPES.index, dtypes)) % 3 == 0]
"""In these, any two streams have every combination of the dtypes that are updated in fp32."""

PRECISION: list[tuple[str | None, int]] = [("fp32", 0), ("split16", 0), (None, 1), (None, 3)]
"""Forms of masters, and which streams are rounded at random."""


class Variant(NamedTuple):
    rule: str
    dtypes: tuple[str, ...]
    """The dtypes of the parameter, the gradient and the states."""
    target: str
    master: str | None = None
    at_random: int = 0


def variants(complete: bool) -> list[Variant]:
    """Every combination for every target; or a choice, because one takes a second."""
    import triton

    if complete:
        chosen = dict.fromkeys(TARGETS, PRODUCT)
    else:
        few = [("fp32", "fp32", "fp32"), ("bf16", "bf16", "fp32"), ("fp64", "fp64", "fp64")]
        chosen = {"sm_80": few, "sm_90": sorted({*USUAL, *PAIRWISE}), "sm_100": few, "gfx942": USUAL}
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        del chosen["gfx942"]  # see why_no_triton
    found = []
    for target, mixes in chosen.items():
        for (name, rule), (param, grad, state) in itertools.product(RULES.items(), mixes):
            least, most = list(rule.moments.values()).count(None), len(rule.moments)
            counts = range(least, most + 1) if (param, grad, state) in USUAL else [most]
            found += [Variant(name, (param, grad, *[state] * count), target) for count in counts]
    found += [
        Variant(rule, (dtype, dtype, *[state] * len(RULES[rule].moments)), "sm_90", *precision)
        for rule in RULES
        for dtype, state in (("bf16", "fp32"), ("fp16", "fp16"))
        for precision in PRECISION
        if (dtype, precision[0]) != ("fp16", "split16")
    ]
    return found


def compile_one(variant: Variant) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dracopt_ext.triton_kernels import kernel, launcher

    rule, dtypes, target, master, at_random = variant
    backend = TARGETS[target][0]
    constants = launcher.specialization(rule, dtypes, backend, master=master, at_random=at_random)
    addresses = dict.fromkeys(("rows", "layouts", "first_tiles", "arguments"), "i64")
    signature = {**addresses, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel.step_kernel, signature=signature, constexprs=constants)
    options = launcher.options(dtypes, backend, master, at_random)
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    constants_of = re.findall(r"arith\.constant (\S+) : f64", compiled.asm["ttir"])
    found = {
        **variant._asdict(),
        "constants": [number(text) for text in constants_of],
        "fast": constants["fast"],
    }
    return {**found, **(of_amd(compiled.asm) if target == "gfx942" else of_nvidia(compiled.asm))}


def number(text: str) -> float:
    """Reads a number as MLIR writes it: in decimals, or as bits."""
    return struct.unpack("<d", int(text, 16).to_bytes(8, "little"))[0] if text.startswith("0x") else float(text)


def of_nvidia(asm: Any) -> dict[str, Any]:
    ptx = asm["ptx"]
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()

        def run(tool: str, option: str) -> str:
            command = [tools / tool, option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = run("cuobjdump", "-res-usage"), run("nvdisasm", "-c")
    # The loop's first loads, up to the barrier that follows them.
    beginning = re.search(r"LDG\.E\.128.*?BAR\.SYNC", code, re.DOTALL)
    before_arithmetic, *_ = re.split(r"\b[FD](?:FMA|MUL|ADD)\b", beginning[0])  # type: ignore[index]
    return {
        "loads_before_arithmetic": before_arithmetic.count("LDG.E.128"),
        "vector_loads": Counter(re.findall(r"ld\.global\.(?:v4\.b32|v2\.b64)", ptx)).total(),
        "vector_stores": Counter(re.findall(r"st\.global\.(?:v4\.b32|v2\.b64)", ptx)).total(),
        "half_vector_loads": ptx.count("ld.global.v2.b32"),
        "half_vector_stores": ptx.count("st.global.v2.b32"),
        "exchanges": ptx.count("st.shared"),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        "estimates": Counter(re.findall(r"\b(?:rcp|rsqrt)\.approx\.ftz\.f32", ptx)),
        # All other operations that do not round as IEEE 754 does: contracted, approximate or flushing.
        "inexact": re.findall(
            r"\b(?:div|sqrt|rcp|rsqrt|ex2|lg2)\.(?:full|approx)\S*|\b(?:mul|add|sub|fma)\.(?!rn)\S*f(?:32|64)\b|\S+\.ftz\S*",
            re.sub(r"\b(?:rcp|rsqrt)\.approx\.ftz\.f32", "", ptx),
        ),
    }


def of_amd(asm: Any) -> dict[str, Any]:
    text = asm["amdgcn"]
    return {
        "vector_loads": len(re.findall(r"\b(?:global|flat|buffer)_load_(?:dwordx4|b128)", text)),
        "vector_stores": len(re.findall(r"\b(?:global|flat|buffer)_store_(?:dwordx4|b128)", text)),
        "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1]),  # type: ignore[index]
        "stack": sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text))),
        "inexact": re.findall(
            r"\bf(?:add|sub|mul|div) (?:fast|afn|arcp|contract|reassoc)\b|llvm\.amdgcn\.(?:rsq|rcp|sqrt)", asm["llir"]
        )
        + ([] if '"denormal-fp-math-f32"="ieee"' in asm["llir"] else ["flushes subnormal numbers"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every combination of dtypes for every target")
    chosen = variants(parser.parse_args().all)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            for found in pool.map(compile_one, chosen):
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
