"""One connection: the descriptor, TLS over it, what is unread, and the Socket."""
