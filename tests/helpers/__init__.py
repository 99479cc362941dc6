"""What tests share; one idea per module. Tests import it, and never each other."""
