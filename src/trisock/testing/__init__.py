"""Tools to test programs that use trisock."""
