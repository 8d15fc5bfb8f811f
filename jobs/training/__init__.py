"""What one rank of a Ray Train job does, its data, its checkpoints, and its channel to the driver."""
