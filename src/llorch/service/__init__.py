"""Use cases. They know the domain and the ports, and neither HTTP nor any engine's protocol."""
