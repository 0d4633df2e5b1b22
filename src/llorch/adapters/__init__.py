"""Clients of inference engines: one module per engine, over one streaming HTTP client."""
