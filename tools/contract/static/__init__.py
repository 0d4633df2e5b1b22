"""The contract as Python: wire models, operations, routes, configuration types, metric declarations, resolved specs."""
