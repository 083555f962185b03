"""Benchmarks on a GPU: times from the profiler, bytes from the kernels' counts, and the copy bandwidth of the same run."""
