"""Faults, workloads, checkers, and the simulated cell."""
