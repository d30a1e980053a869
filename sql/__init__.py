"""SQL plumbing shared by `cluster` and `metadata`: engines, group commit, migrations."""
