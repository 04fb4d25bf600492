"""Ranks, devices, memory, randomness, files and logs: what a run needs of its machine."""
