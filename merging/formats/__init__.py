"""Readers and writers of adapter and checkpoint files."""
