"""What `profile` is made of: its sections, their summary, the roofline, the trace."""
