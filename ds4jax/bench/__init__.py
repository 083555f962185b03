"""Benchmarks on a GPU: times from the profiler, bytes from the kernels' own counts, and the bandwidth of the same run."""
