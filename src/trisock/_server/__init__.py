"""Many connections: listening, accepting, and a task for each."""
