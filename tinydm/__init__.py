"""The pipeline: recipes, run folders, stages, comparisons, reports, training."""
