"""Drawn data to try the pipeline on."""
