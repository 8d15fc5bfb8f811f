"""Training by Ray Train: what a rank does, its data, and its channel to the driver."""
