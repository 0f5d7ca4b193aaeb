"""`dht bench`: what the saved FLOPs are worth in seconds, measured in one process after a parity check."""
