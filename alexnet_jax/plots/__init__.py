"""Single figures, drawn by Matplotlib from plain arrays, and image grids."""
