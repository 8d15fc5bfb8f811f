"""Runs the frozen tokenizer in your own Ray Data pipeline. Run it from the repository root, after `make demo`."""

import os

import ray

from jobs.actors.tokenizer_actor import TokenizerActor

# Absolute paths or URLs, because Ray's workers may run in another working directory.
tokenizer = os.path.abspath("runs/demo/tokenizers/vp_vae-K1024")
photos = ray.data.read_webdataset(os.path.abspath("samples/heldout"), decoder=None)  # None: the JPEGs stay bytes
tokenized = photos.select_columns(["__key__", "jpg"]).map_batches(
    TokenizerActor,
    fn_constructor_kwargs={"tokenizer": tokenizer, "column": "jpg"},
    batch_size=32,
    batch_format="pyarrow",
    compute=ray.data.ActorPoolStrategy(size=1),  # add num_gpus=1 to run each actor on a GPU
)
for row in tokenized.drop_columns(["jpg"]).iter_rows():
    print(row["__key__"], row["error"] or f"{len(row['tokens'])} tokens of shape {row['shape']}")
