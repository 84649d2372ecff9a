"""Studies that train: many runs with several seeds, a table and a figure."""
