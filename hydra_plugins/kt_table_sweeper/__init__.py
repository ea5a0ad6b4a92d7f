"""Hydra plugin: sweeps over the rows of a table."""
