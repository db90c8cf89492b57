"""The work folder: where files are, how they are written, whether they are current."""
