"""Reads token shards with Ray Data. Run it from the repository root, after `make demo`."""

import ray

from pipeline.tokens import Output

output = Output.open("runs/demo/tokens")
# A file without a manifest entry is not committed. A killed job may have left such files in the same folder.
files = [output.tokens_url(entry.name) for entry in output.commits()]
rows = ray.data.read_parquet(files).select_columns(["key", "tokens", "shape"])
for batch in rows.iter_batches(batch_size=64, batch_format="numpy"):
    grids = [flat.reshape(shape) for flat, shape in zip(batch["tokens"], batch["shape"], strict=True)]
    print(f"{batch['key'][0]} and {len(grids) - 1} more: {grids[0].dtype} array of shape {grids[0].shape}")
