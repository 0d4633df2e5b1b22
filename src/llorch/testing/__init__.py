"""Doubles for everything that llorch talks to: they keep the promises of the real thing and let tests break them."""
