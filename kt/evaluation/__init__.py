"""Scores of trained students."""
