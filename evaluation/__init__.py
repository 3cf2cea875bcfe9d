"""Features, scores and the report."""
