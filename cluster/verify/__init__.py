"""The verifier: compares the block index with what the nodes hold, in both directions."""
