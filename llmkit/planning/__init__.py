"""Whether a run fits, and how long it takes. No torch."""
