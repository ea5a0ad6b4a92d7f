"""Everything that runs cells and tables; used from the checkout, not packaged."""
