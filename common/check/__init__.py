"""What will fail, before days are spent."""
