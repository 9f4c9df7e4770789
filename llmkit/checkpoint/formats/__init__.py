"""How weights are stored on disk: one file for each format."""
