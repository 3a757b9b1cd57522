"""Plan -> averaged blocks, exact and in bounded memory, by threads or by the workers of a cluster."""
