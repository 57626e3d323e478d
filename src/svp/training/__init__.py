"""One run: how it is learned."""
