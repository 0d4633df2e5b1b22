"""The command line: thin commands over the client and, for `serve`, the app."""
