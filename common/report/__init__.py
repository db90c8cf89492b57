"""Stage 08: the page."""
