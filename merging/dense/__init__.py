"""Merges of full checkpoints and task vectors, streamed tensor by tensor in row blocks."""
