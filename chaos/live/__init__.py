"""A cell of real processes: started as a user would, broken on purpose, watched from outside."""
