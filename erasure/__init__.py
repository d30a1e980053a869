"""Redundancy schemes, the envelope of a stored block, fragments and the codec."""
