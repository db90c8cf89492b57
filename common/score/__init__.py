"""Stages 06, 07 and 09: from probabilities to thresholds, a submission and tables. Without torch."""
