"""Stages 01 to 03: files and labels become stored images, duplicates and folds. Without torch."""
