"""`haversack fsck`: what a stopped cell's disks hold against what its databases say, and how the
databases are made again from the disks (`docs/design/019-fsck.md`)."""
