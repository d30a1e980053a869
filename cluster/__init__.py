"""The cell: topology, placement, volumes, block index, block client, supervisor."""
