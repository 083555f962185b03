"""Shared by all kernels: launches, loads, rounding, rotation, tiles and the gate."""
