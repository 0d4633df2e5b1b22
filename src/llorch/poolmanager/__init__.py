"""Keeps the engine processes of one host alive: checks, starts, watches and ends them as the service orders."""
