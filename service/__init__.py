"""The HTTP side of Merganser."""
