"""What TLS is to be: certificates, the two roles, and their contexts. No I/O."""
