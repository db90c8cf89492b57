"""The work folder: where things lie, how they are written, whether they are current."""
