"""TLS configuration: certificates, the two roles, and their contexts. No I/O."""
