"""Repair: plans what to make again or to move, makes it, verifies it, and only then says so."""
