"""The benchmark: llorch beside other proxies, all against the same fake engine, in one run (`python -m bench`)."""
