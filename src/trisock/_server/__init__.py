"""Servers: listen, accept, and run a task per connection."""
