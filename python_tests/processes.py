"""Test files that are programs too, run in several processes (gloo, CPU)."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import flux_ext


def run(file, count, *args):
    """Runs ``file`` with these arguments in so many processes; what came of it."""
    package = Path(flux_ext.__file__).parent.parent
    path = os.pathsep.join([str(package), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.run(
        [*launch, file, *map(str, args)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def launch(file, count, *args):
    """As :func:`run`, and it must end well; where it does not, the last that each process said is told."""
    done = run(file, count, *args)
    said = done.stderr.splitlines()
    last = [line for rank in range(count) for line in [s for s in said if s.startswith(f"[rank{rank}]")][-20:]]
    assert done.returncode == 0, "\n".join([*last, done.stderr[-2000:]])


def end():
    """Ends a process whose work is done and written.

    At once, without Python's own end: there a thread of gloo that still lets go of Python objects is made to exit, and
    that aborts the process ("terminate called without an active exception"), also where the group was destroyed.
    """
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def allow_fsdp(yes):
    """accelerate takes FSDP for processes with GPUs only. Told that these have some, it does the same over gloo."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    stock = getattr(PartialState.__init__, "stock", PartialState.__init__)

    def init(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    init.stock = stock
    PartialState.__init__ = init if yes else stock
    if not yes:
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate sets it and leaves it
