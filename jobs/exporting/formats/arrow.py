"""Arrow: streams that Hugging Face datasets maps into memory, with all columns of the token shards.

Tokens are flat lists in C order; the column shape holds the shape of each grid.
"""

import pyarrow as pa

from jobs.exporting.format import FORMATS, Format
from jobs.exporting.rows import Rows

ROWS_PER_BATCH = 1000  # as datasets writes it


@FORMATS.register("arrow")
class Arrow(Format):
    def files(self, rows: Rows, number: int) -> dict[str, bytes]:
        out = pa.BufferOutputStream()
        with pa.ipc.new_stream(out, rows.table.schema) as writer:
            writer.write_table(rows.table, max_chunksize=ROWS_PER_BATCH)
        return {f"tokens-{number:06d}.arrow": out.getvalue().to_pybytes()}
