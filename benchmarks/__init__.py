"""Benchmarks: the merge step against its floor and against PEFT, and the quality of merged adapters."""
