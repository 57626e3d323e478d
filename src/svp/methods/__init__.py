"""Papers: what is learned. One method, one file."""
