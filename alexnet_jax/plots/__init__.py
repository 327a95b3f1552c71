"""Single figures, drawn by Matplotlib from plain arrays, and image grids.

Importing a module of this room takes 0.5 s; what only may draw imports it where it does.
"""
