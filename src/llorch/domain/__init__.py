"""The pure heart: tasks, queue, ledger, placement and the scheduler that ties them together.

No I/O, no clock, no randomness, no logging: `now` and everything else from outside are arguments.
"""
