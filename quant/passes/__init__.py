"""Passes, a file each, named as in the method YAML; job, order and run serve all of them."""
