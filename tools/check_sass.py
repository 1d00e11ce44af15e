"""Checks the machine code of the CUDA library; needs no GPU.

    python tools/check_sass.py flux_ext/libflux_ext_cuda.so [--all]

For every kernel: the instructions that must and must not appear, a register ceiling, no stack. Prints the
faults (``--all``: every kernel) and a summary, and fails if anything is wrong. cuobjdump and nvdisasm come
from a CUDA toolkit, or from PyPI: nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm (extra ``dev``).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

MOST_MEGABYTES = 30
SPILLS = frozenset({"LDL", "STL"})
ATOMICS = frozenset({"RED", "REDG", "ATOM", "ATOMG", "ATOMS"})


@dataclass(frozen=True)
class Rule:
    """What the machine code of the kernels whose mangled name matches must look like."""

    pattern: str
    need: frozenset[str] = frozenset()
    forbid: frozenset[str] = SPILLS
    # Of an instruction, between the first and the last WGMMA: in the consumers' code, not in that of the scheduler.
    most_among_products: tuple[tuple[str, int], ...] = ()
    most_registers: int = 255


SM90_256 = Rule(
    r"sm90.*attend.*Li256E", need=frozenset({"HGMMA", "UTMALDG"}), forbid=SPILLS | {"HMMA"}, most_registers=168
)
# Descriptors that stand in uniform registers, not moved there before every product (docs/kernels_diary.md, v8); and
# outputs that leave through shared memory and TMA, for which only 128 rows of head dimension 256 have no room.
SM90 = replace(
    SM90_256,
    pattern=r"sm90.*attend",
    need=SM90_256.need | {"STSM", "UTMASTG"},
    most_among_products=(("R2UR", 8),),
)

# The first rule that matches counts.
RULES = (
    # One warpgroup: 256 threads share the registers.
    replace(SM90, pattern=SM90.pattern + r".*Li1ELi\d+E", most_registers=240),
    SM90_256,
    SM90,
    replace(SM90, pattern=r"sm90.*mix_kernel", need=SM90_256.need | {"STSM"}),  # two warps store what is staged
    Rule(r"sm80.*mix_kernel", need=frozenset({"HMMA", "LDGSTS", "LDSM"}), forbid=SPILLS | ATOMICS),
    Rule(r"sm90.*select_kernel.*Lb1E", need=frozenset({"HGMMA", "UTMALDG"}), most_registers=168),  # by TMA
    Rule(r"sm90.*select_kernel", need=frozenset({"HGMMA", "LDGSTS"}), most_registers=168),
    Rule(r"sm80.*select_kernel", need=frozenset({"HMMA", "LDGSTS", "LDSM"})),
    Rule(r"sm80.*attend_kernel", need=frozenset({"HMMA", "LDGSTS", "LDSM"})),
    # Adds in memory, but in a fixed order (docs/kernels.md); its atomic only hands out work.
    Rule(
        r"sm90.*ordered_backward_kernel",
        need=frozenset({"HGMMA", "LDGSTS", "STSM", "REDG"}),
        forbid=SPILLS | {"HMMA"},
        most_among_products=(("R2UR", 8), ("WARPGROUP", 24)),
        most_registers=168,
    ),
    # Few waits among the products: ptxas puts one behind each where it has no registers to let them overlap.
    Rule(
        r"backward_kernel.*sm90",
        need=frozenset({"HGMMA", "LDGSTS"}),
        forbid=SPILLS | ATOMICS | {"HMMA"},
        most_among_products=(("R2UR", 8), ("WARPGROUP", 12)),
        most_registers=168,
    ),
    Rule(r"backward_kernel.*sm80", need=frozenset({"HMMA", "LDGSTS", "LDSM"}), forbid=SPILLS | ATOMICS),
    Rule(r"route_kernel", most_registers=128),
    Rule(r"plan_kernel", most_registers=64),
    Rule(r"combine\w*_kernel", most_registers=128),
    Rule(r"append_kernel", most_registers=64),
    Rule(r""),
)


@dataclass
class Kernel:
    """What the disassembler says about one kernel."""

    arch: str
    name: str
    order: list[str] = field(default_factory=list)  # its instructions
    registers: int = 0
    stack: int = 0

    def faults(self) -> list[str]:
        rule = next(r for r in RULES if re.search(r.pattern, self.name))
        ops = Counter(self.order)
        found = [f"lacks {op}" for op in sorted(rule.need) if not ops[op]]
        found += [f"has {ops[op]} {op}" for op in sorted(rule.forbid) if ops[op]]
        products = [i for i, op in enumerate(self.order) if op == "HGMMA"]
        among = Counter(self.order[products[0] : products[-1]]) if products else ops
        found += [
            f"has {among[op]} {op} among its products, more than {n}"
            for op, n in rule.most_among_products
            if among[op] > n
        ]
        if self.registers > rule.most_registers:
            found.append(f"more than {rule.most_registers} registers")
        if self.stack:
            found.append("uses the stack")
        return found


def cuobjdump(*args: str) -> str:
    wheel = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", str(wheel)])
    tool = shutil.which("cuobjdump", path=path)
    if tool is None:
        raise SystemExit("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return subprocess.run(
        [tool, *args], check=True, text=True, capture_output=True, env={**os.environ, "PATH": path}
    ).stdout


def read_kernels(library: str) -> list[Kernel]:
    found: dict[tuple[str, str], Kernel] = {}
    arch, kernel = "", Kernel("", "")
    for line in cuobjdump("-sass", library).splitlines():
        if m := re.match(r"\s*code for (\S+)", line):
            arch = m[1]
        elif m := re.match(r"\s*Function : (\S+)", line):
            kernel = found[arch, m[1]] = Kernel(arch, m[1])
        elif m := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", line):
            kernel.order.append(m[1])
    name = ""
    for line in cuobjdump("-res-usage", library).splitlines():
        if m := re.match(r"\s*arch = (\S+)", line):
            arch = m[1]
        elif m := re.match(r"\s*Function (\S+):", line):
            name = m[1]
        elif (m := re.search(r"REG:(\d+) STACK:(\d+)", line)) and (arch, name) in found:
            found[arch, name].registers, found[arch, name].stack = int(m[1]), int(m[2])
    return list(found.values())


def short(name: str) -> str:
    """The tail of a mangled name without what all have."""
    return re.sub(r"_ZN4flux4cuda|_GLOBAL__N__\w{8}_|EEvNS.*|_cu_\w{8}", "", name)[:90]


def main(library: str, everything: bool) -> int:
    kernels = read_kernels(library)
    bad = 0
    for k in sorted(kernels, key=lambda k: (k.arch, k.name)):
        faults = k.faults()
        bad += bool(faults)
        if faults or everything:
            note = ", ".join(faults) or "ok"
            print(f"{k.arch:8} {short(k.name):90} {k.registers:4} registers {k.stack:4} B stack  {note}")
    megabytes = Path(library).stat().st_size / 1e6
    if megabytes > MOST_MEGABYTES:
        bad += 1
        print(f"the library has {megabytes:.1f} MB, more than {MOST_MEGABYTES}")
    archs = ", ".join(f"{n} {arch}" for arch, n in Counter(k.arch for k in kernels).items())
    print(f"{len(kernels)} kernels ({archs}), {megabytes:.1f} MB, {bad} faults")
    return 1 if bad or not kernels else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], "--all" in sys.argv[2:]))
