"""Stages 06, 07 and 09: probabilities become thresholds, a submission and tables. Without torch."""
