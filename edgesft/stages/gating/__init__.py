"""What `gate` and `calibrate` are made of: pairs, the panel that decides, budgets, verdicts."""
