"""What images are scored against."""
