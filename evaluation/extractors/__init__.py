"""Feature extractors of the distribution scores."""
