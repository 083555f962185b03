"""Measures tiles on a device."""
