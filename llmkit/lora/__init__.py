"""Low-rank adapters: trained onto any linear, read from and written to PEFT folders, merged."""
