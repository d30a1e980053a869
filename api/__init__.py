"""The HTTP gateway: blocks, metadata, admin; authentication, errors, metrics."""
