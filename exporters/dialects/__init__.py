"""One decoder description in each runtime's best operations."""
