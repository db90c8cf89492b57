"""Downloads the Human Protein Atlas's images for external training samples."""
