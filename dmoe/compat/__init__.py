"""Other libraries' names on dmoe's operations, so that moving costs one changed import."""
