"""The `haversack` command."""
