"""The one layer that open_clip names."""
