"""Benchmarks of the data path and the limits they are measured against."""
