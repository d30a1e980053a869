"""What every other package may rely on: ids, limits, configuration, errors, clock, messages.

Imports nothing of ours.  Everything here is plain data and pure functions, except
`protocol.config` (the sole reader of the environment) and `protocol.allocator`.
"""
