"""The stages of a run, one short file each."""
