"""The CUDA operators beside their peers and the machine's ceilings; see :mod:`benchmarks.cuda.run`."""
