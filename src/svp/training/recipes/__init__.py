"""Named recipes: one file of rows for each source."""
