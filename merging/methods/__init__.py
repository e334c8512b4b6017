"""One published merging system per file."""
