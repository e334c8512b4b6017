"""Webhooks: who wants to be told about merges, and the telling, signed as Standard Webhooks says."""
