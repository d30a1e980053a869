"""Users, tokens, namespaces, the file tree and its commits: SQL only."""
