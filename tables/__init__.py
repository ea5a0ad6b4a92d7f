"""The papers' tables: what was printed, what our runs gave, and whether the claims hold."""
