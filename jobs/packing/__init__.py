"""From folders and tables to WebDataset shards."""
