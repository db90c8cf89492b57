"""Stages 04 and 05: everything that needs torch."""
