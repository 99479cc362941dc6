"""Code that several tests share, one idea per module. Tests never import from other tests."""
