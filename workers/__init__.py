"""The RQ side of Merganser."""
