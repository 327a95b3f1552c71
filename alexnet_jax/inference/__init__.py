"""A trained network in use: predictions, pictures, exports."""
