"""A whole cell in one process under virtual time."""
