"""mergekit configurations: read as they are, run with mergekit's arithmetic (``docs/mergekit.md``)."""
