"""The parts of `tools/regen.py`: reading the contract, judging it, and writing `generated/` from it."""
