"""One disk: the fragment store, the data port in front of it, and the Ray actor around both."""
