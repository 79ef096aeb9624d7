"""What `baseline` is made of: the stored entry, and its text."""
