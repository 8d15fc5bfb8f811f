"""The work of one rank of a Ray Train job, its data, its checkpoints, and its channel to the driver."""
