"""One connection: the descriptor, TLS over it, the receive buffer, and the Socket."""
