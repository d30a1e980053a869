"""Changes that somebody asked for: drain, decommission, replace, rebalance, transcode."""
