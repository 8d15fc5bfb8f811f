"""From token shards to the formats of other readers."""
