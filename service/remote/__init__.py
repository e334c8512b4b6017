"""Other hubs: what recipes import from them, and what results are pushed to."""
