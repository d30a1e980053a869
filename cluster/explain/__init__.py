"""Answers to an operator's questions about redundancy: why is it so, and what if."""
