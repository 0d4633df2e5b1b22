"""The HTTP edge. The only room that knows the web framework, the routes of the contract, keys and status codes."""

import warnings

# Connexion imports Starlette's test client, which nothing here uses and which warns of its own future.
warnings.filterwarnings("ignore", message="Using `httpx` with `starlette.testclient`")
