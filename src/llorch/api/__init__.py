"""The HTTP edge. The only room that knows the web framework, the routes of the contract, keys and status codes."""
